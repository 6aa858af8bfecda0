"""A suite's result for people: as tables in Markdown and as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcjax.reporting.record import write_atomically
from dcjax.tools.suite.benchmarks import SUITES
from dcjax.tools.suite.published import BENCHMARKS, PUBLISHED, Published
from dcjax.tools.suite.result import RESULT, Compared, Estimate, Score, SuiteResult, compare, differences, to_json

# Okabe and Ito's colours, which people with the common colour-vision deficiencies can tell apart.
_COLOURS = {"deployed": "#0072B2", "training": "#D55E00"}
_MARKERS = {"GRPO": "x", "DC-GRPO": "+"}

Row = Sequence[str]


def write_result(result: SuiteResult, directory: Path, against: SuiteResult | None = None) -> dict[str, Path]:
    """Writes suite.json, suite.md and suite.png into a directory; returns the paths by kind."""
    paths = {"json": directory / RESULT, "table": directory / "suite.md", "plot": directory / "suite.png"}
    write_atomically(paths["json"], to_json(result).encode() + b"\n")
    write_atomically(paths["table"], to_markdown(result, against).encode())
    write_atomically(paths["plot"], draw(result))
    return paths


# --- the tables ---


def to_markdown(result: SuiteResult, against: SuiteResult | None = None) -> str:
    """Accuracies beside the published ones, the other statistics, and the differences, in percent."""
    settings = result.settings
    lines = [
        f"# {result.title}: suite {result.suite}",
        "",
        f"Temperature {settings['temperature']:g}, top-p {settings['top_p']:g}, at most "
        f"{settings['max_response_length']:,} tokens, {_asked(settings)}, seed {settings['seed']}. "
        "Accuracies in percent, with 95% intervals over problems.",
        *(f"- {note}" for note in result.notes),
        *_unreadable(result),
        *_section("avg@k", _accuracy_rows(result)),
        *_section("Beside it", _detail_rows(result)),
        *_section("Deployed less training policy", _gap_rows(result)),
    ]
    if against is not None:
        rows = [(f"{policy} policy", compared) for policy, compared in compare(result, against).items()]
        lines += _section(f"{result.title} less {against.title}", _difference_rows(result, rows))
        # Results of earlier versions do not say what ended a response.
        ours, theirs = (each.settings.get("stop_tokens") for each in (result, against))
        if theirs is not None and ours != theirs:
            lines += ["", f"Not measured alike: responses end in tokens {ours} here and {theirs} there."]
    return "\n".join(lines) + "\n"


def _asked(settings: dict[str, Any]) -> str:
    """The template, and what was added to it; results of earlier versions do not say the latter."""
    thinking, start = settings.get("thinking") or "auto", settings.get("answer_start")
    told = f"template {settings['template']}" + ("" if thinking == "auto" else f", thinking {thinking}")
    told += f", system prompt {system!r}" if (system := settings.get("system_prompt")) else ""
    return told + (f", answers begin with {start!r}" if start else "")


def _unreadable(result: SuiteResult) -> list[str]:
    """The golds that cannot be read, a line for each benchmark, and how they count."""
    counts = {score.benchmark: score.problems for score in result.policies[0].benchmarks}
    return [
        f"- {benchmark}: {len(golds)} of {counts[benchmark]} golds cannot be read; only their own text is right, and "
        f"any other answer counts as wrong: {', '.join(f'{gold!r} of {problem}' for problem, gold in golds.items())}"
        for benchmark, golds in result.unreadable.items()
    ]


def _section(title: str, rows: list[Row]) -> list[str]:
    """A heading, and a table whose columns are padded to stand below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return ["", f"## {title}", "", padded[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *padded[1:]]


def _titles(result: SuiteResult) -> list[str]:
    return [benchmark.title for benchmark in SUITES[result.suite]]


def _accuracy_rows(result: SuiteResult) -> list[Row]:
    samples = [score.samples for score in result.policies[0].benchmarks]
    header = [f"{title} @{k}" for title, k in zip(_titles(result), samples, strict=True)]
    ours = [
        (
            f"{row.policy} ({row.format})",
            *(_estimate(score.accuracy) for score in row.benchmarks),
            _estimate(row.average),
        )
        for row in result.policies
    ]
    theirs = [(row.name, *(f"{score:.1f}" for score in row.scores), f"{row.average:.1f}") for row in PUBLISHED]
    return [("policy", *header, "average"), *ours, *(theirs if _is_published(result) else [])]


def _is_published(result: SuiteResult) -> bool:
    return tuple(benchmark.dataset for benchmark in SUITES[result.suite]) == BENCHMARKS


def _detail_rows(result: SuiteResult) -> list[Row]:
    header = ("benchmark", "policy", "problems", "k", "pass@k", "maj@k", "mean length", "unfinished")
    scores = zip(_titles(result), *(row.benchmarks for row in result.policies), strict=True)
    return [
        header,
        *(
            (title, policy.policy, *_details(score))
            for title, *both in scores
            for policy, score in zip(result.policies, both, strict=True)
        ),
    ]


def _details(score: Score) -> Row:
    k = score.samples
    return (
        str(score.problems),
        str(k),
        _estimate(score.pass_at[k]),
        _estimate(score.majority_at[k]),
        f"{score.mean_length:,.1f}",
        f"{score.unfinished} ({score.unfinished_share:.1%})",
    )


def _gap_rows(result: SuiteResult) -> list[Row]:
    deployed, training = result.policies
    return _difference_rows(result, [(f"{deployed.format} less {training.format}", differences(deployed, training))])


def _difference_rows(result: SuiteResult, rows: list[tuple[str, list[Compared]]]) -> list[Row]:
    return [
        ("difference", *_titles(result), "average"),
        *((label, *map(_difference, compared)) for label, compared in rows),
    ]


def _estimate(estimate: Estimate) -> str:
    lower, upper = estimate.interval
    return f"{100 * estimate.value:.1f} ({100 * lower:.1f} to {100 * upper:.1f})"


def _difference(compared: Compared) -> str:
    lower, upper = compared.interval
    return f"{100 * compared.difference:+.1f} ({100 * lower:+.1f} to {100 * upper:+.1f}), p {compared.p_value:.2g}"


# --- the picture ---


def draw(result: SuiteResult) -> bytes:
    """Accuracies as bars with their intervals, published ones as marks, as a PNG."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rc = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    with style.context(["default", rc]):
        figure = Figure(figsize=(11, 5.5), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.14))
        figure.suptitle(f"{result.title}: avg@k", fontsize=15, fontweight="bold", parse_math=False)
        axes = figure.subplots()
        titles = [*_titles(result), "average"]
        for place, row in enumerate(result.policies):
            estimates = [*(score.accuracy for score in row.benchmarks), row.average]
            _bars(axes, place, f"{row.policy} ({row.format})", _COLOURS[row.policy], estimates)
        if _is_published(result):
            for algorithm, marker in _MARKERS.items():
                _marks(axes, [row for row in PUBLISHED if row.algorithm == algorithm], algorithm, marker)
        axes.set_xticks(range(len(titles)), titles)
        axes.set_ylim(0, 100)
        axes.set_ylabel("accuracy (%), 95% interval over problems")
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=4)
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
    return stream.getvalue()


def _bars(axes, place: int, label: str, colour: str, estimates: list[Estimate]) -> None:
    at = [column + 0.36 * (place - 0.5) for column in range(len(estimates))]
    heights = [100 * estimate.value for estimate in estimates]
    lower = [100 * (estimate.value - estimate.interval[0]) for estimate in estimates]
    upper = [100 * (estimate.interval[1] - estimate.value) for estimate in estimates]
    axes.bar(at, heights, width=0.34, color=colour, label=label)
    axes.errorbar(at, heights, [lower, upper], fmt="none", ecolor="black", elinewidth=1.2, capsize=3)


def _marks(axes, rows: list[Published], algorithm: str, marker: str) -> None:
    at = [column for row in rows for column in range(len(row.scores) + 1)]
    heights = [score for row in rows for score in (*row.scores, row.average)]
    axes.plot(at, heights, marker, color="0.35", markersize=7, label=f"published, {algorithm}")
