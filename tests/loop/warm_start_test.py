import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny

from dcjax.data.arithmetic import build_tokenizer
from dcjax.data.problems import FixedProblems, TextProblem
from dcjax.errors import RunError
from dcjax.loop import warm_start as module
from dcjax.loop.warm_start import warm_start
from dcjax.recipe.build import starting_params
from dcjax.reporting.record import read_metrics
from dcjax.sharding.mesh import MeshConfig, make_mesh

pytestmark = pytest.mark.heavy

CONFIG = tiny.CONFIG


def warmed_up(directory, config=CONFIG, problems=CONFIG.task, **settings):
    """The parameters after a warm start, and its log."""
    settings = dataclasses.replace(config.warm_start, **settings)
    config = dataclasses.replace(config, run_dir=directory, warm_start=settings)
    params = warm_start(config, make_mesh(config.mesh), build_tokenizer(), problems)
    return jax.device_get(params), read_metrics(directory / "warm_start.jsonl")


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return warmed_up(tmp_path_factory.mktemp("usual"))


def same(ours, theirs):
    return jax.tree.structure(ours) == jax.tree.structure(theirs) and all(
        one.tobytes() == other.tobytes()
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    )


def test_the_loss_falls_from_that_of_a_uniform_guess(usual):
    losses = [record["loss"] for record in usual[1]]
    # cross-entropy per token in nats; 20 tokens are guessed at ln 20 = 3.00
    assert losses[0] < np.log(20)
    assert losses[-1] < 0.75 * losses[0]


def test_every_tenth_update_and_the_last_are_logged(usual):
    assert [record["step"] for record in usual[1]] == [10, 20, 30, 35]
    assert all(set(record) == {"step", "loss", "grad_norm"} for record in usual[1])


def test_every_parameter_is_trained(usual):
    fresh = jax.device_get(starting_params(CONFIG, make_mesh(CONFIG.mesh)))
    for (path, before), after in zip(jax.tree.leaves_with_path(fresh), jax.tree.leaves(usual[0]), strict=True):
        assert before.dtype == after.dtype == np.float32
        assert np.isfinite(after).all() and (before != after).any(), jax.tree_util.keystr(path)


def test_the_same_seed_gives_the_same_parameters_and_log(usual, tmp_path):
    params, log = warmed_up(tmp_path)
    assert same(params, usual[0]) and log == usual[1]


def test_another_seed_gives_others(usual, tmp_path):
    params, log = warmed_up(tmp_path, dataclasses.replace(CONFIG, seed=1))
    assert not same(params, usual[0])
    assert log[0]["loss"] != usual[1][0]["loss"]


def test_no_steps_leave_the_fresh_parameters(tmp_path):
    params, log = warmed_up(tmp_path, steps=0)
    assert same(params, jax.device_get(starting_params(CONFIG, make_mesh(CONFIG.mesh))))
    assert log == []


def test_a_warm_start_begun_again_replaces_the_log_of_the_one_that_was_killed(usual, tmp_path):
    lines = [json.dumps({"step": step, "loss": 9.0, "grad_norm": 9.0}) for step in (10, 20)]
    (tmp_path / "warm_start.jsonl").write_text("\n".join(lines) + '\n{"step": 30, "lo')
    assert warmed_up(tmp_path)[1] == usual[1]


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "warmup_steps"), [(5, 5), (1, 0), (1, 1), (1, 50)])
def test_any_warm_up_goes_with_any_number_of_steps_and_any_batch(tmp_path, steps, warmup_steps):
    params, log = warmed_up(tmp_path, steps=steps, warmup_steps=warmup_steps, batch_size=12)
    assert log[-1]["step"] == steps
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(("steps", "warmup_steps"), [(5, 5), (1, 0), (1, 1), (1, 50)])
def test_any_warm_up_goes_with_any_number_of_steps(steps, warmup_steps):
    settings = dataclasses.replace(CONFIG.warm_start, steps=steps, warmup_steps=warmup_steps)
    tx = module._optimizer(settings, "float32")
    params = {"w": np.ones(3, np.float32)}
    changes, _ = tx.update(params, tx.init(params), params)
    assert np.isfinite(changes["w"]).all() and (np.any(changes["w"] != 0) == (warmup_steps == 0))


@pytest.mark.slow
def test_two_devices_warm_up_as_one_does(usual, tmp_path):
    _, log = warmed_up(tmp_path, dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=2)))
    assert log[0]["loss"] == pytest.approx(usual[1][0]["loss"], rel=1e-4)


@pytest.fixture
def infinite(monkeypatch):
    """Updates that give an infinite loss."""
    metrics = {"loss": np.float32(np.inf), "grad_norm": np.float32(1)}
    compiled = module._optimizer(CONFIG.warm_start, "float32"), lambda state, batch: (state, metrics)
    monkeypatch.setattr(module, "_compile_update", lambda *described: compiled)


def test_a_loss_that_is_not_finite_stops_the_warm_start(infinite, tmp_path):
    with pytest.raises(RunError, match=r"warm start, step 10: .*lower warm_start.learning_rate"):
        warmed_up(tmp_path)
    assert read_metrics(tmp_path / "warm_start.jsonl") == []


@pytest.mark.slow
def test_a_learning_rate_that_is_too_large_stops_the_warm_start(tmp_path):
    with pytest.raises(RunError, match=r"warm start, step 10: .*lower warm_start.learning_rate"):
        warmed_up(tmp_path, learning_rate=3e38)


def test_a_task_without_solutions_cannot_be_imitated(tmp_path):
    problems = FixedProblems([TextProblem("1+1=", "2")], [TextProblem("1+2=", "3")])
    with pytest.raises(
        RunError, match=r"warm_start\.steps is 35; this task has no solutions to imitate, so it must be 0"
    ):
        warmed_up(tmp_path, problems=problems)
