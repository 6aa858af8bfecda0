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
from dcjax.tools.lab.study import Cell, Claim, Study
from dcjax.tools.lab.verdicts import Effect

LABELS = {
    "reward": "mean reward",
    "gap": r"$|p_\mathrm{train} - p_\mathrm{infer}|$ of a token",
    "multiplier": r"$\lambda$",
    "length": "response length (tokens)",
    "grad_norm": "gradient norm",
}
_FEWEST_DOSES = 3
_DPI = 80


def draw_gains(effects: Sequence[Effect], margin: float | None) -> bytes:
    """A PNG with a row an arm on a task and a column a format: its gain, and what of it comes from the mismatch.

    Bars are 95% intervals; differences below the margin, which do not matter, lie in the grey band. With no margin
    each column has a linear scale of its own.
    """
    shown = [effect for effect in effects if effect.gain is not None and effect.interaction is not None]
    names = list(dict.fromkeys(_name(effect) for effect in shown))
    formats = list(dict.fromkeys(effect.format for effect in shown)) or [""]
    figure = _figure(3 + 3.2 * len(formats), 1.4 + 0.27 * len(names))
    row_of_axes = figure.subplots(1, len(formats), squeeze=False, sharex=margin is not None, sharey=True)[0]
    for axes, format in zip(row_of_axes, formats, strict=True):
        axes.set_title(format, fontsize=9)
        if margin is None:
            axes.locator_params(axis="x", nbins=4)
        else:
            axes.set_xscale("symlog", linthresh=margin)
            axes.axvspan(-margin, margin, color="0.9", linewidth=0)
        axes.axvline(0, color="0.5", linewidth=1)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(axis="y", color="0.93")
        for name, attribute, offset, colour in (
            ("gain", "gain", -0.15, "C0"),
            ("gain from the mismatch", "interaction", 0.15, "C1"),
        ):
            of_format = [effect for effect in shown if effect.format == format]
            rows = [names.index(_name(effect)) + offset for effect in of_format]
            tests = [getattr(effect, attribute) for effect in of_format]
            middles = [test.difference for test in tests]
            lengths = [test.interval[1] - test.difference for test in tests]
            axes.errorbar(middles, rows, xerr=lengths, fmt="o", ms=3.5, lw=1.2, color=colour, label=name)
    row_of_axes[0].set_yticks(range(len(names)), names, fontsize=8)
    row_of_axes[0].set_ylim(len(names) - 0.4, -0.6)
    scale = "" if margin is None else " (linear within the band, logarithmic outside)"
    figure.supxlabel(f"difference, and its 95% interval{scale}", fontsize=9)
    _add_legend(figure)
    return _png(figure)


def draw_curves(study: Study, made: Mapping[Cell, Result], claims: Sequence[Claim], task: str) -> bytes:
    """A PNG of the arms of some claims on a task, at the claims' rates or their own: means over seeds.

    A row is a format, a column a quantity; one that is zero in all runs is left out.
    """
    rates = tuned_rates(study, {cell: result.figures for cell, result in made.items()})
    rate_of = {arm: claim.rate or rates.get((task, arm)) for claim in claims for arm in claim.all_arms}
    arms = [arm.name for arm in study.arms if arm.name in rate_of]
    runs: dict[tuple[str, str], list[Result]] = {}
    for cell, result in made.items():
        at_its_rate = (cell.arm, cell.rate) in rate_of.items()
        if cell.task == task and at_its_rate and cell.seed not in study.tuning_seeds:
            runs.setdefault((cell.format, cell.arm), []).append(result)
    formats = (study.twin, *dict.fromkeys(format for claim in claims for format in claim.formats))
    names = [name for name in RECENT if any(any(result.curves[name]) for each in runs.values() for result in each)]
    figure = _figure(3.2 * max(1, len(names)), 2.4 * len(formats))
    grid = figure.subplots(len(formats), max(1, len(names)), squeeze=False)
    for row, format in zip(grid, formats, strict=True):
        for axes, name in zip(row, names, strict=False):
            axes.set_title(f"{format}: {LABELS[name]}", fontsize=9, loc="left")
            for number, arm in enumerate(arms):
                if (format, arm) in runs:
                    of_arm = [result.curves for result in runs[format, arm]]
                    means = [statistics.fmean(at) for at in zip(*(curves[name] for curves in of_arm), strict=True)]
                    axes.plot(of_arm[0]["step"], means, label=arm, **_style(number))
    figure.supxlabel("iteration", fontsize=9)
    _add_legend(figure)
    return _png(figure)


def draw_doses(effects: Sequence[Effect], baseline: str, margin: float) -> bytes:
    """A PNG of what pays at which gap: each arm's gain from the mismatch against the gap that the baseline has.

    It has the arms that were tried at three gaps or more. Bars are 95% intervals; differences below the margin, which
    do not matter, lie in the grey band.
    """
    points: dict[str, dict[str, list[tuple[float, Difference]]]] = {}
    for effect in effects:
        if effect.against == baseline and effect.gap is not None and effect.interaction is not None:
            point = (effect.gap, effect.interaction)
            points.setdefault(effect.arm, {}).setdefault(effect.task, []).append(point)
    points = {arm: tasks for arm, tasks in points.items() if sum(map(len, tasks.values())) >= _FEWEST_DOSES}
    gaps = [gap for tasks in points.values() for doses in tasks.values() for gap, _ in doses] or [1.0]
    lowest, highest = max(min(gaps), 1e-7), max(*gaps, 1e-7)
    columns = 4
    rows = max(1, math.ceil(len(points) / columns))
    figure = _figure(3.2 * columns, 2.6 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(points) :]:
        axes.set_visible(False)
    colours: dict[str, int] = {}
    for axes, (arm, tasks) in zip(grid.flat, points.items(), strict=False):
        axes.set(xscale="log", xlim=(lowest / 2, highest * 2))
        axes.set_title(arm, fontsize=9)
        axes.set_yscale("symlog", linthresh=margin)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.axhspan(-margin, margin, color="0.9", linewidth=0)
        axes.axhline(0, color="0.5", linewidth=1)
        for task, doses in tasks.items():
            gaps, gains = zip(*sorted(doses, key=lambda dose: dose[0]), strict=True)
            middles, errors = (
                [gain.difference for gain in gains],
                [gain.interval[1] - gain.difference for gain in gains],
            )
            colour = f"C{colours.setdefault(task, len(colours))}"
            axes.errorbar(gaps, middles, yerr=errors, fmt="o-", ms=4, lw=1, color=colour, label=task)
    figure.supxlabel(f"{LABELS['gap']} of {baseline}", fontsize=9)
    figure.supylabel("gain from the mismatch", fontsize=9)
    _add_legend(figure)
    return _png(figure)


def draw_noise(study: Study, made: Mapping[Cell, Result]) -> bytes:
    """A PNG of all runs that judge: the gradient norm at the end against the gap, each format in a colour."""
    from matplotlib.ticker import LogLocator

    figure = _figure(6, 4)
    axes = figure.subplots()
    for format in dict.fromkeys(format for claim in study.claims for format in claim.formats):
        runs = [result for cell, result in made.items() if cell.format == format and result.curves]
        points = [(result.figures["grad_norm"], result.figures["gap"]) for result in runs]
        if points:
            axes.scatter(*zip(*points, strict=True), s=10, alpha=0.6, label=format)
    axes.set(xscale="log", yscale="log", xlabel=LABELS["grad_norm"], ylabel=LABELS["gap"])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    _add_legend(figure)
    return _png(figure)


def _name(effect: Effect) -> str:
    return f"{effect.claim}: {effect.arm} − {effect.against}, {effect.task}"


def _style(number: int) -> dict[str, str]:
    """How the line of an arm looks: matplotlib has ten colours, and a study may have more arms."""
    return {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}


def _add_legend(figure: Any) -> None:
    """One legend of all panels above them, with each label once."""
    named = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if named:
        figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=12, frameon=False, fontsize=8)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _png(figure: Any) -> bytes:
    """The figure in at most 128 colours, which takes a third of the bytes: such files are committed."""
    from PIL import Image

    drawn, stream = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(stream, format="png", optimize=True)
    return stream.getvalue()
