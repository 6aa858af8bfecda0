"""The supervised warm start: imitate generated solutions, so that RL starts from a model that can sometimes reason."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from dcjax.assemble import fresh_params, params_shardings
from dcjax.config import Config
from dcjax.data.arithmetic import supervised_batch
from dcjax.errors import RunError
from dcjax.models import token_logps
from dcjax.progress import Progress
from dcjax.record import MetricsLog
from dcjax.rl.masked import token_mean
from dcjax.sharding.rules import batch_sharding, replicated
from dcjax.types import Params

EARLY_SHARE = 0.8
"""Of the updates, before the share of scratchpads changes."""


def warm_start(config: Config, mesh: Mesh, tokenizer: PreTrainedTokenizerFast) -> Params:
    """Fresh parameters after `config.warm_start.steps` supervised updates; logs to warm_start.jsonl.

    Raises:
      RunError: the loss is not finite.
    """
    settings = config.warm_start
    params = fresh_params(config, mesh)
    tx = _optimizer(config)
    # no output shardings are asked for: the moments come back placed like the parameters
    opt_state = jax.jit(tx.init)(params)
    update = _compile_update(config, mesh, tx)
    with (
        MetricsLog(config.directory, "warm_start", last_step=None) as log,
        Progress(settings.steps, initial=0, description="warm start") as progress,
    ):
        for step in range(1, settings.steps + 1):
            params, opt_state, loss = update(params, opt_state, _batch(config, tokenizer, step))
            if step % 10 == 0 or step == settings.steps:
                if not (value := float(loss)) < float("inf"):
                    raise RunError(f"the warm start's loss is {value} at step {step}; lower warm_start.learning_rate")
                log.write(step, {"loss": value})
                progress.update(step, loss=f"{value:.3f}")
    return params


def _optimizer(config: Config) -> optax.GradientTransformation:
    settings = config.warm_start
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        settings.learning_rate,
        min(settings.warmup_steps, settings.steps),
        max(settings.steps, 1),
        end_value=settings.learning_rate / 10,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))


def _batch(config: Config, tokenizer: PreTrainedTokenizerFast, step: int) -> dict[str, np.ndarray]:
    settings, rollout = config.warm_start, config.rollout
    early = step <= EARLY_SHARE * settings.steps
    return supervised_batch(
        config.task,
        tokenizer,
        seed=config.seed,
        step=step,
        batch_size=settings.batch_size,
        scratchpad_fraction=settings.early_scratchpads if early else settings.late_scratchpads,
        prompt_length=rollout.max_prompt_length,
        response_length=rollout.max_response_length,
    )


def _compile_update(config: Config, mesh: Mesh, tx: optax.GradientTransformation):
    def loss(params, batch):
        logps, _ = token_logps(
            config.model,
            params,
            batch["tokens"],
            jnp.concatenate([batch["prompt_mask"], batch["response_mask"]], axis=1),
            response_length=config.rollout.max_response_length,
            temperature=jnp.ones(config.warm_start.batch_size),
        )
        total, count = token_mean(-logps, batch["response_mask"])
        return total / count

    def update(params, opt_state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        changes, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, changes), opt_state, value

    places = params_shardings(config, mesh)
    return jax.jit(
        update,
        in_shardings=(places, None, batch_sharding(mesh)),
        out_shardings=(places, None, replicated(mesh)),
        donate_argnums=(0, 1),
    )
