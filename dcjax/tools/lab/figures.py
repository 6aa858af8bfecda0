"""A study's pictures: gains with their intervals, curves of the arms, and what each size of gap costs."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dcjax.reporting.statistics import Difference
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
    """A PNG of the arms that are judged, on a task at their tuned rates: means over seeds.

    A row is a format, a column a quantity.
    """
    judged = {arm for claim in study.claims if claim.verdict for arm in claim.all_arms}
    formats, rates = (study.twin, *study.formats), tuned_rates(study, _figures(made))
    figure = _figure(3.6 * len(RECENT), 2.7 * len(formats))
    grid = figure.subplots(len(formats), len(RECENT), squeeze=False)
    for row, format in zip(grid, formats, strict=True):
        for axes, name in zip(row, RECENT, strict=True):
            axes.set_title(f"{format}: {LABELS[name]}", fontsize=9, loc="left")
            for arm in (arm for arm in study.arms if arm.name in judged):
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


def draw_doses(effects: Sequence[Effect], baseline: str) -> bytes:
    """A PNG of what pays at which gap: each arm's gain from the mismatch against the gap that the baseline has."""
    points: dict[str, dict[str, list[tuple[float, Difference]]]] = {}
    for effect in effects:
        if effect.against == baseline and effect.gap is not None and effect.interaction is not None:
            point = (effect.gap, effect.interaction)
            points.setdefault(effect.arm, {}).setdefault(effect.task, []).append(point)
    gaps = [gap for tasks in points.values() for doses in tasks.values() for gap, _ in doses] or [1.0]
    lowest, highest = max(min(gaps), 1e-7), max(*gaps, 1e-7)
    columns = 4
    rows = max(1, math.ceil(len(points) / columns))
    figure = _figure(3.2 * columns, 2.6 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(points) :]:
        axes.set_visible(False)
    for axes, (arm, tasks) in zip(grid.flat, points.items(), strict=False):
        axes.set(title=arm, xscale="log", xlim=(lowest / 2, highest * 2))
        axes.axhline(0, color="0.5", linewidth=1)
        for task, doses in tasks.items():
            gaps, gains = zip(*sorted(doses, key=lambda dose: dose[0]), strict=True)
            middles, errors = (
                [gain.difference for gain in gains],
                [gain.interval[1] - gain.difference for gain in gains],
            )
            axes.errorbar(gaps, middles, yerr=errors, fmt="o-", ms=4, lw=1, label=task)
        axes.legend(frameon=False, fontsize=7)
    figure.supxlabel(f"{LABELS['gap']} of {baseline}", fontsize=9)
    figure.supylabel("accuracy gained from the mismatch, 95%", fontsize=9)
    return _png(figure)


def draw_noise(study: Study, made: Mapping[Cell, Result]) -> bytes:
    """A PNG of all runs that judge: the gradient norm at the end against the gap, each format in a colour."""
    figure = _figure(6, 4)
    axes = figure.subplots()
    for format in dict.fromkeys(format for claim in study.claims for format in claim.formats):
        runs = [result for cell, result in made.items() if cell.format == format and result.curves]
        points = [(result.figures["grad_norm"], result.figures["gap"]) for result in runs]
        if points:
            axes.scatter(*zip(*points, strict=True), s=10, alpha=0.6, label=format)
            axes.set(xscale="log", yscale="log")
    axes.set(xlabel=LABELS["grad_norm"], ylabel=LABELS["gap"])
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def _figures(made: Mapping[Cell, Result]) -> dict[Cell, dict[str, float]]:
    return {cell: result.figures for cell, result in made.items()}


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _png(figure: Any) -> bytes:
    """The figure in at most 64 colours, which takes a third of the bytes: such files are committed."""
    from PIL import Image

    drawn, stream = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(stream, format="png", optimize=True)
    return stream.getvalue()
