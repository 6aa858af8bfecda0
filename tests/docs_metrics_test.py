"""docs/metrics.md names every metric that a run logs, and says what it is."""

import ast
import re
from pathlib import Path

import pytest

from dcjax.reporting.record import read_metrics

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "metrics.md").read_text()
ROWS = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
NAMED = {name for cells in ROWS for name in re.findall(r"`([^`]+)`", cells[0])}
PATTERNS = tuple(name for name in NAMED if name.endswith("/"))
PREFIXES = ("mismatch", "staleness", "distribution", "dual", "eval", "kl", "router", "skew", "time")


def test_each_row_says_what_formula_and_which_unit():
    assert len(NAMED) > 100
    for cells in ROWS:
        assert len(cells) == 4 and all(cell.strip(" |") for cell in cells), cells


@pytest.mark.heavy
def test_what_a_run_logs_is_named(finished_run):
    logged = {
        name
        for stem in ("metrics", "warm_start")
        for line in read_metrics(finished_run / f"{stem}.jsonl")
        for name in line
    }
    assert len(logged) > 50
    assert {name for name in logged - NAMED if not name.startswith(PATTERNS)} == {"step"}


def literals():
    """Texts of the code that look like metrics' names."""
    for folder in ("rl", "loop", "models"):
        for path in (ROOT / "dcjax" / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                text = node.value if isinstance(node, ast.Constant) else None
                if isinstance(text, str) and re.fullmatch(rf"({'|'.join(PREFIXES)})/\w+", text):
                    yield text


def test_what_the_code_names_is_named():
    found = set(literals())
    assert len(found) > 10
    assert found <= NAMED
