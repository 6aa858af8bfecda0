"""One page about a run: its curves, its figures, what the model wrote, and how the run was configured."""

import base64
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dcjax.reporting.record import read_metrics, read_transcripts, write_atomically
from dcjax.reporting.statistics import wilson_interval

# Okabe and Ito's colours, told apart under the common colour-vision deficiencies.
_BLUE, _VERMILLION, _BLACK = "#0072B2", "#D55E00", "#000000"
_SAMPLES_SHOWN = 4
_ENVIRONMENT_KEYS = ("versions", "platform")
# A control character has no glyph, and NUL is not allowed in HTML: each is shown as its Unicode picture.
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}

Records = list[dict[str, Any]]


class Curve(NamedTuple):
    """One metric as it is drawn; an `interval` is the 95% Wilson interval of a share of `eval/prompts`."""

    key: str
    label: str
    colour: str
    line: str = "-"
    marker: str = ""
    width: float = 1.6
    opacity: float = 1.0
    interval: bool = False


class Panel(NamedTuple):
    """A plot: its title, the y axis's quantity with unit, whether y starts at 0, and its curves."""

    title: str
    quantity: str
    from_zero: bool
    curves: tuple[Curve, ...]


class Headline(NamedTuple):
    """A metric of the table; `best` picks its best value, and None says that none is better than another."""

    key: str
    label: str
    best: Callable[..., float] | None


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

_HEADLINES = (
    Headline("reward", "Reward", max),
    Headline("eval/deployed_accuracy", "Held-out accuracy, deployed policy", max),
    Headline("eval/training_accuracy", "Held-out accuracy, training policy", max),
    Headline("eval/deployed_accuracy_ema", "Held-out accuracy, deployed policy, averaged weights", max),
    Headline("dual/discrepancy", "Discrepancy δ̄, a mean over responses", min),
    Headline("mismatch/prob_diff_mean", "|p_train − p_infer|, mean over tokens", min),
    Headline("mismatch/prob_diff_max", "|p_train − p_infer|, largest", min),
    Headline("mismatch/log_ppl_abs_diff", "Difference of log-perplexity, a response (nats)", min),
    Headline("mismatch/prob_diff_p99", "|p_train − p_infer|, 99th percentile", min),
    Headline("mismatch/ess", "Effective share of the tokens as the training policy's samples", max),
    Headline("mismatch/k3", "KL(sampled ‖ training), k3 estimate (nats a token)", min),
    Headline("dual/multiplier", "Multiplier λ", None),
    Headline("dual/budget", "Budget c", None),
    Headline("response_length", "Response length (tokens)", None),
    Headline("entropy", "Entropy (nats a token)", None),
    Headline("grad_norm", "Gradient norm", None),
    Headline("learning_rate", "Learning rate", None),
    Headline("tokens_per_second", "Throughput (tokens/s)", max),
)

_FINAL_FIGURES = (
    ("eval/deployed_accuracy", "deployed accuracy"),
    ("eval/training_accuracy", "training accuracy"),
    ("reward", "reward"),
    ("dual/discrepancy", "discrepancy δ̄"),
    ("dual/multiplier", "multiplier λ"),
)


def write_report(run_dir: Path) -> tuple[Path, Path]:
    """Writes `report.png` and the self-contained `report.html` into a run directory.

    Args:
      run_dir: holds `metrics.jsonl` and, where the run wrote them, `config.json` and `samples.jsonl`.

    Returns:
      The paths of the picture and of the page.

    Raises:
      FileNotFoundError: if there is no `metrics.jsonl`.
      ValueError: if it has no complete line, or a file of the run is damaged; the message names the file.
    """
    run_dir = Path(run_dir)
    records = _load_metrics(run_dir)
    config = _load_config(run_dir / "config.json")
    samples_path = run_dir / "samples.jsonl"
    samples = read_transcripts(samples_path) if samples_path.exists() else []
    name = run_dir.resolve().name
    picture = draw_curves(records, name)
    picture_path, page_path = run_dir / "report.png", run_dir / "report.html"
    write_atomically(picture_path, picture)
    page = _render(name, records, config, samples, picture)
    # What UTF-8 cannot carry (lone surrogates) goes as a character reference, which a browser shows as �.
    write_atomically(page_path, page.encode("utf-8", "xmlcharrefreplace"))
    return picture_path, page_path


def draw_curves(records: Records, name: str) -> bytes:
    """The six panels of a run as a PNG; a panel whose metrics the run did not record says so.

    Args:
      records: the metrics, one dict a line, `step` in each.
      name: the run's, above the panels.
    """
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rc = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    with style.context(["default", rc]):
        figure = Figure(figsize=(15, 8.4), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.14))
        figure.suptitle(_visible(name), fontsize=15, fontweight="bold", parse_math=False)
        for axes, panel in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
            _draw_panel(axes, panel, records)
            _align_steps(axes, records)
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
    return stream.getvalue()


def _draw_panel(axes, panel: Panel, records: Records) -> None:
    axes.set_title(panel.title, loc="left", fontweight="bold")
    axes.set_xlabel("training step")
    axes.set_ylabel(panel.quantity)
    drawn = [curve for curve in panel.curves if _draw_curve(axes, curve, records)]
    if not drawn:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color="0.45")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    axes.grid(color="0.9", linewidth=0.8)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=8)
    axes.yaxis.get_major_locator().set_params(nbins=6)
    # A plain format: matplotlib's own moves powers of ten to the corner where the title stands.
    axes.yaxis.set_major_formatter("{x:,.6g}")
    if panel.from_zero:
        # A little below 0, or a curve that lies on 0 would be half hidden by the axis.
        axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])
    if len(panel.curves) > 1:
        # On the title's line, where no curve can run beneath it.
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.1}
        axes.legend(**place, ncols=2, frameon=False, fontsize=10, handlelength=1.5, columnspacing=0.9)


def _align_steps(axes, records: Records) -> None:
    """Gives each panel the whole run as its x axis, so that what happens at one step stands in one column."""
    steps = [record["step"] for record in records]
    margin = max(0.03 * (max(steps) - min(steps)), 0.5)
    axes.set_xlim(min(steps) - margin, max(steps) + margin)


def _draw_curve(axes, curve: Curve, records: Records) -> bool:
    """Draws one metric and tells whether the run recorded it."""
    steps, values = _series(records, curve.key)
    if not steps:
        return False
    # One point makes no line, so it needs a marker to be seen.
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
    lower, upper = zip(*(_interval(record, curve.key) for record in measured), strict=True)
    axes.fill_between(steps, lower, upper, color=curve.colour, alpha=0.14, linewidth=0)
    if len(steps) == 1:
        axes.vlines(steps, lower, upper, color=curve.colour, alpha=0.4)


def _interval(record: Mapping[str, Any], key: str) -> tuple[float, float]:
    prompts = int(record["eval/prompts"])
    return wilson_interval(round(record[key] * prompts), prompts)


def _series(records: Records, key: str) -> tuple[list[int], list[float]]:
    recorded = [(record["step"], record[key]) for record in records if key in record]
    return [step for step, _ in recorded], [value for _, value in recorded]


def _load_metrics(run_dir: Path) -> Records:
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        elsewhere = ", ".join(str(found.parent) for found in sorted(run_dir.glob("*/metrics.jsonl")))
        hint = f"one of {elsewhere}" if elsewhere else "such as runs/NAME"
        raise FileNotFoundError(f"no {path}; a report is made of a run directory, which has that file: {hint}")
    records = read_metrics(path)
    if not records:
        raise ValueError(f"{path} has no complete line: the run was stopped before it had logged a step")
    return records


def _load_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _render(name: str, records: Records, config: dict[str, Any], samples: Records, picture: bytes) -> str:
    from jinja2 import Environment, StrictUndefined

    # The engine escapes all that comes from a run: a model's text is whatever it likes, markup included.
    engine = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    engine.filters.update(number=_number, visible=_visible)
    return engine.from_string(_PAGE).render(
        name=name,
        last_step=records[-1]["step"],
        figures=_final_figures(records),
        picture=base64.b64encode(picture).decode("ascii"),
        rows=_headline_rows(records),
        moments=_early_and_late(samples),
        settings=_flatten({key: value for key, value in config.items() if key not in _ENVIRONMENT_KEYS}),
        environment=_flatten({key: config[key] for key in _ENVIRONMENT_KEYS if key in config}),
    )


def _final_figures(records: Records) -> list[tuple[str, float, str]]:
    """(label, value, remark) of what a reader asks for first, each from the last line that has it."""
    figures = []
    for key, label in _FINAL_FIGURES:
        record = next((record for record in reversed(records) if key in record), None)
        if record is not None:
            figures.append((label, record[key], f"step {record['step']}{_remark(record, key)}"))
    return figures


def _remark(record: Mapping[str, Any], key: str) -> str:
    if key.startswith("eval/") and "eval/prompts" in record:
        lower, upper = _interval(record, key)
        return f", 95% {lower:.3f} to {upper:.3f}"
    if key == "dual/discrepancy" and "dual/budget" in record:
        return f", budget {_number(record['dual/budget'])}"
    return ""


def _headline_rows(records: Records) -> list[dict[str, Any]]:
    """Per recorded metric its label and its first, best and last (step, value); best is None where none is."""
    rows = []
    for headline in _HEADLINES:
        points = list(zip(*_series(records, headline.key), strict=True))
        if points:
            best = headline.best(points, key=lambda point: point[1]) if headline.best else None
            rows.append({"label": headline.label, "first": points[0], "best": best, "last": points[-1]})
    return rows


def _early_and_late(samples: Records) -> list[tuple[str, Records]]:
    """Samples of the first and the last sampled step, each with a title: a few prompts, one response each."""
    steps = sorted({sample["step"] for sample in samples})
    moments = {"Early": steps[:1], "Late": steps[1:][-1:]}
    return [(f"{title}: step {step}", _of_step(samples, step)) for title, chosen in moments.items() for step in chosen]


def _of_step(samples: Records, step: int) -> Records:
    by_prompt: dict[str, dict[str, Any]] = {}
    for sample in samples:
        if sample["step"] == step:
            by_prompt.setdefault(sample["prompt"], sample)
    return list(by_prompt.values())[:_SAMPLES_SHOWN]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The leaves of nested dicts as (dotted name, text)."""
    leaves = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves += _flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            leaves.append((prefix + key, text))
    return leaves


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _visible(text: str) -> str:
    return text.translate(_CONTROL_PICTURES)


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ name | visible }}: report</title>
<style>
:root { color-scheme: light dark; --ink: #1c1e21; --faint: #5f6670; --page: #fff; --card: #f4f5f7; --rule: #d9dce1 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --faint: #9aa2ad; --page: #16181c; --card: #21242a; --rule: #3a3f47 }
}
body { margin: 0 auto; padding: 1.5rem; max-width: 75rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere }
h2 { margin-top: 2.5rem }
small, .faint { color: var(--faint) }
.figures { display: flex; flex-wrap: wrap; gap: .75rem }
.figures div { padding: .6rem 1rem; border-radius: .5rem; background: var(--card) }
.figures b { display: block; font-size: 1.5rem }
.figures small { display: block }
img { box-sizing: border-box; width: 100%; padding: .5rem; border-radius: .5rem; background: #fff }
.wide { overflow-x: auto }
table { border-collapse: collapse }
th, td { padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
td.value { overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: .9rem }
article { margin: 1rem 0; padding: .75rem 1rem; border-radius: .5rem; background: var(--card) }
.text { max-height: 22rem; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
  font: .9rem/1.45 ui-monospace, monospace; margin: .4rem 0 }
.response { padding-left: .8rem; border-left: 3px solid var(--faint) }
</style>
</head>
<body>
<h1>{{ name | visible }}</h1>
<p class="faint">after step {{ last_step }}</p>
<div class="figures">
{% for label, value, remark in figures %}
<div><small>{{ label }}</small><b>{{ value | number }}</b><small>{{ remark }}</small></div>
{% endfor %}
</div>

<h2>Curves</h2>
<img alt="Reward, held-out accuracy, discrepancy, multiplier, response length and gradient norm by training step"
  src="data:image/png;base64,{{ picture }}">
<p class="faint">Bands are 95% Wilson intervals over the held-out prompts. The deployed policy answers with the
  serving engine's numerics, the training policy with the trainer's; the weights are the same.</p>

<h2>Metrics</h2>
<div class="wide"><table>
<thead><tr><th>metric</th><th>first</th><th>best</th><th>last</th></tr></thead>
<tbody>
{% for row in rows %}
<tr><td>{{ row.label }}</td>
{% for point in (row.first, row.best, row.last) %}
<td class="number">{% if point %}{{ point[1] | number }} <small>step {{ point[0] }}</small>{% else %}–{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>

<h2>Samples</h2>
{% for title, samples in moments %}
<h3>{{ title }}</h3>
{% for sample in samples %}
<article>
<div><b>reward {{ sample.reward | number }}</b>
<small>{{ "finished" if sample.finished else "cut at the length limit" }}, policy {{ sample.policy_version }}
{%- if sample.prob_diff_mean is defined %}, mean |p_train − p_infer| {{ sample.prob_diff_mean | number }}{% endif %}
</small></div>
<div class="text" dir="auto">{{ sample.prompt | visible }}</div>
<div class="text response" dir="auto">{{ sample.response | visible }}</div>
</article>
{% endfor %}
{% else %}
<p class="faint">not recorded</p>
{% endfor %}

{% for title, leaves in (("Configuration", settings), ("Versions and platform", environment)) %}
{% if leaves or title == "Configuration" %}
<h2>{{ title }}</h2>
{% if leaves %}
<div class="wide"><table>
<tbody>
{% for key, value in leaves %}
<tr><td>{{ key | visible }}</td><td class="value">{{ value | visible }}</td></tr>
{% endfor %}
</tbody>
</table></div>
{% else %}
<p class="faint">not recorded</p>
{% endif %}
{% endif %}
{% endfor %}
</body>
</html>
"""
