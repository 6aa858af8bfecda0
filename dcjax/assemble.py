"""From a `Config` to the objects that it describes."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dcjax.config import Config
from dcjax.errors import RunError
from dcjax.models import init_params, load_hf, logical_axes, read_config, token_logps
from dcjax.rl.discrepancy import probability_difference
from dcjax.rl.losses import clipped_surrogate
from dcjax.rl.objective import (
    LossTransform,
    chain,
    discrepancy_penalty,
    drop_zero_variance,
    group_relative_advantages,
)
from dcjax.rl.step import TrainStep, make_train_step
from dcjax.rl.transforms import dual_ascent, dynamic_loss_scale
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.quantize import FormatName
from dcjax.sharding.rules import batch_sharding, replicated, shardings
from dcjax.types import Array, Batch, Metrics, Params, TrainState

Optimizer = optax.GradientTransformationExtraArgs


def make_schedule(config: Config) -> optax.Schedule:
    """Learning rate by optimiser update: linear warm-up, then constant."""
    optimizer = config.optimizer
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, optimizer.learning_rate, optimizer.warmup_steps),
            optax.constant_schedule(optimizer.learning_rate),
        ],
        [optimizer.warmup_steps],
    )


def make_optimizer(config: Config) -> Optimizer:
    """One chain: gradient clip, AdamW, learning rate and, for dc_grpo, λ's dual ascent."""
    optimizer, objective = config.optimizer, config.objective
    descent = optax.chain(
        optax.clip_by_global_norm(optimizer.max_grad_norm),
        optax.adamw(
            make_schedule(config),
            b1=optimizer.beta1,
            b2=optimizer.beta2,
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
        ),
    )
    transforms: list[optax.GradientTransformation] = [scale_loss(config, descent)]
    if objective.algorithm == "dc_grpo":
        ascent = dual_ascent(
            objective.dual_lr,
            budget=objective.budget,
            init_value=objective.initial_multiplier,
            max_value=objective.max_multiplier,
            every=optimizer.updates,
        )
        transforms.append(ascent)
    return optax.with_extra_args_support(optax.chain(*transforms))


def scale_loss(config: Config, descent: optax.GradientTransformation) -> optax.GradientTransformation:
    """Gradients in fp16 need a scaled loss; λ stays outside, since an overflow says nothing about the gap."""
    return dynamic_loss_scale(descent) if config.model.precision.compute == "fp16" else descent


def make_objective(config: Config) -> LossTransform:
    """Group-relative advantages, zero-variance groups dropped if asked, and dc_grpo's penalty."""
    transforms = [group_relative_advantages()]
    if config.objective.zero_variance == "drop":
        transforms.append(drop_zero_variance())
    if config.objective.algorithm == "dc_grpo":
        transforms.append(discrepancy_penalty(probability_difference))
    return chain(*transforms)


def apply_policy(config: Config, params: Params, batch: Batch) -> tuple[Array, Array, dict[str, Array]]:
    """The training policy's log-probs and entropies of a batch's responses, at the sampler's temperature.

    And, where the model has experts, what its routers did, by row.
    """
    scores = token_logps(
        config.model,
        params,
        batch.tokens,
        batch.attention_mask,
        response_length=batch.response_mask.shape[1],
        temperature=batch.temperature,
    )
    return scores.logps, scores.entropy, {} if scores.router is None else scores.router.metrics


def params_shardings(config: Config, mesh: Mesh) -> Params:
    """Where each parameter lives."""
    return shardings(mesh, logical_axes(config.model))


def with_pretrained_model(config: Config) -> Config:
    """The config with the architecture that `pretrained` has, if it names a folder.

    Raises:
      RunError: the folder holds no model that is supported.
    """
    if config.pretrained is None:
        return config
    model = config.model
    computed = {name: getattr(model, name) for name in ("remat", "attention", "head_chunk", "precision")}
    try:
        return dataclasses.replace(config, model=dataclasses.replace(read_config(config.pretrained), **computed))
    except ValueError as error:
        raise RunError(str(error)) from None


def starting_params(config: Config, mesh: Mesh) -> Params:
    """Parameters before any update, created where they live: of `pretrained`, or fresh from the seed.

    Raises:
      RunError: the weights in the folder are damaged, or not of its architecture.
    """
    if config.pretrained is not None:
        try:
            return load_hf(config.pretrained, dtype=config.model.precision.parameters, mesh=mesh)[1]
        except ValueError as error:
            raise RunError(str(error)) from None
    create = jax.jit(partial(init_params, config.model), out_shardings=params_shardings(config, mesh))
    return create(jax.random.key(config.seed))


def state_shardings(config: Config, mesh: Mesh, tx: Optimizer) -> Any:
    """Where each leaf of the TrainState lives: Adam's moments beside their parameters, scalars everywhere."""
    params = params_shardings(config, mesh)
    everywhere: Any = replicated(mesh)
    shapes = jax.eval_shape(partial(init_params, config.model), jax.random.key(0))
    opt_state = optax.tree.map_params(
        tx.init,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, shapes),
        params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(step=everywhere, params=params, opt_state=opt_state, grad_norm_smoothed=everywhere)


def _create_state(tx: Optimizer, params: Params) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jnp.zeros(()))


def initial_state(config: Config, mesh: Mesh, tx: Optimizer, params: Params) -> TrainState:
    """Step 0 from given parameters, which are donated."""
    places = state_shardings(config, mesh, tx)
    return jax.jit(partial(_create_state, tx), out_shardings=places, donate_argnums=0)(params)


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the RL TrainState, to restore a checkpoint into."""
    tx = make_optimizer(config)
    shapes = jax.eval_shape(lambda key: _create_state(tx, init_params(config.model, key)), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(config, mesh, tx),
    )


def compile_step(config: Config, mesh: Mesh, tx: Optimizer, step: TrainStep) -> TrainStep:
    """A step jitted on a mesh: the state where it lives and donated, the batch's rows split, metrics everywhere."""
    state = state_shardings(config, mesh, tx)
    return jax.jit(
        step, in_shardings=(state, batch_sharding(mesh)), out_shardings=(state, replicated(mesh)), donate_argnums=0
    )


def compile_train_step(config: Config, mesh: Mesh) -> TrainStep:
    """The RL step."""
    objective, optimizer, tx = config.objective, config.optimizer, make_optimizer(config)
    step = make_train_step(
        partial(apply_policy, config),
        tx,
        partial(clipped_surrogate, eps_low=objective.eps_low, eps_high=objective.eps_high),
        make_objective(config),
        group_size=config.rollout.group_size,
        microbatch_size=optimizer.microbatch_size,
        updates=optimizer.updates,
    )
    return compile_step(config, mesh, tx, step)


def metrics_to_host(metrics: Metrics) -> dict[str, float]:
    """A step's metrics as floats. One whose gradients overflowed at its loss scale, and were left out, has no norm."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if values.get("overflow"):
        del values["grad_norm"]
    return values


def make_engine(config: Config, format: FormatName, mesh: Mesh, end_token: int) -> Qwen3Engine:
    """A serving engine for the run's prompts and responses."""
    return Qwen3Engine(
        config.model,
        format=format,
        slots=config.serving.slots,
        max_prompt_length=config.rollout.max_prompt_length,
        max_response_length=config.rollout.max_response_length,
        end_token=end_token,
        steps_per_call=config.serving.steps_per_call,
        mesh=mesh,
    )
