"""The supervised warm start: imitate generated solutions, so that RL starts from a model that can sometimes reason."""

from __future__ import annotations

import contextlib
import logging
import math
from functools import cache
from types import TracebackType
from typing import Self

import numpy as np
import optax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from dcjax.data.task import Problems, supervised_batch
from dcjax.errors import RunError
from dcjax.models.config import DtypeName, ModelConfig
from dcjax.recipe.build import compile_step, initial_state, make_apply_fn, metrics_to_host, starting_params
from dcjax.recipe.config import Config, WarmStartConfig
from dcjax.recipe.optimizer import scale_loss
from dcjax.reporting.progress import Progress
from dcjax.reporting.record import MetricsLog
from dcjax.rl.losses import negative_log_likelihood
from dcjax.rl.step import TrainStep, make_train_step
from dcjax.rl.transforms import chain
from dcjax.sharding.hosts import is_main, place
from dcjax.sharding.rules import batch_sharding
from dcjax.types import Batch, Bins, Params, Sequences
from dcjax.user_code import refusals_of

_log = logging.getLogger(__name__)

EARLY_SHARE = 0.8
"""Share of the updates before the share of scratchpads changes."""
LOG_EVERY = 10
"""Updates between lines of warm_start.jsonl."""


def warm_start(config: Config, mesh: Mesh, tokenizer: PreTrainedTokenizerFast, problems: Problems) -> Params:
    """Starting parameters after `config.warm_start.steps` supervised updates; logs to warm_start.jsonl.

    Raises:
      RunError: the loss is not finite, the pretrained weights cannot be loaded, or the task has nothing to imitate that
        fits.
    """
    if config.pretrained is not None:
        _log.info("loading the weights of %s", config.pretrained)
    params = starting_params(config, mesh)
    with _Log(config) as log:
        # without updates there is no need of an optimiser, whose moments are twice the parameters
        return _imitate(config, mesh, tokenizer, problems, params, log) if config.warm_start.steps else params


def _imitate(
    config: Config, mesh: Mesh, tokenizer: PreTrainedTokenizerFast, problems: Problems, params: Params, log: _Log
) -> Params:
    """The parameters after all updates; those that are given are donated."""
    settings, packing = config.warm_start, config.warm_start_packing()
    tx, update = _compile_update(config.model, settings, packing.bins, mesh)
    state = initial_state(config, mesh, tx, params)
    log.phase("update")
    for count in range(1, settings.steps + 1):
        batch = packing(_batch(config, tokenizer, problems, count))
        state, metrics = update(state, place(batch, batch_sharding(mesh)))
        if count % LOG_EVERY == 0 or count == settings.steps:
            values = metrics_to_host(metrics)
            shown = {name: values[name] for name in ("loss", "grad_norm", "loss_scale") if name in values}
            if not all(map(math.isfinite, shown.values())):
                raise RunError(f"warm start, step {count}: {shown}; lower warm_start.learning_rate")
            log.write(count, shown)
    return state.params


@cache
def _compile_update(
    model: ModelConfig, settings: WarmStartConfig, bins: Bins, mesh: Mesh
) -> tuple[optax.GradientTransformationExtraArgs, TrainStep]:
    tx = _optimizer(settings, model.precision.compute)
    supervised_step = make_train_step(
        make_apply_fn(model, mesh, bins), tx, negative_log_likelihood, chain(), group_size=1
    )
    return tx, compile_step(model, mesh, tx, supervised_step)


class _Log:
    """Writes and shows the values of an update, on process 0; nothing on others. A context manager."""

    def __init__(self, config: Config):
        self._config, self._open = config, contextlib.ExitStack()

    def __enter__(self) -> Self:
        if is_main():
            steps = self._config.warm_start.steps
            self._metrics = self._open.enter_context(MetricsLog(self._config.directory, "warm_start", last_step=None))
            self._progress = self._open.enter_context(Progress(steps, initial=0, description="warm start"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def phase(self, name: str) -> None:
        if is_main():
            self._progress.phase(name)

    def write(self, count: int, values: dict[str, float]) -> None:
        if is_main():
            self._metrics.write(count, values)
            self._progress.update(count, loss=f"{values['loss']:.3f}")


def _optimizer(settings: WarmStartConfig, compute: DtypeName) -> optax.GradientTransformationExtraArgs:
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        decay_steps=max(settings.steps, settings.warmup_steps + 1),
        end_value=settings.learning_rate / 10,
    )
    descent = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
    return optax.with_extra_args_support(scale_loss(descent, compute))


def _batch(config: Config, tokenizer: PreTrainedTokenizerFast, problems: Problems, step: int) -> Batch:
    settings, rollout = config.warm_start, config.rollout
    early = step <= EARLY_SHARE * settings.steps
    with refusals_of(config.task, problems):
        demonstrations = problems.demonstrations(
            seed=config.seed,
            step=step,
            count=settings.batch_size,
            scratchpad_fraction=settings.early_scratchpads if early else settings.late_scratchpads,
        )
    if not demonstrations:
        raise RunError(f"warm_start.steps is {settings.steps}; this task has no solutions to imitate, so it must be 0")
    if (count := len(demonstrations)) != settings.batch_size:
        raise RunError(
            f"the task gave {count} demonstrations; it was asked for warm_start.batch_size {settings.batch_size}"
        )
    try:
        examples = supervised_batch(
            tokenizer,
            demonstrations,
            prompt_length=rollout.max_prompt_length,
            response_length=rollout.max_response_length,
        )
    except ValueError as error:
        raise RunError(f"warm start: {error}") from None
    sequences = Sequences(
        **examples,
        rollout_logps=np.zeros(examples["response_mask"].shape, np.float32),
        temperature=np.ones(settings.batch_size, np.float32),
    )
    return Batch.of(sequences, rewards=np.zeros(settings.batch_size, np.float32), group_size=1)
