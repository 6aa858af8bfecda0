"""The launchers: what a dry run prints, that a real one runs just that, and what its commands do when they are run."""

import os
import shlex
import shutil
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[1]
TOOLS = Path(sysconfig.get_path("scripts"))
PLACE = ["--project", "p", "--zone=z"]
SLICE = ["--accelerator-type", "v5litepod-16", "--runtime-version", "v2-alpha-tpuv5-lite"]
TRAIN = ["my recipe.py", "--mesh.fsdp", "16", "name=it's"]
QUOTED = """'my recipe.py' --mesh.fsdp 16 'name=it'\\''s'"""

DELETE = "gcloud compute tpus queued-resources delete pod --project=p --zone=z --force --quiet\n"
CREATE = """\
gcloud compute tpus queued-resources create pod --project=p --zone=z --node-id=pod --accelerator-type=v5litepod-16 \
--runtime-version=v2-alpha-tpuv5-lite --spot
gcloud compute tpus queued-resources describe pod --project=p --zone=z '--format=value(state.state)'
"""
SSH = "gcloud compute tpus tpu-vm ssh pod --project=p --zone=z --worker=all"
INSTALL = f"""\
mkdir -p build
git archive --format=tar.gz --output=build/dcjax.tar.gz HEAD
gcloud compute tpus tpu-vm scp build/dcjax.tar.gz pod: --project=p --zone=z --worker=all
{SSH} '--command=mkdir -p dcjax && tar -xzf dcjax.tar.gz -C dcjax && cd dcjax && \
python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing --python 3.12 .venv && \
python3 -m uv pip install --quiet --python .venv/bin/python --constraints constraints.txt --editable '\\''.[tpu]'\\'''
"""
MOUNT = """\
 && sudo apt-get update -qq && sudo apt-get install -qq nfs-common && sudo mkdir -p /mnt/dcjax && \
{ mountpoint -q /mnt/dcjax || sudo mount -t nfs 10.0.0.2:/share /mnt/dcjax; }'
"""
START = f"""\
{SSH} '--command=cd dcjax && {{ nohup launch/restart.sh 7 env A=1 B=b .venv/bin/dcjax train \
'\\''my recipe.py'\\'' --mesh.fsdp 16 '\\''name=it'\\''\\'\\'''\\''s'\\'' >> train.log 2>&1 < /dev/null & \
echo $! > train.pid; }}'
"""
RUN = ["--restarts", "7", "--env", "A=1", "--env=B=b", "--", *TRAIN]
WORKLOAD = ["--cluster", "c", "--tpu-type", "v5litepod-16", "--image", "here/dcjax:1", "--storage", "share"]

DRY_RUNS = {
    "create": (["tpu_vm.sh", "create", "pod", *PLACE, *SLICE, "--spot"], CREATE),
    "install": (["tpu_vm.sh", "install", "pod", *PLACE], INSTALL),
    "install and mount": (
        ["tpu_vm.sh", "install", "pod", *PLACE, "--share", "10.0.0.2:/share"],
        INSTALL.removesuffix("'\n") + MOUNT,
    ),
    "start": (["tpu_vm.sh", "start", "pod", *PLACE, *RUN], START),
    "stop": (["tpu_vm.sh", "stop", "pod", *PLACE], f"{SSH} '--command=kill -TERM $(cat dcjax/train.pid)'\n"),
    "restart": (
        ["tpu_vm.sh", "restart", "pod", *PLACE, *SLICE, "--spot", *RUN],
        DELETE + CREATE + INSTALL + START,
    ),
    "delete": (["tpu_vm.sh", "delete", "pod", *PLACE], DELETE),
    "create a workload": (
        ["gke_xpk.sh", "create", "w", *PLACE, *WORKLOAD, *RUN],
        "xpk workload create --workload=w --project=p --zone=z --cluster=c --tpu-type=v5litepod-16 "
        "--docker-image=here/dcjax:1 --storage=share --max-restarts=7 --restart-on-exit-codes=75 "
        "--termination-grace-period-seconds=300 --env=A=1 --env=B=b "
        "'--command=exec dcjax train '\\''my recipe.py'\\'' --mesh.fsdp 16 '\\''name=it'\\''\\'\\'''\\''s'\\'''\n",
    ),
    "delete a workload": (
        ["gke_xpk.sh", "delete", "w", *PLACE, "--cluster", "c"],
        "xpk workload delete --workload=w --project=p --zone=z --cluster=c\n",
    ),
    "a job": (
        ["slurm.sbatch", *TRAIN],
        "srun --kill-on-bad-exit=0 bash -c "
        "'export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1))) && exec \"$@\"' "
        f"dcjax .venv/bin/dcjax train {QUOTED}\n"
        "# and where that ends with 75 or 134, at most 100 times:\n"
        "scontrol requeue JOB\n",
    ),
}


@pytest.fixture
def nothing(tmp_path):
    """The environment of a machine that has no launcher: what the scripts themselves need, and no more."""
    folder = tmp_path / "nothing"
    folder.mkdir()
    for program in ("bash", "cat", "dirname"):
        (folder / program).symlink_to(shutil.which(program))
    return {"PATH": str(folder)}


@pytest.fixture
def pretended(tmp_path):
    """The environment of a machine whose launchers only write down how they were called, and those calls."""
    folder, written = tmp_path / "pretended", tmp_path / "calls"
    folder.mkdir()
    for program in ("gcloud", "xpk", "git", "mkdir", "srun", "scontrol", "sleep"):
        stub = folder / program
        stub.write_text(
            '#!/bin/bash\n{ printf "%s\\0" "${0##*/}" "$@"; printf "\\n\\0"; } >> "$CALLS"\n'
            'case "$*" in *describe*) echo "$STATE" ;; esac\n'
            'if [[ ${0##*/} == srun ]]; then shift; "$@"; fi\n'
        )
        stub.chmod(0o755)

    def calls():
        whole = written.read_text() if written.exists() else ""
        return [call.split("\0")[:-1] for call in whole.split("\n\0")[:-1]]

    path = f"{folder}:{Path(shutil.which('bash')).parent}:/usr/bin:/bin"
    return {"PATH": path, "CALLS": str(written), "STATE": "ACTIVE"}, calls


def launch(script, *arguments, env, cwd=None):
    """What a launcher wrote, and its status, as subprocess.run gives them."""
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60)


def dry(script, *arguments, env):
    """The same in a dry run; of a job script the option stands first, since all else is the run's."""
    before = ("--dry-run",) if script == "slurm.sbatch" else ()
    behind = () if before else ("--dry-run",)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return launch(script, *before, *arguments[:cut], *behind, *arguments[cut:], env=env)


@pytest.mark.parametrize(("command", "printed"), DRY_RUNS.values(), ids=DRY_RUNS)
def test_a_dry_run_prints_the_commands_on_a_machine_that_has_none_of_them(command, printed, nothing):
    done = dry(*command, env=nothing)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == printed


@pytest.mark.parametrize(
    ("command", "printed"), [pytest.param(*DRY_RUNS[name], id=name) for name in DRY_RUNS if name != "a job"]
)
def test_a_run_runs_what_its_dry_run_prints(command, printed, pretended):
    env, calls = pretended
    done = launch(*command, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert calls() == [shlex.split(line) for line in printed.splitlines()]


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke_xpk.sh", "slurm.sbatch", "restart.sh"])
def test_help_explains(script, nothing):
    done = launch(script, "--help", env=nothing)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ") and script in done.stdout


REFUSED = {
    "tpu_vm.sh: error: an action and a name are needed, and '' was given; --help explains them": ["tpu_vm.sh"],
    "tpu_vm.sh: error: an action and a name are needed, and 'create a b' was given; --help explains them": [
        *("tpu_vm.sh", "create", "a", "b")
    ],
    "tpu_vm.sh: error: the action is 'begin'; it must be create, install, start, stop, restart or delete": [
        *("tpu_vm.sh", "begin", "pod", *PLACE)
    ],
    "tpu_vm.sh: error: there is no option --place; --help lists those there are": [
        *("tpu_vm.sh", "create", "pod", "--place", "z")
    ],
    "tpu_vm.sh: error: --project is given without a value": ["tpu_vm.sh", "create", "pod", "--project", "--zone=z"],
    "tpu_vm.sh: error: --zone is given without a value": ["tpu_vm.sh", "create", "pod", "--project=p", "--zone="],
    "tpu_vm.sh: error: --zone is missing; delete needs it": ["tpu_vm.sh", "delete", "pod", "--project", "p"],
    "tpu_vm.sh: error: --runtime-version is missing; restart needs it": [
        *("tpu_vm.sh", "restart", "pod", *PLACE, *SLICE[:2], "--", "r")
    ],
    "tpu_vm.sh: error: nothing to train is given; behind -- stands what follows dcjax train": [
        *("tpu_vm.sh", "start", "pod", *PLACE)
    ],
    "tpu_vm.sh: error: --restarts is 'often'; it must be a whole number": [
        *("tpu_vm.sh", "start", "pod", *PLACE, "--restarts", "often", "--", "r")
    ],
    "tpu_vm.sh: error: --env is 'A'; it must be NAME=VALUE": [
        *("tpu_vm.sh", "start", "pod", *PLACE, "--env", "A", "--", "r")
    ],
    "gke_xpk.sh: error: the action is 'list'; it must be create or delete": ["gke_xpk.sh", "list", "w", *PLACE],
    "gke_xpk.sh: error: --storage is missing; create needs it": [
        *("gke_xpk.sh", "create", "w", *PLACE, *WORKLOAD[:-2], "--", "r")
    ],
    "gke_xpk.sh: error: --grace is '5m'; it must be a whole number of seconds": [
        *("gke_xpk.sh", "create", "w", *PLACE, *WORKLOAD, "--grace", "5m", "--", "r")
    ],
    "slurm.sbatch: error: nothing to train is given; behind the script stands what follows dcjax train": [
        "slurm.sbatch"
    ],
    "slurm.sbatch: error: SLURM_JOB_ID is not set; start the script by sbatch, or give --dry-run first": [
        *("slurm.sbatch", "quickstart")
    ],
    "restart.sh: error: TIMES is 'often'; it must be a whole number, and a command must follow it": [
        *("restart.sh", "often", "true")
    ],
}


@pytest.mark.parametrize(("line", "command"), REFUSED.items(), ids=[each.partition("error: ")[2] for each in REFUSED])
def test_what_is_wrong_is_one_line_and_nothing_is_run(line, command, pretended):
    env, calls = pretended
    done = launch(*command, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line + "\n")
    assert not calls()


def test_a_slice_is_waited_for_and_one_that_will_not_come_is_told(pretended, tmp_path):
    env, calls = pretended
    done = launch("tpu_vm.sh", "create", "pod", *PLACE, *SLICE, env=env | {"STATE": "SUSPENDED"})
    assert done.returncode == 2
    assert done.stderr == "tpu_vm.sh: error: pod is SUSPENDED; restart deletes it and asks anew\n"
    assert calls()[-1][:5] == ["gcloud", "compute", "tpus", "queued-resources", "describe"]
    # the second look finds it
    gcloud = Path(env["PATH"].partition(":")[0]) / "gcloud"
    looked = 'if [[ -e $CALLS.looked ]]; then echo ACTIVE; else echo WAITING_FOR_RESOURCES; fi; : > "$CALLS.looked"'
    gcloud.write_text(gcloud.read_text().replace('echo "$STATE"', looked))
    Path(env["CALLS"]).unlink()
    done = launch("tpu_vm.sh", "create", "pod", *PLACE, *SLICE, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert [call[0] for call in calls()] == ["gcloud", "gcloud", "sleep", "gcloud"]


def test_a_failure_ends_a_launcher_with_its_status(pretended):
    env, calls = pretended
    gcloud = Path(env["PATH"].partition(":")[0]) / "gcloud"
    gcloud.write_text(gcloud.read_text() + "exit 3\n")
    done = launch("tpu_vm.sh", "restart", "pod", *PLACE, *SLICE, "--", "r", env=env)
    assert done.returncode == 3
    assert len(calls()) == 1


@pytest.fixture
def worker(tmp_path):
    """A home with a checkout, whose dcjax writes its arguments down, and on SIGTERM saves and ends with 75."""
    checkout = tmp_path / "home" / "dcjax"
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / "launch").symlink_to(ROOT / "launch")
    dcjax = checkout / ".venv" / "bin" / "dcjax"
    dcjax.write_text(
        "#!/bin/bash\n"
        "trap 'sleep 0.3; echo saved; exit 75' TERM\n"
        'printf "%s|" "$A" "$@"; echo\n'
        ": > ready\n"
        "for ((turn = 0; turn < 600; turn++)); do read -r -t 0.05 <> <(:) || true; done\n"
    )
    dcjax.chmod(0o755)
    return checkout


def until(happened):
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def command_of(done):
    """The command for the other machine, in a dry run's only line."""
    return shlex.split(done.stdout)[-1].removeprefix("--command=")


def test_on_a_worker_the_run_starts_as_given_and_stops_when_told(nothing, worker):
    started = command_of(dry("tpu_vm.sh", "start", "pod", *PLACE, *RUN, env=nothing))
    stopped = command_of(dry("tpu_vm.sh", "stop", "pod", *PLACE, env=nothing))
    subprocess.run(["bash", "-c", started], cwd=worker.parent, check=True, timeout=30)
    until((worker / "ready").exists)
    number = int((worker / "train.pid").read_text())
    subprocess.run(["bash", "-c", stopped], cwd=worker.parent, check=True, timeout=30)
    until(lambda: not Path(f"/proc/{number}").exists() or "(zombie)" in Path(f"/proc/{number}/status").read_text())
    assert (worker / "train.log").read_text() == "1|train|my recipe.py|--mesh.fsdp|16|name=it's|\nsaved\n"


def test_in_a_container_sigterm_reaches_the_run(nothing, worker):
    command = command_of(dry("gke_xpk.sh", "create", "w", *PLACE, *WORKLOAD, *RUN, env=nothing))
    # as xpk starts it, and as it hands SIGTERM on
    around = f"({command}) & while [ ! -e ready ]; do sleep 0.02; done; kill -TERM $!; wait $!"
    env = os.environ | {"PATH": f"{worker / '.venv' / 'bin'}:{os.environ['PATH']}", "A": "1"}
    done = subprocess.run(["bash", "-c", around], cwd=worker, env=env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (75, "1|train|my recipe.py|--mesh.fsdp|16|name=it's|\nsaved\n")


@pytest.mark.parametrize(
    ("ends", "times", "status", "runs"),
    [
        ([75, 134, 0], 5, 0, 3),
        ([0], 5, 0, 1),
        ([2], 5, 2, 1),
        ([75, 75, 75, 75], 2, 75, 3),
        ([75], 0, 75, 1),
        ([75, 1], 5, 1, 2),
    ],
)
def test_a_run_that_can_go_on_is_started_again(ends, times, status, runs, pretended, tmp_path):
    env, calls = pretended
    left = tmp_path / "ends"
    left.write_text("".join(f"{end}\n" for end in ends))
    each = 'echo run; read -r end < "$0"; sed -i 1d "$0"; exit "$end"'
    done = launch("restart.sh", str(times), "bash", "-c", each, str(left), env=env)
    assert (done.returncode, done.stdout) == (status, "run\n" * runs)
    assert calls() == [["sleep", "10"]] * (runs - 1)
    assert done.stderr.count("\n") == runs - 1


def test_a_run_that_is_stopped_between_its_starts_stays_stopped(tmp_path):
    process = subprocess.Popen(
        ["bash", str(ROOT / "launch" / "restart.sh"), "5", "bash", "-c", "echo run; exit 75"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr.readline() == "restart.sh: status 75; restart 1 of at most 5\n"
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=8)
    assert (process.returncode, printed) == (75, "run\n")


@pytest.mark.parametrize(
    ("status", "restarts", "queued"), [(75, "0", True), (134, "99", True), (75, "100", False), (2, "0", False)]
)
def test_a_job_that_can_go_on_queues_again(status, restarts, queued, pretended, worker):
    env, calls = pretended
    dcjax = worker / ".venv" / "bin" / "dcjax"
    dcjax.write_text(f'#!/bin/bash\necho "$JAX_LOCAL_DEVICE_IDS"\nexit {status}\n')
    job = {"SLURM_JOB_ID": "31", "SLURM_RESTART_COUNT": restarts, "SLURM_GPUS_ON_NODE": "4"}
    done = launch("slurm.sbatch", *TRAIN, env=env | job, cwd=worker)
    assert (done.returncode, done.stdout, done.stderr) == (status, "0,1,2,3\n", "")
    assert calls()[1:] == [["scontrol", "requeue", "31"]] * queued
    assert calls()[0] == shlex.split(DRY_RUNS["a job"][1].splitlines()[0])


def test_the_scripts_pass_shellcheck():
    scripts = sorted(
        str(path.relative_to(ROOT)) for pattern in ("*.sh", "*.sbatch") for path in ROOT.glob(f"launch/{pattern}")
    )
    assert len(scripts) == 5
    done = subprocess.run(
        [TOOLS / "shellcheck", "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_container_file_passes_hadolint():
    done = subprocess.run([TOOLS / "hadolint", "launch/Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
