"""The benchmark of a served policy at a small size: it fails where an answer is wrong or lost, or the log not empty."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "serving_load.py"


@pytest.mark.slow
def test_load_and_nonsense_leave_a_server_that_answers_right(tmp_path):
    record = tmp_path / "load.json"
    run = [sys.executable, SCRIPT]
    subprocess.run([*run, "load", "--requests", "150", "--clients", "2", "--json", record], check=True)
    subprocess.run([*run, "fuzz", "--rounds", "2", "--json", record], check=True)
    parts = json.loads(record.read_text())
    loaded = parts["load tiny, 150 requests, long ones of 48"]
    assert len(parts) == 2
    assert not any(part["faults"] for part in parts.values())
    statuses = loaded["statuses"]
    assert sum(sum(counts.values()) for counts in statuses.values()) == 150
    assert statuses["long"].keys() == statuses["short"].keys() == {"OK"}
    assert statuses["cancelled"]["CANCELLED"] > 0
    assert statuses["too large"].keys() == statuses["malformed"].keys() == {"INVALID_ARGUMENT"}
    assert sum(sum(counts.values()) for counts in parts["fuzz"]["statuses"].values()) == 200
    assert loaded["ratio"] > 0
