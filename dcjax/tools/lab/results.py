"""What came of the runs of a study: a line of JSON a run, which is added once and never changed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dcjax.tools.lab.study import Cell, Study

LAST = 10
"""Iterations over which what varies from batch to batch is averaged."""
POINTS = 12
"""Of a curve: each is a mean over as many iterations as the others."""
AT_THE_END = {
    "deployed": "eval/deployed_accuracy",
    "deployed_ema": "eval/deployed_accuracy_ema",
    "training": "eval/training_accuracy",
    "training_ema": "eval/training_accuracy_ema",
}
"""Figures of the last evaluation: accuracies of both policies, with the last weights and with averaged ones."""
RECENT = {
    "reward": "reward",
    "gap": "mismatch/prob_diff_mean",
    "multiplier": "dual/multiplier",
    "length": "response_length",
    "grad_norm": "grad_norm",
}
"""Figures that are averaged over the last iterations, and kept as curves. The gap is |p − q| of a sampled token."""


@dataclass(frozen=True)
class Result:
    """A finished run."""

    cell: Cell
    identity: str
    """What was chosen for it (`Study.identity`)."""
    figures: dict[str, float]
    curves: dict[str, list[float]]
    """By name; `step` holds the iterations. Runs that only tune keep none."""
    made_by: dict[str, Any] = field(default_factory=dict)
    """Versions, commit, seconds, and the digest of the weights that it began with."""


def summarise(lines: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The figures and the curves of a run, of the lines of its metrics.

    Raises:
      KeyError: a figure was not logged.
    """
    steps = [line for line in lines if line["step"] > 0]
    figures = {name: lines[-1][key] for name, key in AT_THE_END.items()}
    figures |= {"start": lines[0][AT_THE_END["deployed"]]}
    figures |= {name: statistics.fmean(line[key] for line in steps[-LAST:]) for name, key in RECENT.items()}
    every = max(1, len(steps) // POINTS)
    groups = [steps[first : first + every] for first in range(0, len(steps), every)]
    curves = {"step": [group[-1]["step"] for group in groups]}
    for name, key in RECENT.items():
        curves[name] = [float(f"{statistics.fmean(line[key] for line in group):.3g}") for group in groups]
    return figures, curves


class Results:
    """The results in a file, to which finished runs are added."""

    def __init__(self, path: Path):
        """Reads the file, if there is one.

        Raises:
          ValueError: a line but the last is damaged; a last one that was cut off is dropped.
        """
        self._path = path
        self._by_identity: dict[str, Result] = {}
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                result = _decode(line)
            except (ValueError, KeyError, TypeError):
                if number < len(lines) or line.endswith("\n"):
                    raise ValueError(f"{path}, line {number} is no result: {line.strip()[:60]!r}") from None
                path.write_text("".join(lines[:-1]), "utf-8")
                break
            self._by_identity[result.identity] = result

    def add(self, result: Result) -> None:
        """Appends a run's result."""
        self._by_identity[result.identity] = result
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result), ensure_ascii=False, separators=(",", ":")) + "\n")

    def of(self, study: Study) -> dict[Cell, dict[str, float]]:
        """The figures of the runs that were made with the study's settings as they are now."""
        return {cell: result.figures for cell, result in self.whole(study).items()}

    def whole(self, study: Study) -> dict[Cell, Result]:
        """The same runs with all that is known of them."""
        known = {task.name for task in study.tasks}, {arm.name for arm in study.arms}
        return {
            result.cell: result
            for result in self._by_identity.values()
            if result.cell.task in known[0]
            and result.cell.arm in known[1]
            and study.identity(result.cell) == result.identity
        }


def _decode(line: str) -> Result:
    fields = json.loads(line)
    return Result(**fields | {"cell": Cell(**fields["cell"])})
