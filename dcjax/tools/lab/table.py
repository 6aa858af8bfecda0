"""A study's effects as a table in Markdown."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dcjax.reporting.statistics import Difference
from dcjax.tools.lab.results import AT_THE_END
from dcjax.tools.lab.study import Study
from dcjax.tools.lab.verdicts import Candidate, Effect

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
    return [_row(effect, 3 if effect.metric in AT_THE_END else 5) for effect in effects]


def _row(effect: Effect, decimals: int) -> list[str]:
    return [
        *(effect.claim, effect.task, effect.format, effect.arm, effect.against, str(effect.seeds)),
        *(_number(effect.mean, decimals).removeprefix("+"), _cell(effect.gain, decimals, p=True)),
        *(_cell(effect.twin, decimals), _cell(effect.interaction, decimals, p=True), effect.verdict),
    ]


@dataclass(frozen=True)
class Summary:
    """What is known of the claims that have one key."""

    key: str
    hypothesis: str
    verdicts: str
    """How often there is each of them."""
    seeds: int
    """Those that every effect has."""
    full: tuple[str, ...]
    """The same question at full scale."""


def summaries_of(study: Study, effects: Sequence[Effect]) -> list[Summary]:
    """A summary a key, in the study's order."""
    found = []
    for key, group in itertools.groupby(study.claims, key=lambda claim: claim.key):
        claims, of_key = list(group), [effect for effect in effects if effect.claim == key]
        counts = Counter(effect.verdict for effect in of_key)
        found.append(
            Summary(
                key,
                hypothesis=" ".join(claim.hypothesis for claim in claims),
                verdicts=", ".join(f"{verdict} {count}" for verdict, count in counts.items()),
                seeds=min(effect.seeds for effect in of_key),
                full=tuple(dict.fromkeys(line for claim in claims for line in claim.full)),
            )
        )
    return found


def render_summary(study: Study, effects: Sequence[Effect], command: str) -> str:
    """A table in Markdown, a row a claim: what it says, its verdicts, and the command that makes its runs."""
    lines = [_line(("claim", "hypothesis", "verdicts", "n", "command")), _line(["---"] * 5)]
    for each in summaries_of(study, effects):
        made = f"`{command} --claims {each.key}`"
        lines.append(_line((each.key, each.hypothesis, each.verdicts, str(each.seeds), made)))
    return "\n".join(lines)


def render_candidates(found: Sequence[Candidate], margin: float) -> str:
    """A table in Markdown of the arms that are judged, and a sentence on those that win."""
    heads = ("arm", "pays at (task, format)", "of", "lost without a mismatch")
    rows = [(each.arm, str(each.pays), str(each.of), _number(each.lost)) for each in found]
    winners = [each.arm for each in found if each.wins(margin)]
    told = f"Settings that pay everywhere and lose at most {margin:g}: {', '.join(winners) or 'none'}."
    return "\n".join([_line(heads), _line(["---"] * len(heads)), *map(_line, rows), "", told])


def _cell(difference: Difference | None, decimals: int, *, p: bool = False) -> str:
    if difference is None:
        return ""
    middle, lower, upper = (_number(value, decimals) for value in (difference.difference, *difference.interval))
    shown = f"{middle} [{lower}, {upper}]"
    return f"{shown}, p {difference.p_value:.3f}" if p else shown


def _number(value: float | None, decimals: int = 3) -> str:
    return "" if value is None else f"{value:+.{decimals}f}".replace("0.", ".", 1)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
