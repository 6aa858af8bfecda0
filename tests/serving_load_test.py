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


@pytest.mark.slow
def test_load_over_http_and_its_ends_leave_no_wrong_answer(tmp_path):
    record = tmp_path / "load.json"
    run = [sys.executable, SCRIPT]
    http = ["--protocol", "http", "--json", record]
    subprocess.run([*run, "load", "--requests", "150", "--clients", "2", *http], check=True)
    subprocess.run([*run, "ends", *http], check=True)
    loaded, ended = json.loads(record.read_text()).values()
    statuses = loaded["statuses"]
    assert sum(sum(counts.values()) for counts in statuses.values()) == 150
    for kind in ("long", "streamed", "short", "slow"):
        assert statuses[kind].keys() == {"OK"}
    for kind in ("too large", "malformed", "empty", "not UTF-8", "hostile"):
        assert statuses[kind].keys() == {"REFUSED"}
    assert statuses["cancelled"]["CANCELLED"] > 0
    # none that had begun is cut off, and a server that comes after a killed one answers all
    assert ended["statuses"]["stopped"]["OK"] > 0 and ended["statuses"]["after"] == {"OK": 256}
    assert loaded["faults"] == ended["faults"] == 0
