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
    """The table, a row an effect."""
    return "\n".join(_line(cells) for cells in (HEADER, ["---"] * len(HEADER), *rows_of(effects)))


def rows_of(effects: Sequence[Effect]) -> list[list[str]]:
    """The cells of each effect: means of paired differences with their 95% intervals, and Holm's p-values."""
    return [
        [
            *(effect.claim, effect.task, effect.format, effect.arm, effect.against, str(effect.seeds)),
            *(_number(effect.mean).removeprefix("+"), _cell(effect.gain, p=True), _cell(effect.twin)),
            *(_cell(effect.interaction, p=True), effect.verdict),
        ]
        for effect in effects
    ]


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
