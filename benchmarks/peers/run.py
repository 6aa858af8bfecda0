"""CPU-seconds of rollout and RL step on the same work: dcjax, tunix, TRL, Hugging Face `generate`, plain JAX.

    python benchmarks/peers/run.py [--ragged] [--rounds N] [--peers NAME ...] [--environments DIR] [--json PATH]

The work is in work.py and model.py, each peer's settings in its own file. Every peer is a process of its own: dcjax and
plain JAX in the interpreter that runs this, the others in virtual environments that are made here from the pinned
requirements beside this file (of torch, pip's own settings decide which build; one for CPUs is enough). All peers are
held in memory and do one round in turn, in an order that turns from round to round, so that what the machine does
beside hits all of them alike.

With --ragged, the responses have lengths from 1 to 64 tokens, drawn once from a lognormal, the same in all peers and
rounds; each peer then has what it offers against padding, which its file says. dcjax runs a second time beside them
with 64 tokens in each response, to compare what a token costs in an update: a token of a response, and a token of any
kind, where a prompt counts once and without its last one, as far as an update needs it.

First all are kept to one core, with one thread each, and CPU-seconds are compared: a ratio is theirs over dcjax's, by
the minimum over rounds, which is the least disturbed. Then fresh processes have two cores, for wall times. dcjax and
plain JAX both call `dcjax.allocator.keep_freed_memory`, as dcjax's command line does.

Before a figure counts, a peer has shown that it has the same model (parameters, logits to 1e-4), in each round that it
sampled and trained on 128 responses of the lengths asked for, other ones than the round before, and at the end that its
parameters moved.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import model  # pyrefly: ignore[missing-import]
import numpy as np
import work  # pyrefly: ignore[missing-import]

HERE = Path(__file__).parent
OURS, PLAIN = "dcjax", "plain_jax"
PEERS = {
    OURS: "dcjax_peer.py",
    PLAIN: "plain_peer.py",
    "tunix": "tunix_peer.py",
    "trl": "trl_peer.py",
    "transformers": "transformers_peer.py",
}
"""What each peer runs; those with a file NAME.txt have an environment of their own."""
FIXED = f"{OURS}, {work.RESPONSE_LENGTH} tokens"
"""dcjax with responses that are not ragged, beside those that are."""
ROLLOUT_ONLY = ("transformers",)
WARM_UP = 3
"""Rounds that are not counted: programs are compiled, caches filled."""
SMALLEST_SHARE_MOVED = 0.99
"""Of all parameters, over a run's updates."""

Times = dict[str, np.ndarray]
"""By program, "rollout" and "step": CPU-seconds and seconds of each round, [rounds, 2]."""


# --- processes ---


def make_environment(name: str, folder: Path) -> Path:
    """The interpreter of a peer's environment, which is made where it is not there yet."""
    home, requirements = folder / name, HERE / f"{name}.txt"
    python, done = home / "bin" / "python", home / requirements.name
    if done.exists() and done.read_text() == requirements.read_text():
        return python
    print(f"peers: making {home}", file=sys.stderr)
    shutil.rmtree(home, ignore_errors=True)
    if uv := shutil.which("uv"):
        making = [[uv, "venv", "-q", "--python", sys.executable, home]]
        # as pip does by itself; a build for CPUs that lies there goes before the registry's
        links = os.environ.get("PIP_FIND_LINKS", "").split()
        options = [option for link in links for option in ("--find-links", link)]
        making.append([uv, "pip", "install", "-q", "--python", python, *options, "-r", requirements])
    else:
        making = [[sys.executable, "-m", "venv", home], [python, "-m", "pip", "install", "-q", "-r", requirements]]
    for command in making:
        subprocess.run(command, check=True)
    shutil.copy(requirements, done)
    return python


@dataclass(frozen=True)
class Program:
    """What a process runs, and the folder of its work."""

    script: str
    python: Path
    data: Path


@dataclass(frozen=True)
class Peer:
    """A process that does a round whenever it is asked."""

    name: str
    process: subprocess.Popen
    log: Path
    about: dict[str, Any]

    @classmethod
    def start(cls, name: str, program: Program, cores: Sequence[int]) -> Peer:
        """Starts it on some cores, which are its number of threads too, and waits until it is loaded."""
        environment = os.environ | {"OMP_NUM_THREADS": str(len(cores)), "TOKENIZERS_PARALLELISM": "false"}
        os.sched_setaffinity(0, cores)  # a process inherits it
        log = program.data / f"{name}.{len(cores)}.log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                [program.python, HERE / program.script, program.data],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        return cls(name, process, log, _answer(name, process, log))

    def ask(self, command: str) -> dict[str, Any]:
        """Its answer to a line."""
        assert self.process.stdin is not None
        print(command, file=self.process.stdin, flush=True)
        return _answer(self.name, self.process, self.log)

    def stop(self) -> None:
        """Ends it, whatever threads its library holds."""
        self.process.kill()
        self.process.wait()


def _answer(name: str, process: subprocess.Popen, log: Path) -> dict[str, Any]:
    assert process.stdout is not None
    if not (line := process.stdout.readline()):
        process.wait()
        last = "\n".join(log.read_text().splitlines()[-20:])
        raise SystemExit(f"peers: {name} ended with status {process.returncode}:\n{last}")
    return json.loads(line)


# --- measurement ---


def measure(programs: Mapping[str, Program], cores: Sequence[int], rounds: int) -> tuple[dict[str, Times], dict]:
    """Times of each peer, and what each says about itself."""
    peers, rows = [], {name: [] for name in programs}
    try:
        for name, program in programs.items():
            peers.append(Peer.start(name, program, cores))
            for _ in range(WARM_UP):
                peers[-1].ask("round")
        for number in range(rounds):
            shift = number // 2 % len(peers)
            for peer in (peers[shift:] + peers[:shift])[:: -1 if number % 2 else 1]:
                rows[peer.name].append(peer.ask("round"))
            print(f"\rpeers: {len(cores)} core{'s'[: len(cores) - 1]}, round {number + 1}", end="", file=sys.stderr)
        print(file=sys.stderr)
        about = {peer.name: peer.about | peer.ask("end") for peer in peers}
    finally:
        for peer in peers:
            peer.stop()
    for name, said in about.items():
        _check(name, said)
    times = {
        name: {program: np.array([row[program] for row in measured]) for program in _programs(name)}
        for name, measured in rows.items()
    }
    return times, about


def _programs(name: str) -> tuple[str, ...]:
    return ("rollout",) if name in ROLLOUT_ONLY else ("rollout", "step")


def _check(name: str, about: Mapping[str, Any]) -> None:
    if (count := about["parameters"]) != (expected := model.PARAMETERS):
        raise SystemExit(f"peers: {name} has {count} parameters, not {expected}")
    if name not in ROLLOUT_ONLY and not about["moved"] >= SMALLEST_SHARE_MOVED:
        raise SystemExit(f"peers: of {name}'s parameters only {about['moved']:.1%} moved")


# --- figures ---


def figures(times: Mapping[str, Times], clock: int) -> dict[str, dict[str, dict[str, float]]]:
    """Minimum and median over rounds (seconds) of each peer's programs; the update is a step less its rollout."""

    def summary(seconds: np.ndarray) -> dict[str, float]:
        return {"minimum": round(float(seconds.min()), 4), "median": round(float(np.median(seconds)), 4)}

    shown = {}
    for name, programs in times.items():
        seconds = {program: rows[:, clock] for program, rows in programs.items()}
        if "step" in seconds:
            seconds["update"] = seconds["step"] - seconds["rollout"]
        shown[name] = {program: summary(values) for program, values in seconds.items()}
    return shown


def token_costs(
    times: Mapping[str, dict[str, dict[str, float]]], lengths: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Microseconds of each peer's update, by the minimum over rounds, for each token of its responses."""
    return {
        name: round(programs["update"]["minimum"] * 1e6 / int(lengths[name].sum()), 2)
        for name, programs in times.items()
        if "update" in programs
    }


def ratios(cpu: Mapping[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Others' CPU-seconds over dcjax's, of those peers that ran: above 1, dcjax is the faster."""

    def over_ours(program: str, names: Sequence[str]) -> float:
        best = min(cpu[name][program]["minimum"] for name in names)
        return round(best / cpu[OURS][program]["minimum"], 3)

    found = {}
    for program in ("rollout", "step"):
        libraries = [name for name in cpu if name not in (OURS, FIXED, PLAIN) and program in _programs(name)]
        if libraries:
            found[f"{program}_vs_best_peer"] = over_ours(program, libraries)
        if PLAIN in cpu:
            found[f"{program}_vs_plain_jax"] = over_ours(program, [PLAIN])
    return found


def machine() -> dict[str, Any]:
    """The processor, without names that only this machine has."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {"cpu": models[0], "cores": len(models), "system": platform.system(), "python": platform.python_version()}


def table(
    cpu: Mapping[str, dict], wall: Mapping[str, dict], costs: Mapping[str, float], found: Mapping[str, float]
) -> str:
    """The figures as lines of text."""
    lines = [f"{'':17s}{'CPU-seconds, one core: minimum (median)':>57s}{'seconds, two cores':>30s}"]
    columns = ("rollout", "update", "step")
    lines.append(f"{'':17s}" + "".join(f"{name:>19s}" for name in columns) + "".join(f"{n:>10s}" for n in columns))
    lines[-1] += "   update, CPU-µs a token"
    for name in cpu:
        cells = [cpu[name].get(column) for column in columns]
        shown = [f"{cell['minimum']:.3f} ({cell['median']:.3f})" if cell else "" for cell in cells]
        walls = [wall[name].get(column) for column in columns]
        beside = [f"{cell['minimum']:.3f}" if cell else "" for cell in walls]
        lines.append(f"{name:17s}" + "".join(f"{s:>19s}" for s in shown) + "".join(f"{s:>10s}" for s in beside))
        lines[-1] += f"{costs[name]:>12.1f}" if name in costs else ""
    return "\n".join([*lines, *(f"{name}: {value}" for name, value in found.items())])


def prepare(lengths: Mapping[str, np.ndarray], environments: Path, folder: Path) -> dict[str, Program]:
    """What each peer runs on responses of these lengths; the data are written below a folder."""
    programs = {}
    for name, asked in lengths.items():
        script = PEERS[OURS if name == FIXED else name]
        data = folder / ("fixed" if name == FIXED else "asked")
        if not data.exists():
            data.mkdir()
            model.write(data, asked)
        own = (HERE / f"{name}.txt").exists()
        programs[name] = Program(script, make_environment(name, environments) if own else Path(sys.executable), data)
    return programs


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ragged", action="store_true", help="responses of many lengths, instead of 64 tokens each")
    add("--rounds", type=int, default=15, help="rounds of each peer, on one core and on two (default: 15)")
    add("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME", help="of: " + ", ".join(PEERS))
    where = HERE / "environments"
    add("--environments", type=Path, default=where, metavar="DIR", help="where environments are made and kept")
    results = "where the figures go (default: peers.json, or peers_ragged.json, in benchmarks/results)"
    add("--json", type=Path, metavar="PATH", help=results)
    return parser.parse_args()


def main() -> None:
    """Measures, prints and writes."""
    args = parse()
    if OURS not in args.peers:
        sys.exit(f"peers: {OURS} is not among --peers; every ratio is to its figures")
    fixed = np.full(work.ROWS, work.RESPONSE_LENGTH, np.int32)
    asked = model.draw_lengths(work.ROWS, limit=work.RESPONSE_LENGTH) if args.ragged else fixed
    lengths = dict.fromkeys(args.peers, asked) | ({FIXED: fixed} if args.ragged else {})
    available = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        programs = prepare(lengths, args.environments, Path(folder))
        one, about = measure(programs, available[:1], args.rounds)
        two, _ = measure(programs, available[:2], args.rounds)
    cpu, wall = figures(one, 0), figures(two, 1)
    costs, found = token_costs(cpu, lengths), ratios(cpu)
    if args.ragged:
        found["update_per_response_token_vs_fixed_lengths"] = round(costs[OURS] / costs[FIXED], 3)
        prompts = work.PROMPTS * (work.PROMPT_LENGTH - 1)
        shares = {name: lengths[name].sum() / (lengths[name].sum() + prompts) for name in (OURS, FIXED)}
        per_token = costs[OURS] * shares[OURS] / (costs[FIXED] * shares[FIXED])
        found["update_per_token_vs_fixed_lengths"] = round(float(per_token), 3)
    print(table(cpu, wall, costs, found))
    report = {
        **found,
        "lengths": {"smallest": int(asked.min()), "mean": round(float(asked.mean()), 2), "largest": int(asked.max())},
        "cpu_seconds_one_core": cpu,
        "cpu_microseconds_of_update_per_response_token": costs,
        "seconds_two_cores": wall,
        "rounds": args.rounds,
        "about": about,
        "machine": machine(),
    }
    path = args.json or HERE.parent / "results" / ("peers_ragged.json" if args.ragged else "peers.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
