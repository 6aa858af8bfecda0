"""What follows from a study's results: paired differences, their differences from the twins, and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from dcjax.reporting.statistics import Difference, holm, paired_t
from dcjax.tools.lab.schedule import Figures, tuned_rates
from dcjax.tools.lab.study import Cell, Claim, Study

Verdict = Literal["reproduces", "does not", "inconclusive", "no verdict", "not run"]


@dataclass(frozen=True)
class Effect:
    """How one arm differs from another on one task at one format."""

    claim: str
    task: str
    format: str
    arm: str
    against: str
    seeds: int = 0
    """How many seeds both arms were run with, at the format and at its twin."""
    metric: str = ""
    """The figure whose differences these are."""
    mean: float | None = None
    """Of the metric, of the arm."""
    gap: float | None = None
    """Of a token, of the other arm: the dose that the arm answers."""
    gain: Difference | None = None
    """The metric of the arm less that of the other, in pairs of equal seeds; p-values are Holm's within the claim."""
    twin: Difference | None = None
    """The same without a mismatch."""
    interaction: Difference | None = None
    """The gain less the twin's: what is gained from the mismatch. p-values are Holm's within the claim."""
    verdict: Verdict = "not run"


def effects_of(study: Study, done: Mapping[Cell, Figures], *, figure: str | None = None) -> list[Effect]:
    """The effects of all claims, with verdicts; with another figure than the study's metric, without.

    A claim with verdicts is judged once all of its runs are made. It *reproduces* on a task at a format if both
    the gain and the interaction are above zero, Holm-adjusted over all tests of the claim at .05. It *does not* if the
    95% interval of either lies below the study's margin, so that a gain that matters is excluded. Otherwise it is
    inconclusive.
    """
    measured = Measured(study, done, tuned_rates(study, done), figure)
    return [
        effect
        for claim in study.claims
        for effect in _judge(measured, claim, _measure(measured, claim), verdicts=claim.verdict and figure is None)
    ]


@dataclass(frozen=True)
class Measured:
    """What effects are taken from."""

    study: Study
    done: Mapping[Cell, Figures]
    rates: Mapping[tuple[str, str], float]
    figure: str | None
    """None for what each claim is about."""


def _measure(measured: Measured, claim: Claim) -> list[Effect]:
    """The effects of a claim, with p-values of each test alone."""
    return [
        _effect(measured, claim, Effect(claim.key, task, format, *pair))
        for task in claim.tasks
        for format in claim.formats
        for pair in claim.pairs
    ]


def _effect(measured: Measured, claim: Claim, effect: Effect) -> Effect:
    """An effect with its numbers, as far as there are runs."""
    pairs = _paired(measured, claim, effect)
    name = measured.figure or claim.metric or measured.study.metric
    effect = replace(effect, seeds=len(pairs), metric=name)
    if len(pairs) < 2:
        return effect
    ours, theirs, ours_twin, theirs_twin = ([each[name] for each in column] for column in zip(*pairs, strict=True))
    gains = [a - b for a, b in zip(ours, theirs, strict=True)]
    twins = [a - b for a, b in zip(ours_twin, theirs_twin, strict=True)]
    return replace(
        effect,
        mean=fmean(ours),
        gap=fmean(other["gap"] for _, other, *_ in pairs),
        gain=paired_t(gains),
        twin=paired_t(twins),
        interaction=paired_t([a - b for a, b in zip(gains, twins, strict=True)]),
    )


def _paired(measured: Measured, claim: Claim, effect: Effect) -> list[tuple[Figures, ...]]:
    """The figures of (arm, other) at the format and at the twin, for each seed that has all four."""
    names = (effect.arm, effect.against)
    rates = [claim.rate or measured.rates.get((effect.task, name)) for name in names]
    rows = []
    for seed in measured.study.seeds_of(claim):
        cells = [
            Cell(effect.task, seed, name, format, rate)
            for format in (effect.format, measured.study.twin)
            for name, rate in zip(names, rates, strict=True)
        ]
        if all(cell in measured.done for cell in cells):
            rows.append(tuple(measured.done[cell] for cell in cells))
    return rows


def _judge(measured: Measured, claim: Claim, effects: Sequence[Effect], *, verdicts: bool) -> list[Effect]:
    """The effects with Holm's p-values, and verdicts where all runs of the claim are made."""
    tests = [test for effect in effects for test in (effect.gain, effect.interaction) if test is not None]
    adjusted = iter(holm([test.p_value for test in tests]))
    seeds = len(measured.study.seeds_of(claim))
    whole = verdicts and all(effect.seeds == seeds for effect in effects)
    judged = []
    for effect in effects:
        if effect.gain is None or effect.interaction is None:
            judged.append(effect)
            continue
        gain = replace(effect.gain, p_value=next(adjusted))
        interaction = replace(effect.interaction, p_value=next(adjusted))
        verdict = _verdict((gain, interaction), measured.study.margin) if whole else "no verdict"
        judged.append(replace(effect, gain=gain, interaction=interaction, verdict=verdict))
    return judged


def _verdict(tests: Sequence[Difference], margin: float) -> Verdict:
    if all(test.difference > 0 and test.p_value < 0.05 for test in tests):
        return "reproduces"
    if any(test.interval[1] < margin for test in tests):
        return "does not"
    return "inconclusive"


@dataclass(frozen=True)
class Candidate:
    """An arm that is judged against the baseline, and whether it pays wherever there is a mismatch."""

    arm: str
    pays: int
    """At how many tasks and formats the intervals of both the gain and the interaction lie above zero."""
    of: int
    """How many there are."""
    lost: float
    """The mean loss of the metric without a mismatch, on the task where it is largest; below zero it is a gain."""

    def wins(self, margin: float) -> bool:
        """Whether it pays everywhere, and loses at most the margin where there is no mismatch."""
        return self.pays == self.of and self.lost <= margin


def candidates(effects: Sequence[Effect], baseline: str) -> list[Candidate]:
    """The arms with verdicts against the baseline, as far as all of their runs are made."""
    judged: dict[str, list[Effect]] = {}
    for effect in effects:
        if effect.against == baseline and effect.verdict not in ("no verdict", "not run"):
            judged.setdefault(effect.arm, []).append(effect)
    return [
        Candidate(
            arm,
            pays=sum(all(test.interval[0] > 0 for test in (each.gain, each.interaction) if test) for each in of_arm),
            of=len(of_arm),
            lost=max(-each.twin.difference for each in of_arm if each.twin),
        )
        for arm, of_arm in judged.items()
    ]
