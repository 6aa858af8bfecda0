"""The benchmark for a GPU, as it runs where there is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_a_dry_run_has_figures_for_every_part_and_goes_on_with_what_is_missing(tmp_path):
    path = tmp_path / "gpu.json"
    run = [sys.executable, SCRIPT, "--dry-run", "--json", path]
    # no part may take so little, so that all are left out
    told = subprocess.run([*run, "--seconds", "10"], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert "train tiny is left out" in told and not path.exists()
    subprocess.run(run, check=True)
    report = json.loads(path.read_text())
    formats = ("bf16", "int8", "fp8")
    decoded, compared = ([f"{part} tiny {name}" for name in formats] for part in ("decode", "ragged"))
    names = ["train tiny", *decoded, *compared, "quickstart", "mismatch"]
    assert list(report["parts"]) == names and report["dry_run"]
    assert not [figures for figures in report["parts"].values() if "error" in figures]
    assert report["parts"]["train tiny"]["tokens_per_second"] > 0
    assert report["parts"]["decode tiny int8"]["2"]["share_of_bandwidth"] > 0
    assert all(0 <= report["parts"][part]["largest_difference"] < 2**-7 for part in compared)
    assert 0 <= report["parts"]["quickstart"]["after"] <= 1
    assert report["parts"]["mismatch"]["here"].keys() == report["parts"]["mismatch"]["cpu"].keys()
    report["parts"]["decode tiny int8"] = {"error": "exit 1"}
    del report["parts"]["train tiny"]
    path.write_text(json.dumps(report))
    told = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert "train tiny:" in told and "decode tiny int8:" in told and "quickstart" not in told
    assert "of a dry run; name another file" in subprocess.run(run[:2] + run[3:], capture_output=True, text=True).stderr
