"""The tables of docs/quantization.md, and the picture, from the figures that were measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Results = Mapping[str, Any]
"""The JSON that is written."""


def tables(results: Results) -> dict[str, str]:
    """Each table in Markdown, by its name."""
    bf16 = results["formats"]["bf16"]
    return {
        "formats": _table(
            ("format", "weights' bytes", "KV cache", "mean", "99%", "largest", "KL"),
            (
                (f"`{name}`", _short(of["bytes"], 3), of["kv_cache"], *_figures(of, "p99", "largest", "kl"))
                for name, of in results["formats"].items()
            ),
        ),
        "parts": _parts(results["parts"], bf16),
        "caches": _table(
            ("KV cache", "mean", "KL"),
            ((name, *_figures(of, "kl")) for name, of in {"bf16": bf16, **results["caches"]}.items()),
        ),
        "layers": _layers(results["layers"]),
        "outliers": _outliers(results["outliers"]),
        "alternatives": _table(
            ("", "weights' bytes", "mean", "KL"),
            ((name, _short(of["bytes"], 3), *_figures(of, "kl")) for name, of in results["alternatives"].items()),
        ),
    }


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def _short(number: float, digits: int = 4) -> str:
    """The number without a zero before its point."""
    return f"{number:.{digits}f}".removeprefix("0")


def _figures(of: Mapping[str, float], *others: str) -> list[str]:
    """The mean with its standard error, and other figures."""
    digits = {"p99": 3, "largest": 2}
    return [f"{_short(of['mean'])} ± {_short(of['error'])}"] + [
        _short(of[name], digits.get(name, 4)) for name in others
    ]


def _parts(parts: Results, bf16: Mapping[str, float]) -> str:
    rows = [["nothing", *(_short(bf16["mean"]) for _ in parts)]]
    for part in next(iter(parts.values())):
        rows.append([part, *(_short(of[part]["mean"]) for of in parts.values())])
    return _table(("quantised alone", *parts), rows)


def _layers(layers: Results) -> str:
    depth = len(layers["residuals"]["bf16"])
    places = [round(depth * third / 3) - 1 if third else 0 for third in range(4)]
    rows = []
    for name, errors in layers["residuals"].items():
        worst = sorted(layers["alone"].get(name, []), key=lambda of: -of["mean"])[:3]
        alone = ", ".join(f"{of['first']} ({_short(of['mean'])})" for of in worst)
        rows.append([name, *(_short(errors[place], 3) for place in places), alone])
    return _table(("", *(f"behind layer {place}" for place in places), "worst alone, from layer"), rows)


def _outliers(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = []
    for product in dict.fromkeys(row["product"] for row in rows):
        layers = [row for row in rows if row["product"] == product]
        channels = Counter(row["channel"] for row in layers).most_common(3)
        row, worst = max(((row, row["worst"][0]) for row in layers), key=lambda pair: pair[1]["ratio"])
        cells.append(
            [
                product,
                f"{layers[0]['width'] ** 0.5:.0f}",
                *(f"{np.mean([row[name] for row in layers]):.1f}" for name in ("mean", "first_token")),
                f"{worst['ratio']:.1f} (layer {row['layer']}, `{worst['token']}` at {worst['position']})",
                f"{np.mean([row['share'] for row in layers]):.0%}",
                ", ".join(f"{channel} ({count})" for channel, count in channels),
            ]
        )
    heads = ("what enters", "√K", "mean", "first token", "largest", "tokens with one channel", "which (layers)")
    return _table(heads, cells)


def draw(results: Results, path: Path) -> None:
    """Gaps by bytes, by part, by layer and of alternatives, the residual stream, and the outliers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 9), layout="constrained")
    panels = figure.subplots(2, 3).flat
    for axes, panel in zip(panels, (_by_bytes, _by_part, _alternatives, _by_layer, _stream, _by_product), strict=True):
        panel(axes, results)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def _by_bytes(axes: Any, results: Results) -> None:
    for name, of in results["formats"].items():
        if of["mean"] > 1e-5:  # float32 has no place on a logarithmic axis
            axes.plot(of["bytes"], of["mean"], "o", color="C0")
            axes.annotate(name, (of["bytes"], of["mean"]), xytext=(5, 3), textcoords="offset points", fontsize=8)
    axes.set(yscale="log", xlabel="bytes of weights / float32's", ylabel="mean |p − q|", title="formats")


def _by_part(axes: Any, results: Results) -> None:
    parts, names = results["parts"], list(next(iter(results["parts"].values())))
    for number, (name, of) in enumerate(parts.items()):
        places = np.arange(len(names)) + (number - len(parts) / 2) / (len(parts) + 1)
        axes.bar(places, [of[part]["mean"] for part in names], 1 / (len(parts) + 1), align="edge", label=name)
    axes.axhline(results["formats"]["bf16"]["mean"], color="k", linestyle=":", label="nothing: bf16")
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set(yscale="log", ylabel="mean |p − q|", title="one part quantised")


def _alternatives(axes: Any, results: Results) -> None:
    of = dict(reversed(results["alternatives"].items()))
    axes.barh(list(of), [gap["mean"] for gap in of.values()], xerr=[gap["error"] for gap in of.values()], color="C0")
    axes.axvline(results["formats"]["bf16"]["mean"], color="k", linestyle=":")
    axes.set(xscale="log", xlabel="mean |p − q| ± standard error", title="alternatives, KV cache in bf16")
    axes.tick_params(axis="y", labelsize=7)


def _by_layer(axes: Any, results: Results) -> None:
    for name, groups in results["layers"]["alone"].items():
        first, mean = ([of[key] for of in groups] for key in ("first", "mean"))
        axes.step([*first, results["model"]["layers"]], [*mean, mean[-1]], where="post", label=name)
    axes.axhline(results["formats"]["bf16"]["mean"], color="k", linestyle=":", label="nothing: bf16")
    axes.set(xlabel="layer", ylabel="mean |p − q|", title="products of a few neighbouring layers quantised")


def _stream(axes: Any, results: Results) -> None:
    for name, errors in results["layers"]["residuals"].items():
        axes.plot(errors, label=name)
    axes.set(yscale="log", xlabel="layer", ylabel="‖x − r‖ / ‖r‖", title="residual stream, all layers quantised")


def _by_product(axes: Any, results: Results) -> None:
    for product in dict.fromkeys(row["product"] for row in results["outliers"]):
        layers = [row for row in results["outliers"] if row["product"] == product]
        shown = [row["mean"] / row["width"] ** 0.5 for row in layers]
        if len(shown) > 1:
            axes.plot(shown, label=product)
    axes.set(xlabel="layer", ylabel="(largest / rms) / √K, mean over tokens", title="what enters the products")
    axes.set_ylim(0, 1)
