"""A study's pictures: gains with their intervals, curves of the arms, and what each size of gap costs."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dcjax.tools.lab.results import RECENT, Result
from dcjax.tools.lab.schedule import tuned_rates
from dcjax.tools.lab.study import Cell, Study
from dcjax.tools.lab.verdicts import Effect

LABELS = {
    "reward": "mean reward",
    "gap": r"$|p_\mathrm{train} - p_\mathrm{infer}|$ of a token",
    "multiplier": r"$\lambda$",
    "length": "response length (tokens)",
    "grad_norm": "gradient norm",
}
_DPI = 80


def draw_gains(effects: Sequence[Effect]) -> bytes:
    """A PNG with a line an effect: its gain, and what of it comes from the mismatch, with 95% intervals."""
    shown = [effect for effect in effects if effect.gain is not None and effect.interaction is not None]
    figure = _figure(9, 1.2 + 0.34 * len(shown))
    axes = figure.subplots()
    for row, effect in enumerate(shown):
        for test, offset, colour in ((effect.gain, -0.13, "C0"), (effect.interaction, 0.13, "C1")):
            if test is not None:
                (low, high), middle = test.interval, test.difference
                axes.errorbar(middle, row + offset, xerr=[[middle - low], [high - middle]], fmt="o", color=colour, ms=4)
    names = [f"{each.claim}: {each.arm} − {each.against}, {each.task}, {each.format}" for each in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="0.5", linewidth=1)
    axes.set_xlabel("difference of accuracies: gain (blue), gain less that without a mismatch (orange), 95%")
    return _png(figure)


def draw_curves(study: Study, made: Mapping[Cell, Result], task: str) -> bytes:
    """A PNG of all arms on a task at their tuned rates: a row a format, a column a quantity, means over seeds."""
    formats, rates = (study.twin, *study.formats), tuned_rates(study, _figures(made))
    figure = _figure(3.6 * len(RECENT), 2.7 * len(formats))
    grid = figure.subplots(len(formats), len(RECENT), squeeze=False)
    for row, format in zip(grid, formats, strict=True):
        for axes, name in zip(row, RECENT, strict=True):
            axes.set_title(f"{format}: {LABELS[name]}", fontsize=9, loc="left")
            for arm in study.arms:
                runs = [
                    result
                    for cell, result in made.items()
                    if (cell.task, cell.format, cell.arm) == (task, format, arm.name)
                    and cell.rate == rates.get((task, arm.name))
                    and cell.seed not in study.tuning_seeds
                ]
                if runs:
                    columns = zip(*(result.curves[name] for result in runs), strict=True)
                    axes.plot(runs[0].curves["step"], [statistics.fmean(column) for column in columns], label=arm.name)
    handles, names = grid[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return _png(figure)


def draw_doses(study: Study, made: Mapping[Cell, Result], baseline: str) -> bytes:
    """A PNG of what a gap costs: each run of an arm, its gap against how far it ends below its twin."""
    figure = _figure(4.5 * len(study.tasks), 3.6)
    for axes, task in zip(figure.subplots(1, len(study.tasks), squeeze=False)[0], study.tasks, strict=True):
        axes.set_title(f"{task.name}: {baseline}", fontsize=9, loc="left")
        for format in study.formats:
            points = []
            for cell, result in made.items():
                twin = made.get(Cell(cell.task, cell.seed, cell.arm, study.twin, cell.rate))
                if (cell.task, cell.arm, cell.format) == (task.name, baseline, format) and twin is not None:
                    points.append((result.figures["gap"], twin.figures[study.metric] - result.figures[study.metric]))
            if points:
                axes.scatter(*zip(*points, strict=True), label=format, s=14)
                axes.set_xscale("log")
        axes.set(xlabel=LABELS["gap"], ylabel="accuracy lost to the mismatch")
        axes.axhline(0, color="0.5", linewidth=1)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def _figures(made: Mapping[Cell, Result]) -> dict[Cell, dict[str, float]]:
    return {cell: result.figures for cell, result in made.items()}


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
