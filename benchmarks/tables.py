"""Writes the tables of docs/benchmarks.md from the figures in benchmarks/results.

    python benchmarks/tables.py

Each stands between `<!-- NAME.json -->` and the next `<!-- end -->`. Figures come from the benchmark that the page
names above them, with `--json benchmarks/results/NAME.json`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DOCUMENT = RESULTS.parents[1] / "docs" / "benchmarks.md"
PLACE = re.compile(r"(<!-- (\w+)\.json -->\n).*?(<!-- end -->)", re.DOTALL)


def of_comparisons(figures: dict[str, Any]) -> list[str]:
    """What `timing.py` compares: a line for each ratio, its median over rounds with a 95% interval."""
    lines = ["| | | median | ratio [95%] | over |", "| --- | --- | --- | --- | --- |"]
    for comparison in figures["comparisons"]:
        title = f"{comparison['title']}, {comparison['unit']}"
        for row in comparison["rows"]:
            cells = [title, row["program"], f"{row['median']:,.{0 if row['median'] >= 1000 else 1}f}"]
            for ratio in row["ratios"]:
                lines.append(f"| {' | '.join(cells)} | {_interval(ratio)} | {ratio['over']} |")
                # what stands in the line above is not said again
                title, cells = "", ["", "", ""]
    versions = figures["environment"]["versions"]
    rounds, cores = (figures["environment"][name] for name in ("rounds", "cores_used"))
    return [*lines, "", f"jax {versions['jax']}, Python {versions['python']}, {rounds} rounds, cores used: {cores}."]


def of_peers(figures: dict[str, Any]) -> list[str]:
    """CPU-seconds of the same work by several libraries, least and median over rounds."""
    parts = ("rollout", "update", "step")
    lines = ["| CPU-seconds on one core | rollout | update | whole step |", "| --- | --- | --- | --- |"]
    for peer, measured in figures["cpu_seconds_one_core"].items():
        cells = (f"{_seconds(measured[part])}" if part in measured else "" for part in parts)
        lines.append(f"| {peer.replace('_', ' ')} | {' | '.join(cells)} |")
    rollout, step = (figures[f"{name}_vs_best_peer"] for name in ("rollout", "step"))
    told = f"Best of {figures['rounds']} rounds, median in brackets. Against the best of the other libraries, dcjax is"
    return [*lines, "", f"{told} {rollout:.2f} times as fast in rollouts and {step:.2f} times in whole steps."]


def table(figures: dict[str, Any]) -> str:
    """The figures of one benchmark as Markdown."""
    return "\n".join((of_comparisons if "comparisons" in figures else of_peers)(figures))


def filled(text: str) -> str:
    """The document with its tables replaced.

    Raises:
      FileNotFoundError: it asks for figures that are not there.
    """

    def written(place: re.Match) -> str:
        figures = json.loads((RESULTS / f"{place[2]}.json").read_text("utf-8"))
        return f"{place[1]}{table(figures)}\n{place[3]}"

    return PLACE.sub(written, text)


def _interval(ratio: dict[str, Any]) -> str:
    return f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def _seconds(measured: dict[str, float]) -> str:
    return f"{measured['minimum']:.3f} ({measured['median']:.3f})"


def main() -> None:
    """Reads the figures, and writes."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    DOCUMENT.write_text(filled(DOCUMENT.read_text("utf-8")), "utf-8")
    print(f"document: {DOCUMENT}")


if __name__ == "__main__":
    main()
