"""The curves of a run, as one picture."""

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

from dcjax.reporting.statistics import wilson_interval

# Okabe and Ito's colours, which people with the common colour-vision deficiencies can tell apart.
_BLUE, _VERMILLION, _BLACK = "#0072B2", "#D55E00", "#000000"
# A control character has no glyph, and NUL is not allowed in HTML: each is shown as its Unicode picture.
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}

Records = list[dict[str, Any]]
"""The lines of a log, `step` in each."""


class Curve(NamedTuple):
    """How a metric is drawn; `interval` adds the 95% Wilson interval of an accuracy over `eval/prompts`."""

    key: str
    label: str
    colour: str
    line: str = "-"
    marker: str = ""
    width: float = 1.6
    opacity: float = 1.0
    interval: bool = False


class Panel(NamedTuple):
    """One plot: its title, the label of the y axis, whether the y axis starts at 0, and its curves."""

    title: str
    y_label: str
    from_zero: bool
    curves: tuple[Curve, ...]


_PANELS = (
    Panel("Reward", "mean reward of the responses", False, (Curve("reward", "reward", _BLUE),)),
    Panel(
        "Accuracy",
        "share of held-out prompts solved",
        False,
        (
            Curve("eval/deployed_accuracy", "deployed policy", _BLUE, marker="o", interval=True),
            Curve("eval/training_accuracy", "training policy", _VERMILLION, line="--", marker="s", interval=True),
            Curve("eval/deployed_accuracy_ema", "deployed policy, averaged weights", _BLACK, line=":", marker="^"),
        ),
    ),
    Panel(
        r"Discrepancy $\bar\delta$",
        r"$|p_\mathrm{train} - p_\mathrm{infer}|$, mean per response",
        True,
        (
            Curve("dual/discrepancy", r"$\bar\delta$", _BLUE),
            Curve("dual/budget", "budget $c$", _VERMILLION, line="--", width=2.0),
        ),
    ),
    Panel(r"Multiplier $\lambda$", r"$\lambda$ (dimensionless)", True, (Curve("dual/multiplier", "λ", _BLUE),)),
    Panel("Response length", "mean length (tokens)", True, (Curve("response_length", "length", _BLUE),)),
    Panel(
        "Gradient norm",
        r"$\ell_2$ norm of the gradient",
        True,
        (
            Curve("grad_norm", "each step", _BLUE, width=1.0, opacity=0.35),
            Curve("grad_norm_smoothed", "smoothed", _BLACK),
        ),
    ),
)


def draw_curves(records: Records, name: str) -> bytes:
    """The six panels of a run as a PNG; a panel says so if the run recorded none of its metrics.

    Args:
      records: the lines of the run's metrics.
      name: the run's name, which is the title of the picture.
    """
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rc = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    with style.context(["default", rc]):
        figure = Figure(figsize=(15, 8.4), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.14))
        figure.suptitle(show_control_characters(name), fontsize=15, fontweight="bold", parse_math=False)
        for axes, panel in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
            _draw_panel(axes, panel, records)
            _set_step_limits(axes, records)
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
    return stream.getvalue()


def _draw_panel(axes, panel: Panel, records: Records) -> None:
    axes.set_title(panel.title, loc="left", fontweight="bold")
    axes.set_xlabel("training step")
    axes.set_ylabel(panel.y_label)
    drawn = [curve for curve in panel.curves if _draw_curve(axes, curve, records)]
    if not drawn:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color="0.45")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    axes.grid(color="0.9", linewidth=0.8)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=8)
    axes.yaxis.get_major_locator().set_params(nbins=6)
    # matplotlib's default format would move powers of ten to the corner where the title is.
    axes.yaxis.set_major_formatter("{x:,.6g}")
    if panel.from_zero:
        # The axis starts slightly below 0, because it would hide half of a curve that is 0.
        axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])
    if len(panel.curves) > 1:
        # The legend stands beside the title, where it hides no curve.
        position = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.1}
        axes.legend(**position, ncols=2, frameon=False, fontsize=10, handlelength=1.5, columnspacing=0.9)


def _set_step_limits(axes, records: Records) -> None:
    """Lets the x axis span the whole run, so that a step has the same place in every panel."""
    steps = [record["step"] for record in records]
    margin = max(0.03 * (max(steps) - min(steps)), 0.5)
    axes.set_xlim(min(steps) - margin, max(steps) + margin)


def _draw_curve(axes, curve: Curve, records: Records) -> bool:
    """Draws one metric, and returns whether the run recorded it."""
    steps, values = series(records, curve.key)
    if not steps:
        return False
    # A single point makes no line and is visible only with a marker.
    marker = curve.marker or ("o" if len(steps) == 1 else "")
    axes.plot(
        steps,
        values,
        curve.line,
        color=curve.colour,
        label=curve.label,
        marker=marker,
        markersize=4.5,
        linewidth=curve.width,
        alpha=curve.opacity,
    )
    if curve.interval:
        _draw_interval(axes, curve, records)
    return True


def _draw_interval(axes, curve: Curve, records: Records) -> None:
    measured = [record for record in records if curve.key in record and "eval/prompts" in record]
    if not measured:
        return
    steps = [record["step"] for record in measured]
    lower, upper = zip(*(accuracy_interval(record, curve.key) for record in measured), strict=True)
    axes.fill_between(steps, lower, upper, color=curve.colour, alpha=0.14, linewidth=0)
    if len(steps) == 1:
        axes.vlines(steps, lower, upper, color=curve.colour, alpha=0.4)


def accuracy_interval(record: Mapping[str, Any], key: str) -> tuple[float, float]:
    """The 95% Wilson interval of an accuracy that was measured on `eval/prompts` prompts."""
    prompts = int(record["eval/prompts"])
    return wilson_interval(round(record[key] * prompts), prompts)


def series(records: Records, key: str) -> tuple[list[int], list[float]]:
    """The steps at which a metric was recorded, and its values."""
    recorded = [(record["step"], record[key]) for record in records if key in record]
    return [step for step, _ in recorded], [value for _, value in recorded]


def show_control_characters(text: str) -> str:
    """The text with each control character but tab and newline replaced by its Unicode picture."""
    return text.translate(_CONTROL_PICTURES)
