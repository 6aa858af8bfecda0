"""The gap of every format on the model, as the benchmark that writes the table of it measures it."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from launching import fake_devices

from dcjax.serving.formats import formats

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "smollm2.py"


def test_gaps_are_in_the_order_of_their_bits_and_int8_is_within_twice_that_of_bf16(folder, tmp_path):
    path = tmp_path / "smollm2.json"
    subprocess.run([sys.executable, SCRIPT, folder, "--json", path], check=True, env=fake_devices(1))
    measured = json.loads(path.read_text())
    assert measured["format"] == "int8" and measured["responses"] == 16 and measured["tokens"] > 500
    found = measured["formats"]
    # a format that is not served, or whose log-probs are not finite, has no gap
    assert {name for name, gap in found.items() if "prob_diff_mean" in gap} == formats.keys()
    means = {name: gap["prob_diff_mean"] for name, gap in found.items()}
    assert all(means[narrower] > means[wider] for wider, narrower in pairwise(("float32", "bf16", "int8", "w8a8")))
    assert means["float32"] < 1e-5
    assert means["int8"] <= 2 * means["bf16"]
    assert found["int8"]["bytes"] <= 0.3 * found["int8"]["float32_bytes"]
