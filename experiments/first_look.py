"""This year's methods against the mismatch beside each other on the quickstart's task: a first look, no verdicts.

    python experiments/first_look.py [--seeds 3] [--steps 100] [--out DIR]

Rollouts at int4, learning rate 6e-4 with linear decay, GRPO's advantages without a penalty, and each method with its
source's bound. All begin with the weights of one warm start. Two runs at a time; the same line goes on with what a
stopped one has left. Prints, for each method, the means over seeds and each seed of the deployed policy's accuracy,
last and of averaged weights, of the training policy's, and δ̄ over the last ten iterations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dcjax.rl.presets import METHODS

ARMS = {"grpo": [], **{name: [f"objective.method={name}"] for name in METHODS}, "vcpo": ["optimizer.ess_base=1.0"]}
"""The name of each run, and what it overrides."""
COMMON = (
    *("objective.algorithm=grpo", "serving.format=int4", "optimizer.learning_rate=6e-4", "optimizer.decay=linear"),
    *("optimizer.ema_decay=0.97", "warm_start.steps=0", "evaluation.every=1000", "evaluation.prompts=1024"),
    *("checkpoint.every=1000", "checkpoint.keep=1"),
)
COLUMNS = {
    "deployed": "eval/deployed_accuracy",
    "averaged": "eval/deployed_accuracy_ema",
    "training": "eval/training_accuracy",
    "averaged training": "eval/training_accuracy_ema",
}
"""What is printed of a run's last line of metrics."""
LAST = 10
"""Iterations over which δ̄ is averaged."""


def dcjax(*arguments: str) -> None:
    """Runs a command; ends with its error where it fails."""
    done = subprocess.run([sys.executable, "-m", "dcjax", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"dcjax {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")


def warm_start(out: Path) -> Path:
    """A folder with the weights that all runs begin with."""
    folder = out / "start"
    if not folder.exists():
        dcjax("train", "quickstart", f"run_dir={out / 'warm_start'}", "steps=1", "optimizer.learning_rate=0")
        dcjax("convert", "export", str(out / "warm_start"), str(folder))
    return folder


def run(out: Path, start: Path, arm: str, seed: int, steps: int) -> dict[str, float]:
    """What became of one run, which is trained unless it is whole."""
    directory = out / f"{arm}_{seed}"
    settings = [f"run_dir={directory}", f"pretrained={start}", f"seed={seed}", f"steps={steps}", *COMMON, *ARMS[arm]]
    dcjax("train", "quickstart", *settings)
    lines: list[dict[str, Any]] = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    gap = statistics.fmean(line["dual/discrepancy"] for line in lines[-LAST:])
    print(f"{arm}, seed {seed}: {lines[-1][COLUMNS['deployed']]:.3f}", file=sys.stderr, flush=True)
    return {column: lines[-1][name] for column, name in COLUMNS.items()} | {"δ̄": gap}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """A row for each method: means, and behind the deployed accuracy each seed's."""
    columns = [*COLUMNS, "δ̄"]
    rows = ["| method | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for arm, runs in results.items():
        cells = [f"{statistics.fmean(one[column] for one in runs):.4f}".removeprefix("0") for column in columns]
        cells[0] += " (" + " ".join(f"{one['deployed']:.3f}".removeprefix("0") for one in runs) + ")"
        rows.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """Runs all of them, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of each method (default: 3)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="RL iterations (default: 100)")
    parser.add_argument("--out", type=Path, default=Path("runs/first_look"), metavar="DIR", help="of the runs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    start = warm_start(options.out)
    with ThreadPoolExecutor(max_workers=2) as pool:
        # a seed of every method before the next one
        waiting = {
            (arm, seed): pool.submit(run, options.out, start, arm, seed, options.steps)
            for seed in range(options.seeds)
            for arm in ARMS
        }
        results = {arm: [waiting[arm, seed].result() for seed in range(options.seeds)] for arm in ARMS}
    print(table(results))


if __name__ == "__main__":
    main()
