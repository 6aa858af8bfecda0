"""What a run's first iteration needs is compiled beside its warm start, and then not again."""

import dataclasses
import threading

import jax
import pytest
import tiny
from stepping import Stepper

from dcjax.data.arithmetic import build_tokenizer
from dcjax.loop import compile_ahead as ahead
from dcjax.loop.compile_ahead import compiled_beside
from dcjax.loop.reward_collector import open_rewards
from dcjax.recipe import build
from dcjax.recipe.build import make_engines
from dcjax.serving.mismatch import MismatchConfig
from dcjax.sharding.mesh import make_mesh

pytestmark = pytest.mark.heavy

CONFIG = tiny.CONFIG
"""Of the finished run, so that its programs are most likely in the cache on disk."""


@pytest.fixture
def compiled():
    """Names of the programs that are compiled, or read from the cache, from now on."""
    names = []

    def listen(event, seconds, **about):
        if event.endswith("backend_compile_duration"):
            names.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_the_first_iteration_compiles_no_program_of_its_own_anew(compiled, tmp_path):
    config = dataclasses.replace(CONFIG, run_dir=tmp_path)
    # nothing is compiled yet in this process, whichever tests it ran before
    jax.clear_caches()
    with open_rewards(config) as scorer:
        trainer = Stepper(config, scorer)
        state, loop = trainer.begin()
        programs = ["prefill", "decode", "train_step", "sync", "_begin", "_create_state"]
        assert {f"jit({name})" for name in programs} <= set(compiled)
        compiled.clear()
        trainer.evaluate(state)
        trainer.iterate(state, loop)
    assert not {f"jit({name})" for name in programs} & set(compiled)


def test_the_abstract_batch_is_what_a_rollout_gives(monkeypatch, tmp_path):
    """Here with what truncation leaves and routers choose; without both, a step above is not compiled again."""
    # the programs of iteration_test.py's replay
    drawn = {"replay_routing": True, "top_k": 5, "top_p": 0.9, "temperature": 0.8}
    config = dataclasses.replace(
        tiny.CONFIG,
        rollout=dataclasses.replace(tiny.CONFIG.rollout, **drawn),
        serving=dataclasses.replace(tiny.CONFIG.serving, format="float32"),
        model=dataclasses.replace(tiny.EXPERTS, num_layers=1),
        mismatch=MismatchConfig(routing_flips=1.0),
        warm_start=dataclasses.replace(tiny.CONFIG.warm_start, steps=0),
        run_dir=tmp_path,
    )
    batches = []
    monkeypatch.setattr(build, "compile_train_step", lambda *_: lambda state, batch: batches.append(batch) or 1 / 0)
    with open_rewards(config) as scorer:
        trainer = Stepper(config, scorer)
        with pytest.raises(ZeroDivisionError):
            trainer.iterate(*trainer.begin())

    def described(batch):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), batch)

    assert described(batches[0]) == described(build.abstract_batch(config, trainer.mesh))


def refused(*arguments, **settings):
    raise RuntimeError("no program")


def test_an_error_of_compiling_is_raised_behind_the_warm_start(monkeypatch):
    monkeypatch.setattr(ahead, "compile_sampling", refused)
    monkeypatch.setattr(ahead, "_compile_state", lambda *_: None)
    mesh, reached = make_mesh(CONFIG.mesh), []
    with (
        pytest.raises(RuntimeError, match="no program"),
        compiled_beside(CONFIG, mesh, make_engines(CONFIG, mesh, [build_tokenizer().eos_token_id])),
    ):
        reached.append(True)
    assert reached == [True]


def test_where_the_warm_start_fails_what_is_not_begun_is_left_out(monkeypatch):
    done, began, goes_on = [], threading.Event(), threading.Event()

    def first():
        began.set()
        goes_on.wait(10)
        done.append("first")

    monkeypatch.setattr(ahead, "_in_order", lambda *_: [first, lambda: done.append("second")])
    with pytest.raises(ZeroDivisionError), compiled_beside(CONFIG, make_mesh(CONFIG.mesh), {}):
        began.wait(10)
        threading.Timer(0.2, goes_on.set).start()
        raise ZeroDivisionError
    assert done == ["first"]


def test_without_a_warm_start_nothing_is_compiled_beside_it(monkeypatch):
    monkeypatch.setattr(ahead, "_in_order", refused)
    config = dataclasses.replace(CONFIG, warm_start=dataclasses.replace(CONFIG.warm_start, steps=0))
    with compiled_beside(config, make_mesh(config.mesh), {}):
        pass
