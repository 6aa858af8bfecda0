"""The main job as a user runs it: the quickstart recipe, whole, in processes of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from dcjax.record import read_metrics

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parent.parent


def quickstart(run_dir, *overrides):
    command = [sys.executable, "-m", "dcjax", "train", "quickstart", "--run-dir", str(run_dir), *overrides]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    return read_metrics(run_dir / "metrics.jsonl")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_deployed_policy_learns_to_reason_while_the_multiplier_rises_and_falls(tmp_path, seed):
    metrics = quickstart(tmp_path / "run", "--seed", str(seed))
    steps = metrics[1:]
    assert len(steps) <= 100
    assert metrics[0]["eval/deployed_accuracy"] <= 0.25
    assert steps[-1]["eval/deployed_accuracy"] >= 0.85
    assert metrics[0]["eval/prompts"] == steps[-1]["eval/prompts"] == 512

    multipliers = [line["dual/multiplier"] for line in steps]
    peak = multipliers.index(max(multipliers))
    assert multipliers[peak] > multipliers[0]
    assert min(multipliers[peak:]) < multipliers[0]

    lengths = [line["response_length"] for line in steps]
    assert sum(lengths[-10:]) / 10 >= 2 * lengths[0]


def test_without_a_format_between_them_the_two_policies_agree_on_every_token_of_a_run(tmp_path):
    metrics = quickstart(tmp_path / "run", "serving.format=float32")
    gaps = [line["mismatch/prob_diff_max"] for line in metrics[1:]]
    assert 0 < max(gaps) <= 1e-4
