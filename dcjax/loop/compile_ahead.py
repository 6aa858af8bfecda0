"""The programs of a run's first iteration, compiled beside its warm start rather than behind it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from dcjax.loop.self_checks import WeightCheck
from dcjax.recipe import build
from dcjax.recipe.build import build_optimizer
from dcjax.recipe.config import Config
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.rollout import compile_sampling
from dcjax.serving.scoring import lower_reading
from dcjax.types import Params


@contextlib.contextmanager
def compiled_beside(config: Config, mesh: Mesh, engines: Mapping[Any, Qwen3Engine]) -> Iterator[None]:
    """Compiles, in a thread, what comes first behind the warm start that is under way; its end waits for the rest.

    Nothing where there is no warm start, and on several devices, whose programs are compiled where they first run.
    An error of compiling is raised behind the warm start.
    """
    if not config.warm_start.steps or mesh.size > 1 or config.serving.devices or jax.process_count() > 1:
        yield
        return
    compiler = ThreadPoolExecutor(1, "compiler")
    try:
        programs = [compiler.submit(compile_next) for compile_next in _in_order(config, mesh, engines)]
        yield
        for program in programs:
            program.result()
    finally:
        # what is not begun is left out where the warm start failed
        compiler.shutdown(cancel_futures=True)


def _in_order(config: Config, mesh: Mesh, engines: Mapping[Any, Qwen3Engine]) -> Iterator[Callable[[], None]]:
    """What compiles the first evaluation, the first rollout and the first update."""
    params = build.abstract_starting_params(config, mesh)
    yield partial(_compile_state, config, mesh, params)
    for engine in engines.values():
        yield partial(compile_sampling, engine, params, prompts=config.evaluation.prompts, samples_per_prompt=1)
    sizes = {"prompts": config.rollout.prompts, "samples_per_prompt": config.rollout.group_size}
    yield partial(compile_sampling, engines["deployed"], params, **sizes)
    if build.reads_sampler(config):
        yield partial(_compile_reading, engines["deployed"], params, config.rollout.sequences)
    if config.self_checks:
        yield partial(_compile_check, engines["deployed"], mesh, params)
    yield partial(_compile_update, config, mesh)


def _compile_state(config: Config, mesh: Mesh, params: Params) -> None:
    initializer = build.state_initializer(config, mesh, build_optimizer(config), build.PastParams.needed_by(config))
    initializer.lower(params).compile()


def _compile_check(engine: Qwen3Engine, mesh: Mesh, params: Params) -> None:
    WeightCheck(engine, mesh).compile(params, engine.compile_sync(params))


def _compile_reading(engine: Qwen3Engine, params: Params, rows: int) -> None:
    lower_reading(engine, engine.compile_sync(params), rows).compile()


def _compile_update(config: Config, mesh: Mesh) -> None:
    step: Any = build.compile_train_step(config, mesh)
    step.lower(build.abstract_state(config, mesh), build.abstract_batch(config, mesh)).compile()
