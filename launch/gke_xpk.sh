#!/usr/bin/env bash
# A run on a TPU slice of a GKE cluster that xpk has made.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

usage() {
    cat <<'TEXT'
usage: launch/gke_xpk.sh ACTION NAME --project PROJECT --zone ZONE --cluster CLUSTER [OPTION ...] [-- TRAIN ARGUMENTS]

ACTION is one of
  create    starts dcjax train as the workload NAME, which is started again after a preemption
  delete    deletes the workload; what is on its storage stays

  --project PROJECT, --zone ZONE   where the cluster is
  --cluster CLUSTER                its name
  --tpu-type TYPE                  of create: the slice, such as v5litepod-16
  --image IMAGE                    of create: what launch/Dockerfile made, where the cluster can fetch it
  --storage STORAGE                of create: the name of a storage that xpk has attached to the cluster; run
                                   directories and data lie where it is mounted
  --env NAME=VALUE                 of create: an environment variable of the run; may be repeated
  --restarts N                     of create: how often a run that ends with 75 or 134, or is preempted, is started
                                   again (100)
  --grace SECONDS                  of create: how long a run may take to save after SIGTERM (300)
  --dry-run                        prints the commands, and runs none
  -- TRAIN ARGUMENTS               of create: what follows dcjax train
TEXT
}

create() {
    local variable variables=()
    for variable in "${environment[@]}"; do
        variables+=(--env="$variable")
    done
    # exec, since xpk sends SIGTERM to the process that it starts, and to none below that
    run xpk workload create --workload="$name" "${place[@]}" --tpu-type="${options[tpu-type]}" \
        --docker-image="${options[image]}" --storage="${options[storage]}" \
        --max-restarts="${options[restarts]}" --restart-on-exit-codes=75 \
        --termination-grace-period-seconds="${options[grace]}" "${variables[@]}" \
        --command="exec $(quoted dcjax train "${arguments[@]}")"
}

delete() {
    run xpk workload delete --workload="$name" "${place[@]}"
}

parse " project zone cluster tpu-type image storage env restarts grace " "$@"
case $action in
create) need project zone cluster tpu-type image storage && need_arguments ;;
delete) need project zone cluster ;;
*) fail "the action is '$action'; it must be create or delete" ;;
esac
restarts
[[ ${options[grace]:=300} =~ ^[0-9]+$ ]] || fail "--grace is '${options[grace]}'; it must be a whole number of seconds"
place=(--project="${options[project]}" --zone="${options[zone]}" --cluster="${options[cluster]}")
"$action"
