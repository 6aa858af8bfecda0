"""A study's effects as a table in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from dcjax.reporting.statistics import Difference
from dcjax.tools.lab.verdicts import Effect

HEADER = (
    "claim",
    "task",
    "format",
    "arm",
    "against",
    "n",
    "arm's",
    "gain",
    "without mismatch",
    "from mismatch",
    "verdict",
)


def render(effects: Sequence[Effect]) -> str:
    """A row an effect: the means of paired differences with their 95% intervals, and Holm's p-values."""
    rows = [_line(HEADER), _line(["---"] * len(HEADER))]
    for effect in effects:
        cells = [effect.claim, effect.task, effect.format, effect.arm, effect.against, str(effect.seeds)]
        cells += [_number(effect.mean).removeprefix("+"), _cell(effect.gain, p=True), _cell(effect.twin)]
        rows.append(_line([*cells, _cell(effect.interaction, p=True), effect.verdict]))
    return "\n".join(rows)


def _cell(difference: Difference | None, *, p: bool = False) -> str:
    if difference is None:
        return ""
    lower, upper = difference.interval
    shown = f"{_number(difference.difference)} [{_number(lower)}, {_number(upper)}]"
    return f"{shown}, p {difference.p_value:.3f}" if p else shown


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}".replace("0.", ".", 1)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
