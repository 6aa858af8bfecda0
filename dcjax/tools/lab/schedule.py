"""Which runs a study still needs: pure functions of the study and of what there is already."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping

from dcjax.tools.lab.study import Cell, Claim, Study, cells_of

Figures = Mapping[str, float]
"""What came of a run, by name."""


def tuning_cells(study: Study, task: str, arm: str) -> list[Cell]:
    """The runs by which an arm's rate is chosen: each rate under each format, on seeds of their own."""
    return [
        Cell(task, seed, arm, format, rate)
        for seed in study.tuning_seeds
        for rate in study.rates
        for format in study.formats
    ]


def tuned_rates(study: Study, done: Mapping[Cell, Figures]) -> dict[tuple[str, str], float]:
    """The rate of each (task, arm) whose tuning runs are all done: the best mean of the metric over formats and seeds.

    Of equal means the lower rate is taken. Where a study has one rate, there is nothing to tune.
    """
    rates = sorted(study.rates)
    if len(rates) == 1:
        return dict.fromkeys(_tuned(study), rates[0])
    chosen = {}
    for task, arm in _tuned(study):
        cells = tuning_cells(study, task, arm)
        if all(cell in done for cell in cells):
            means = {
                rate: statistics.fmean(done[cell][study.metric] for cell in cells if cell.rate == rate)
                for rate in rates
            }
            chosen[task, arm] = max(rates, key=means.__getitem__)
    return chosen


def needed(study: Study, done: Mapping[Cell, Figures]) -> list[Cell]:
    """The runs of a study as far as they are known, in the order in which they should be made, each once.

    Claims come in the study's order, and of each the runs that tune its arms before those that depend on them. Warm
    starts are made by the runs that need them.
    """
    rates = tuned_rates(study, done)
    ordered = (cell for claim in study.claims for cell in (*_tuning(study, claim), *cells_of(study, claim, rates)))
    return list(dict.fromkeys(ordered))


def waiting(study: Study, done: Mapping[Cell, Figures]) -> list[Cell]:
    """The runs that can be made now and are not done."""
    return [cell for cell in needed(study, done) if cell not in done]


def following(study: Study, done: Mapping[Cell, Figures], running: Collection[Cell]) -> Cell | None:
    """The next run to make, or None where all are made or being made.

    It is one that need not wait for a warm start which another run is making, if there is such a run.
    """
    being_started = {cell.start for cell in running} - {cell.start for cell in done}
    cells = (cell for cell in waiting(study, done) if cell not in running)
    return min(cells, key=lambda cell: cell.start in being_started, default=None)


def count_made(study: Study, done: Mapping[Cell, Figures]) -> int:
    """How many of the runs that a study needs are done; a file may hold those of other claims too."""
    return sum(cell in done for cell in needed(study, done))


def total(study: Study) -> int:
    """How many runs there will have been when all are done, without warm starts.

    There will be fewer where a rate that is tuned turns out to be one that a claim gives.
    """
    later = dict.fromkeys(_tuned(study), 0.0)
    return len({cell for claim in study.claims for cell in (*_tuning(study, claim), *cells_of(study, claim, later))})


def _tuning(study: Study, claim: Claim) -> list[Cell]:
    """The runs by which the rates of a claim's arms are chosen."""
    if claim.rate is not None or len(study.rates) == 1:
        return []
    return [cell for task in claim.tasks for arm in claim.all_arms for cell in tuning_cells(study, task, arm)]


def _tuned(study: Study) -> list[tuple[str, str]]:
    """(task, arm) of all claims without a rate of their own, each once."""
    claims = [claim for claim in study.claims if claim.rate is None]
    return list(dict.fromkeys((task, arm) for claim in claims for task in claim.tasks for arm in claim.all_arms))
