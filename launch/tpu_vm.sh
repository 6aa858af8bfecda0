#!/usr/bin/env bash
# A run on a Cloud TPU VM, on all workers of its slice.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

usage() {
    cat <<'TEXT'
usage: launch/tpu_vm.sh ACTION NAME --project PROJECT --zone ZONE [OPTION ...] [-- TRAIN ARGUMENTS]

ACTION is one of
  create    asks for a slice as a queued resource, and waits until it is there
  install   copies the last commit to all workers, and installs it there
  start     starts dcjax train on all workers; its output is ~/dcjax/train.log on each
  stop      sends SIGTERM to the run on all workers: it saves, and is not started again
  restart   after a preemption: delete, create, install and start
  delete    deletes the slice, and what is on its disks

  --project PROJECT, --zone ZONE   where the slice is
  --accelerator-type TYPE          of create: the slice, such as v5litepod-16
  --runtime-version VERSION        of create: the software of the TPU's virtual machines
  --spot                           of create: a slice that may be preempted
  --share SERVER:/PATH             of install: an NFS share to mount as /mnt/dcjax on all workers
  --env NAME=VALUE                 of start: an environment variable of the run; may be repeated
  --restarts N                     of start: how often a run that ends with 75 or 134 is started again (100)
  --dry-run                        prints the commands, and runs none
  -- TRAIN ARGUMENTS               of start: what follows dcjax train
TEXT
}

everywhere() {
    run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"
}

create() {
    run gcloud compute tpus queued-resources create "$name" "${place[@]}" --node-id="$name" \
        --accelerator-type="${options[accelerator-type]}" --runtime-version="${options[runtime-version]}" \
        ${options[spot]:+--spot}
    local describe=(gcloud compute tpus queued-resources describe "$name" "${place[@]}" "--format=value(state.state)")
    if [[ $dry_run ]]; then
        quoted "${describe[@]}"
        return
    fi
    local state
    until state=$("${describe[@]}") && [[ $state == ACTIVE ]]; do
        [[ $state != FAILED && $state != SUSPEND* ]] || fail "$name is $state; restart deletes it and asks anew"
        sleep 30
    done
}

install() {
    run mkdir -p build
    run git archive --format=tar.gz --output=build/dcjax.tar.gz HEAD
    run gcloud compute tpus tpu-vm scp build/dcjax.tar.gz "$name:" "${place[@]}" --worker=all
    # the machines' own Python may be too old for dcjax, and uv brings one
    local steps=(
        "mkdir -p dcjax" "tar -xzf dcjax.tar.gz -C dcjax" "cd dcjax" "python3 -m pip install --quiet --user uv"
        "python3 -m uv venv --quiet --allow-existing --python 3.12 .venv"
        "python3 -m uv pip install --quiet --python .venv/bin/python --constraints constraints.txt --editable '.[tpu]'"
    )
    if [[ ${options[share]:-} ]]; then
        steps+=(
            "sudo apt-get update -qq" "sudo apt-get install -qq nfs-common" "sudo mkdir -p /mnt/dcjax"
            "{ mountpoint -q /mnt/dcjax || sudo mount -t nfs $(quoted "${options[share]}") /mnt/dcjax; }"
        )
    fi
    local command
    command=$(printf ' && %s' "${steps[@]}")
    everywhere "${command# && }"
}

start() {
    local command=(launch/restart.sh "${options[restarts]}")
    if ((${#environment[@]})); then
        command+=(env "${environment[@]}")
    fi
    command+=(.venv/bin/dcjax train "${arguments[@]}")
    everywhere "cd dcjax && { nohup $(quoted "${command[@]}") >> train.log 2>&1 < /dev/null & echo \$! > train.pid; }"
}

stop() {
    everywhere "kill -TERM \$(cat dcjax/train.pid)"
}

delete() {
    run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

parse " project zone accelerator-type runtime-version share env restarts " "$@"
case $action in
create) need project zone accelerator-type runtime-version ;;
install | stop | delete) need project zone ;;
start) need project zone && need_arguments ;;
restart) need project zone accelerator-type runtime-version && need_arguments ;;
*) fail "the action is '$action'; it must be create, install, start, stop, restart or delete" ;;
esac
restarts
place=(--project="${options[project]}" --zone="${options[zone]}")
if [[ $action == restart ]]; then
    delete
    create
    install
    start
else
    "$action"
fi
