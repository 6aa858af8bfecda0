"""The tables of docs/benchmarks.md are those of the figures."""

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLES = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
DOCUMENT = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")


def test_the_page_is_that_of_the_figures():
    """`python benchmarks/tables.py` writes it."""
    assert TABLES["filled"](DOCUMENT) == DOCUMENT
    # no other table, but those that are filled in
    outside = TABLES["PLACE"].sub("", DOCUMENT)
    assert "\n|" not in outside and len(TABLES["PLACE"].findall(DOCUMENT)) >= 4


def test_a_comparison_has_a_line_for_each_ratio():
    ratio = {"over": "loop", "median": 2.09, "low": 2.0, "high": 2.21, "goal": ""}
    rows = [
        {"program": "ours", "median": 1234.5, "best": 1.0, "ratios": [ratio, ratio | {"over": "other"}]},
        {"program": "loop", "median": 2500.0, "best": 2.0, "ratios": []},
    ]
    figures = {
        "environment": {"versions": {"jax": "0.10.2", "python": "3.11.7"}, "rounds": 11, "cores_used": 1},
        "comparisons": [{"title": "rollout", "unit": "CPU-ms", "rows": rows, "notes": []}],
    }
    assert TABLES["table"](figures).splitlines()[2:5] == [
        "| rollout, CPU-ms | ours | 1,234 | 2.090 [2.000, 2.210] | loop |",
        "|  |  |  | 2.090 [2.000, 2.210] | other |",
        "",
    ]


def test_peers_are_told_with_their_best_and_median():
    figures = json.loads((ROOT / "benchmarks" / "results" / "peers.json").read_text("utf-8"))
    text = TABLES["table"](figures)
    measured = figures["cpu_seconds_one_core"]["tunix"]["step"]
    assert f"{measured['minimum']:.3f} ({measured['median']:.3f}) |" in text
    assert f"{figures['step_vs_best_peer']:.2f} times in whole steps" in text
