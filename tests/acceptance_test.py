"""The main job as a user runs it: the quickstart recipe, whole, in processes of its own."""

from pathlib import Path

import pytest
from launching import ended, processes

from dcjax.reporting.record import read_metrics

pytestmark = pytest.mark.slow
RECIPE = Path(__file__).parent.parent / "dcjax" / "recipes" / "quickstart.py"


def quickstart(run_dir, *overrides, count=1, devices=1):
    with processes(RECIPE, run_dir, *overrides, count=count, devices=devices) as started:
        assert [ended(process) for process in started] == [(0, [])] * count
    assert (run_dir / "report.html").exists()
    return read_metrics(run_dir / "metrics.jsonl")


def assert_learnt(metrics):
    """The deployed policy learns to reason while the multiplier rises and falls."""
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


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_deployed_policy_learns_to_reason(tmp_path, seed):
    assert_learnt(quickstart(tmp_path / "run", "--seed", str(seed)))


def test_so_it_does_on_eight_devices(tmp_path):
    axes = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "serving.tensor=2"]
    assert_learnt(quickstart(tmp_path / "run", *axes, devices=8))


def test_so_it_does_when_it_is_sampled_ahead_on_devices_of_their_own(tmp_path):
    apart = ["mesh.fsdp=2", "serving.devices=2", "rollout.async_level=1"]
    assert_learnt(quickstart(tmp_path / "run", *apart, devices=4))


@pytest.mark.parametrize(("count", "axes"), [(2, ["mesh.fsdp=2"]), (4, ["mesh.data=4"])])
def test_so_it_does_by_several_processes(tmp_path, count, axes):
    assert_learnt(quickstart(tmp_path / "run", *axes, count=count))


def test_without_a_format_between_them_the_two_policies_agree_on_every_token_of_a_run(tmp_path):
    metrics = quickstart(tmp_path / "run", "serving.format=float32")
    gaps = [line["mismatch/prob_diff_max"] for line in metrics[1:]]
    assert 0 < max(gaps) <= 1e-4
