"""A probe's result for people and programs: as a table, as JSON and as a picture."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dcjax.reporting.record import write_atomically
from dcjax.tools.probe.probe import Probe

# Okabe and Ito's colours, which people with the common colour-vision deficiencies can tell apart.
_BLUE, _VERMILLION, _GREEN = "#0072B2", "#D55E00", "#009E73"

_COLUMNS = {
    "prob_diff_mean": "mean δ",
    "prob_diff_p50": "median",
    "prob_diff_p90": "90%",
    "prob_diff_p99": "99%",
    "prob_diff_max": "max δ",
    "k3": "k3",
    "log_ppl_abs_diff": "Δ log ppl",
    "log_ppl_abs_diff_per_token": "a token",
}


def to_json(probe: Probe) -> str:
    """One line; all numbers are finite."""
    return json.dumps(asdict(probe), allow_nan=False)


def write_probe(probe: Probe, directory: Path) -> tuple[Path, Path]:
    """Writes probe-FORMAT.json and .png into a directory, which is created if missing; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    name = f"probe-{probe.format.replace('/', '-')}"
    data, picture = directory / f"{name}.json", directory / f"{name}.png"
    write_atomically(data, to_json(probe).encode() + b"\n")
    write_atomically(picture, draw(probe))
    return data, picture


# --- the table ---


def to_text(probe: Probe) -> str:
    """The result as text, without the picture; lines are up to 150 columns wide."""
    at = "" if probe.step is None else f" at step {probe.step}"
    return "\n".join(
        [
            f"{probe.source}{at}, served in {probe.format} with a KV cache in {probe.kv_cache}: "
            f"{probe.responses} responses of at most {probe.max_response_length} tokens, {probe.tokens} in all",
            *_section("what each source adds", _stage_rows(probe)),
            *_section("beside them", _beside_rows(probe)),
            *_beside_notes(probe),
            *_section("the whole gap in each format", _format_rows(probe), extra="bytes (of float32)"),
            *_not_served(probe),
            *_profile("by position", probe.by_position),
            *_profile("by the trainer's probability", probe.by_probability),
            "",
            "relative error of the residual stream behind each layer",
            *(f"  layer {row['layer']:<6}{row['relative_error']:.3g}" for row in probe.by_layer),
            "",
            "worst tokens: δ, the trainer's and the sampler's probability",
            *map(_worst, probe.worst_tokens),
            "",
            _budget(probe),
        ]
    )


def to_summary(probes: Sequence[Probe]) -> str:
    """The whole gap in each deployed format, on the tokens that it sampled itself, a line for each."""
    rows = [
        (probe.format, probe.total, "none" if probe.recommended_budget is None else f"{probe.recommended_budget:.3g}")
        for probe in probes
    ]
    return "\n".join(_section("the gap that training sees", rows, extra="recommended budget"))


def _budget(probe: Probe) -> str:
    if probe.recommended_budget is None:
        return "no budget is recommended for a gap of whole distributions; objective.budget=auto measures it in a run"
    return (
        f"recommended budget: objective.budget={probe.recommended_budget:.3g} (objective.budget=auto measures it in a "
        "run's first iterations)"
    )


def _section(title: str, rows: Iterable[Row], extra: str = "") -> list[str]:
    lines = [f"  {name:<26}{_figures(gap)}  {remark}".rstrip() for name, gap, remark in rows]
    header = "".join(f"{label:>10}" for label in _COLUMNS.values())
    return ["", f"{title:<28}{header}  {extra}".rstrip(), *lines] if lines else []


def _figures(gap: dict[str, Any]) -> str:
    return "".join(f"{gap[name]:>10.3g}" for name in _COLUMNS)


Row = tuple[str, dict[str, Any], str]
"""A label, a gap, and a remark after it."""


def _stage_rows(probe: Probe) -> Iterator[Row]:
    for stage in probe.stages:
        yield stage_label(stage.name, stage.detail), stage.own, f"in all {stage.cumulative['prob_diff_mean']:.3g}"
    yield "the gap that training sees", probe.total, ""


def stage_label(name: str, detail: str) -> str:
    """A stage as tables name it, for example `weights (int4)`."""
    return name.replace("_", " ") + (f" ({detail})" if detail else "")


def _beside_rows(probe: Probe) -> Iterator[Row]:
    if "mesh" in probe.sharding:
        sizes = ", ".join(f"{name} {size}" for name, size in probe.sharding["mesh"].items())
        yield f"sharding ({sizes})", probe.sharding, ""
    transform = ", ".join(f"{name} {probe.sampling[name]:g}" for name in ("temperature", "top_k", "top_p"))
    yield "sampling transform", probe.sampling, transform
    for name, row in probe.chunks.items():
        yield f"{name} a pass" if name == "sequences" else "head's columns", row, f"{row['other']}, not {row['own']}"
    if probe.routing is not None:
        yield "without routing replay", probe.routing["without_replay"], ""
        yield "with routing replay", probe.routing["with_replay"], ""


def _beside_notes(probe: Probe) -> list[str]:
    notes = []
    if "not_measured" in probe.sharding:
        notes.append(f"  sharding was not measured: {probe.sharding['not_measured']}")
    if probe.routing is not None:
        changed = probe.routing["changed_experts"]
        notes.append(
            f"  {changed['any_layer']:.2%} of the tokens go to other experts in some layer, "
            f"{changed['mean_layer']:.2%} in the mean layer"
        )
    return notes


def _format_rows(probe: Probe) -> Iterator[Row]:
    for name, row in probe.formats.items():
        if "not_served" not in row:
            yield name, row, f"{row['bytes']:,} ({row['bytes'] / row['float32_bytes']:.3f})"


def _not_served(probe: Probe) -> list[str]:
    return [f"  {name}: {row['not_served']}" for name, row in probe.formats.items() if "not_served" in row]


def _profile(title: str, rows: list[dict[str, float]]) -> list[str]:
    header = ["", f"{title:<28}{'mean δ':>10}{'max δ':>10}{'tokens':>10}"]
    return header + [
        f"  {row['from']:>8g} to {row['to']:<14g}{row['prob_diff_mean']:>10.3g}{row['prob_diff_max']:>10.3g}"
        f"{row['tokens']:>10}"
        for row in rows
    ]


def _worst(row: dict[str, Any]) -> str:
    context = f"{row['before'][-40:]}[{row['token']}]{row['behind'][:12]}"
    return f"  {row['prob_diff']:<10.3g}{row['trained']:<8.3f}{row['sampled']:<8.3f}…{context}"


# --- the picture ---


def draw(probe: Probe) -> bytes:
    """Six panels as a PNG: stages, formats, and the whole gap's profiles."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rc = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    with style.context(["default", rc]):
        figure = Figure(figsize=(15, 8.4), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.14))
        at = "" if probe.step is None else f", step {probe.step}"
        title = f"{probe.source}{at}: {probe.format}, KV cache {probe.kv_cache}"
        figure.suptitle(title, fontsize=15, fontweight="bold", parse_math=False)
        own, whole, formats, position, probability, layer = figure.subplots(2, 3).flat
        labels = [stage_label(stage.name, stage.detail) for stage in probe.stages]
        _bars(own, "What each source adds", labels, [stage.own for stage in probe.stages], _BLUE)
        _bars(whole, "The gap so far", labels, [stage.cumulative for stage in probe.stages], _VERMILLION)
        served = {name: row for name, row in probe.formats.items() if "not_served" not in row}
        _bars(formats, "The whole gap by format", list(served), list(served.values()), _GREEN)
        _buckets(position, "By position", "token of the response", probe.by_position)
        _buckets(probability, "By the trainer's probability", "probability of the token", probe.by_probability)
        _layers(layer, probe.by_layer)
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
    return stream.getvalue()


def _bars(axes, title: str, labels: list[str], gaps: list[dict[str, Any]], colour: str) -> None:
    """Means as bars and largest ones as marks, the first on top, on a logarithmic axis that also shows 0."""
    axes.set_title(title, loc="left", fontweight="bold")
    rows = range(len(labels))
    axes.barh(rows, [gap["prob_diff_mean"] for gap in gaps], color=colour, height=0.6)
    axes.plot([gap["prob_diff_max"] for gap in gaps], rows, "|", color="black", markersize=11)
    axes.set_yticks(list(rows), labels, parse_math=False)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=1e-7)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 1e-6, 1e-4, 1e-2, 1])
    axes.set_xlabel(r"$|p_\mathrm{train} - p_\mathrm{infer}|$: mean, largest (mark)")
    axes.grid(axis="x", color="0.9", linewidth=0.8)


def _buckets(axes, title: str, quantity: str, rows: list[dict[str, float]]) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.bar([f"{row['from']:g}-{row['to']:g}" for row in rows], [row["prob_diff_mean"] for row in rows], color=_BLUE)
    axes.set_xlabel(f"{quantity}, from-to")
    axes.set_ylabel(r"mean $\delta$")
    axes.tick_params(axis="x", labelsize=9, rotation=25)
    axes.grid(axis="y", color="0.9", linewidth=0.8)


def _layers(axes, rows: list[dict[str, float]]) -> None:
    axes.set_title("Residual stream", loc="left", fontweight="bold")
    axes.plot([row["layer"] for row in rows], [row["relative_error"] for row in rows], "o-", color=_BLUE)
    axes.set_xlabel("layer")
    axes.set_ylabel(r"$\|x - r\| / \|r\|$ against the first stage")
    axes.set_ylim(0, 1.1 * max(row["relative_error"] for row in rows) or 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color="0.9", linewidth=0.8)
