#!/usr/bin/env bash
# Runs a command, and again when it ends as a run that goes on by the same command: with 75, or with JAX's 134.
set -euo pipefail

if [[ ${1:-} == --help ]]; then
    echo "usage: launch/restart.sh TIMES COMMAND ...: runs the command, at most TIMES again while it ends with 75 or 134;"
    echo "SIGTERM is handed to the command, which is then not started again"
    exit
fi
if [[ ! ${1:-} =~ ^[0-9]+$ || $# -lt 2 ]]; then
    echo "restart.sh: error: TIMES is '${1:-}'; it must be a whole number, and a command must follow it" >&2
    exit 2
fi

times=$1 child='' stopped=''
shift
trap 'stopped=1; kill -TERM "$child" 2>/dev/null || true' TERM
for ((again = 1; ; again++)); do
    "$@" &
    child=$!
    # a signal ends wait while the command still runs
    while
        status=0
        wait "$child" || status=$?
        kill -0 "$child" 2>/dev/null
    do :; done
    [[ ($status == 75 || $status == 134) && $again -le $times && ! $stopped ]] || exit "$status"
    sleep 10 &
    child=$!
    echo "restart.sh: status $status; restart $again of at most $times" >&2
    wait "$child" || true
    [[ ! $stopped ]] || exit "$status"
done
