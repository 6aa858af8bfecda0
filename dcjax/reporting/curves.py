"""The curves of a run, as one picture and as panels that a page can read values off."""

import io
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from dcjax.reporting.statistics import wilson_interval

# Okabe and Ito's colours, which people with the common colour-vision deficiencies can tell apart.
_BLUE, _VERMILLION, _BLACK = "#0072B2", "#D55E00", "#000000"
# A control character has no glyph, and NUL is not allowed in HTML: each is shown as its Unicode picture.
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}

_INK, _FAINT, _RULE = "#1c1e21", "#5f6670", "#d9dce1"
_ON_PAGES = {
    _BLUE: "--blue",
    _VERMILLION: "--vermillion",
    _BLACK: "--ink",
    _INK: "--ink",
    _FAINT: "--faint",
    _RULE: "--rule",
}
"""What a page calls the colours of a panel: where it is dark, they are others."""
_PLAIN = {r"$\bar\delta$": "δ̄", r"$\lambda$": "λ", "$c$": "c"}
_POINTS = 500
"""The most steps of a panel whose values a page tells: as many as it has room to point at."""

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


_STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}

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


class Drawing(NamedTuple):
    """A panel as a page has it."""

    title: str
    # one SVG element, its colours those of `render_page`
    svg: str
    # (where a step is, as a share of the width; the step and its values as text)
    points: list[tuple[float, str]]


def draw_curves(records: Records, name: str) -> bytes:
    """The six panels of a run as a PNG; a panel says so if the run recorded none of its metrics.

    Args:
      records: the lines of the run's metrics.
      name: the run's name, which is the title of the picture.
    """
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with style.context(["default", {**_STYLE, "font.size": 11}]):
        figure = Figure(figsize=(15, 8.4), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.14))
        figure.suptitle(show_control_characters(name), fontsize=15, fontweight="bold", parse_math=False)
        for axes, panel in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
            _draw_panel(axes, panel, records)
            if axes.lines and len(panel.curves) > 1:
                # the legend stands beside the title, where it hides no curve
                position = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.1}
                axes.legend(**position, ncols=2, frameon=False, fontsize=10, handlelength=1.5, columnspacing=0.9)
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
    return stream.getvalue()


def draw_panels(records: Records) -> list[Drawing]:
    """Each panel of `draw_curves` by itself, for pages of any width and colour; those of what was recorded."""
    from matplotlib import style

    inks = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    with style.context(
        ["default", {**_STYLE, **inks, "font.size": 9, "svg.hashsalt": "dcjax", "axes.edgecolor": _FAINT}]
    ):
        return [_drawing(panel, records) for panel in _PANELS if any(series(records, c.key)[0] for c in panel.curves)]


def _drawing(panel: Panel, records: Records) -> Drawing:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(4.4, 3.1), layout=ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05))
    axes = figure.subplots()
    _draw_panel(axes, panel, records)
    if len(panel.curves) > 1:
        figure.legend(loc="outside lower left", ncols=2, frameon=False, handlelength=1.5, columnspacing=0.9)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, name in _ON_PAGES.items():
        svg = svg.replace(colour.lower(), f"var({name})")
    steps = sorted({step for curve in panel.curves for step in series(records, curve.key)[0]})
    steps = steps[:: math.ceil(len(steps) / _POINTS)]
    places = axes.transData.transform([(step, 0) for step in steps])[:, 0] / figure.bbox.width
    of_steps = {record["step"]: record for record in records}
    told = [(round(float(x), 4), _told(panel, of_steps[step])) for x, step in zip(places, steps, strict=True)]
    return Drawing(_plain(panel.title), svg, told)


def _told(panel: Panel, record: Mapping[str, Any]) -> str:
    """A step and its values as text."""
    parts = []
    for curve in panel.curves:
        if curve.key in record:
            part = f"{_plain(curve.label)} {record[curve.key]:.4g}"
            if curve.interval and "eval/prompts" in record:
                part += " (95% {:.3f} to {:.3f})".format(*accuracy_interval(record, curve.key))
            parts.append(part)
    return f"step {record['step']}: {', '.join(parts)}"


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
    axes.grid(color=_RULE, linewidth=0.8)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=8)
    axes.yaxis.get_major_locator().set_params(nbins=6)
    # matplotlib's default format would move powers of ten to the corner where the title is.
    axes.yaxis.set_major_formatter("{x:,.6g}")
    if panel.from_zero:
        # The axis starts slightly below 0, because it would hide half of a curve that is 0.
        axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])
    _set_step_limits(axes, records)


def _plain(label: str) -> str:
    """A label as text that is no picture."""
    for drawn, text in _PLAIN.items():
        label = label.replace(drawn, text)
    return label


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
