"""Which runs a study still needs: pure functions of the study and of what there is already."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from dcjax.tools.lab.study import Cell, Study, cells_of

Figures = Mapping[str, float]
"""What came of a run, by name."""


def tuning_cells(study: Study, task: str, arm: str) -> list[Cell]:
    """The runs by which an arm's rate is chosen: each rate under each format, on seeds of their own."""
    return [
        Cell(task, seed, arm, format, rate)
        for seed in study.tuning_seeds
        for rate in study.rates_of(arm)
        for format in study.formats
    ]


def tuned_rates(study: Study, done: Mapping[Cell, Figures]) -> dict[tuple[str, str], float]:
    """The rate of each (task, arm) whose tuning runs are all done: the best mean of the metric over formats and seeds.

    Of equal means the lower rate is taken. An arm with one rate needs no tuning.
    """
    chosen = {}
    for task, arm in _task_arms(study):
        rates, cells = sorted(study.rates_of(arm)), tuning_cells(study, task, arm)
        if len(rates) == 1:
            chosen[task, arm] = rates[0]
        elif all(cell in done for cell in cells):
            means = {
                rate: statistics.fmean(done[cell][study.metric] for cell in cells if cell.rate == rate)
                for rate in rates
            }
            chosen[task, arm] = max(rates, key=means.__getitem__)
    return chosen


def needed(study: Study, done: Mapping[Cell, Figures]) -> list[Cell]:
    """The runs of a study as far as they are known, in the order in which they should be made, each once.

    Tuning comes before what depends on it, and claims come in the study's order. Warm starts are made by the runs that
    need them.
    """
    rates = tuned_rates(study, done)
    tuning = (cell for pair in _tuned(study) for cell in tuning_cells(study, *pair))
    judged = (cell for claim in study.claims for cell in cells_of(study, claim, rates))
    return list(dict.fromkeys((*tuning, *judged)))


def waiting(study: Study, done: Mapping[Cell, Figures]) -> list[Cell]:
    """The runs that can be made now and are not done."""
    return [cell for cell in needed(study, done) if cell not in done]


def count_made(study: Study, done: Mapping[Cell, Figures]) -> int:
    """How many of the runs that a study needs are done; a file may hold those of other claims too."""
    return sum(cell in done for cell in needed(study, done))


def total(study: Study) -> int:
    """How many runs there will have been when all are done, without warm starts."""
    first = {(task, arm): study.rates_of(arm)[0] for task, arm in _task_arms(study)}
    judged = {cell for claim in study.claims for cell in cells_of(study, claim, first)}
    return len(judged) + sum(len(tuning_cells(study, *pair)) for pair in _tuned(study))


def _tuned(study: Study) -> list[tuple[str, str]]:
    """(task, arm) of those that have several rates."""
    return [(task, arm) for task, arm in _task_arms(study) if len(study.rates_of(arm)) > 1]


def _task_arms(study: Study) -> list[tuple[str, str]]:
    """(task, arm) of all claims, each once."""
    return list(
        dict.fromkeys(
            (task, arm) for claim in study.claims for task in claim.tasks for pair in claim.pairs for arm in pair
        )
    )
