"""This year's answers to the mismatch beside each other on the quickstart's task: first looks, no verdicts.

    python experiments/first_look.py {methods,distributions} [--seeds 3] [--steps 100] [--workers 2] [--out DIR]

`methods` are others' answers, each with its source's bound, at int4 with linear decay; `distributions` are those that
read the sampler's whole distributions or train in its format, at int4 and fp8, with a constant and a linear rate. The
learning rate is 6e-4 and advantages are GRPO's; where λ ascends, the budget is the quickstart's. All runs begin with
the weights of one warm start. The same line goes on with what a stopped one has left. Prints, for each, the means over
seeds and each seed of the deployed policy's accuracy, last and of averaged weights, of the training policy's, and δ̄
and λ over the last ten iterations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from dcjax.rl.presets import METHODS


class Study(NamedTuple):
    """Arms under conditions: the name of each, and what it overrides."""

    arms: dict[str, list[str]]
    conditions: dict[str, list[str]]


GRPO, FIXED = "objective.algorithm=grpo", ["objective.algorithm=dual_grpo", "objective.initial_multiplier=0.3"]
CENTRED, SCORE = "objective.penalty_form=state_centred", "objective.score_centering=true"
DIRECT = ["objective.algorithm=dc_direct"]
IN_FORMAT = "serving.in_training=weights"
STUDIES = {
    "methods": Study(
        {
            "grpo": [GRPO],
            **{name: [GRPO, f"objective.method={name}"] for name in METHODS},
            "vcpo": [GRPO, "optimizer.ess_base=1.0"],
        },
        {"int4, linear": ["serving.format=int4", "optimizer.decay=linear"]},
    ),
    "distributions": Study(
        {
            "grpo": [GRPO, "objective.distribution_metrics=true"],
            "dc, fixed": FIXED,
            "dc, ascent": ["objective.algorithm=dc_grpo"],
            "centred": [*FIXED, CENTRED],
            "score": [GRPO, SCORE],
            "centred, score": [*FIXED, CENTRED, SCORE],
            "direct": DIRECT,
            "direct, tv": [*DIRECT, "objective.signal=total_variation"],
            "in format": [GRPO, IN_FORMAT],
            "in format, centred": [*FIXED, CENTRED, IN_FORMAT],
        },
        {
            f"{format}, {decay}": [f"serving.format={format}", f"optimizer.decay={setting}"]
            for format in ("int4", "fp8")
            for decay, setting in (("linear", "linear"), ("constant", "constant"))
        },
    ),
}
COMMON = (
    *("optimizer.learning_rate=6e-4", "optimizer.ema_decay=0.97", "warm_start.steps=0", "evaluation.every=1000"),
    *("evaluation.prompts=1024", "checkpoint.every=1000", "checkpoint.keep=1"),
)
COLUMNS = {
    "deployed": "eval/deployed_accuracy",
    "averaged": "eval/deployed_accuracy_ema",
    "training": "eval/training_accuracy",
    "averaged training": "eval/training_accuracy_ema",
}
"""What is printed of a run's last line of metrics."""
RECENT = {"δ̄": "mismatch/prob_diff_mean", "λ": "dual/multiplier"}
"""What is averaged over the last iterations. δ̄ is of the sampled token's probabilities, whatever the objective's is."""
LAST = 10
"""Iterations over which that is averaged."""


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


def run(directory: Path, start: Path, seed: int, steps: int, settings: list[str]) -> dict[str, float]:
    """What became of one run, which is trained unless it is whole."""
    common = [f"run_dir={directory}", f"pretrained={start}", f"seed={seed}", f"steps={steps}", *COMMON]
    if not (directory / "report.html").exists():
        dcjax("train", "quickstart", *common, *settings)
    lines: list[dict[str, Any]] = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    recent = {column: statistics.fmean(line[name] for line in lines[-LAST:]) for column, name in RECENT.items()}
    print(f"{directory.name}: {lines[-1][COLUMNS['deployed']]:.3f}", file=sys.stderr, flush=True)
    return {column: lines[-1][name] for column, name in COLUMNS.items()} | recent


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """A row for each arm: means, and behind the deployed accuracy each seed's."""
    columns = [*COLUMNS, *RECENT]
    rows = ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for arm, runs in results.items():
        cells = [f"{statistics.fmean(one[column] for one in runs):.4f}".removeprefix("0") for column in columns]
        cells[0] += " (" + " ".join(f"{one['deployed']:.3f}".removeprefix("0") for one in runs) + ")"
        rows.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """Runs all of a study, and prints a table for each condition."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(STUDIES), help="what is compared")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of each arm (default: 3)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="RL iterations (default: 100)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="runs at a time (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/first_look"), metavar="DIR", help="of the runs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    start, study = warm_start(options.out), STUDIES[options.study]
    # a seed of every arm before the next one
    runs = [(seed, where, arm) for seed in range(options.seeds) for where in study.conditions for arm in study.arms]
    with ThreadPoolExecutor(max_workers=options.workers) as pool:
        waiting = {
            (seed, where, arm): pool.submit(
                run,
                options.out / f"{where}, {arm}, {seed}".replace(", ", "_").replace(" ", "_"),
                start,
                seed,
                options.steps,
                study.conditions[where] + study.arms[arm],
            )
            for seed, where, arm in runs
        }
        finished = {key: future.result() for key, future in waiting.items()}
    for where in study.conditions:
        print(f"{where}\n")
        print(table({arm: [finished[seed, where, arm] for seed in range(options.seeds)] for arm in study.arms}) + "\n")


if __name__ == "__main__":
    main()
