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
from dcjax.models import abstract_params, init_params, load_hf, logical_axes, read_config, token_logps
from dcjax.objective import (
    make_aggregation,
    make_discrepancy,
    make_mean_discrepancy,
    make_objective,
    make_surrogate,
)
from dcjax.optimizer import make_optimizer
from dcjax.rl.step import TrainStep, make_train_step
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.quantize import FormatName
from dcjax.sharding.layout import mesh_layout
from dcjax.sharding.rules import batch_sharding, replicated, shardings
from dcjax.types import Array, Batch, Metrics, Params, TrainState

Optimizer = optax.GradientTransformationExtraArgs


def apply_policy(config: Config, mesh: Mesh, params: Params, batch: Batch) -> tuple[Array, Array, dict[str, Array]]:
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
        layout=mesh_layout(mesh),
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


def state_shardings(config: Config, mesh: Mesh, tx: Optimizer, *, keeps_reference: bool = False) -> Any:
    """Where each leaf of the TrainState lives: moments and averages beside their parameters, scalars everywhere."""
    params = params_shardings(config, mesh)
    everywhere: Any = replicated(mesh)
    shapes = abstract_params(config.model)
    opt_state = optax.tree.map_params(
        tx.init,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, shapes),
        params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(
        step=everywhere,
        params=params,
        opt_state=opt_state,
        grad_norm_smoothed=everywhere,
        reference=params if keeps_reference else None,
    )


def _create_state(tx: Optimizer, params: Params, *, keeps_reference: bool = False) -> TrainState:
    # a copy, since the step donates the parameters' own buffers
    reference = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params) if keeps_reference else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jnp.zeros(()), reference)


def initial_state(
    config: Config, mesh: Mesh, tx: Optimizer, params: Params, *, keeps_reference: bool = False
) -> TrainState:
    """Step 0 from given parameters, which are donated; they may stay as the policy to stay close to."""
    places = state_shardings(config, mesh, tx, keeps_reference=keeps_reference)
    create = partial(_create_state, tx, keeps_reference=keeps_reference)
    return jax.jit(create, out_shardings=places, donate_argnums=0)(params)


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the RL TrainState, to restore a checkpoint into."""
    tx, keeps_reference = make_optimizer(config), bool(config.objective.kl_coefficient)
    shapes = jax.eval_shape(partial(_create_state, tx, keeps_reference=keeps_reference), abstract_params(config.model))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(config, mesh, tx, keeps_reference=keeps_reference),
    )


def compile_step(
    config: Config, mesh: Mesh, tx: Optimizer, step: TrainStep, *, keeps_reference: bool = False
) -> TrainStep:
    """A step jitted on a mesh: the state where it lives and donated, the batch's rows split, metrics everywhere."""
    state = state_shardings(config, mesh, tx, keeps_reference=keeps_reference)
    return jax.jit(
        step, in_shardings=(state, batch_sharding(mesh)), out_shardings=(state, replicated(mesh)), donate_argnums=0
    )


def compile_train_step(config: Config, mesh: Mesh) -> TrainStep:
    """The RL step."""
    objective, optimizer, tx = config.objective, config.optimizer, make_optimizer(config)
    step = make_train_step(
        partial(apply_policy, config, mesh),
        tx,
        make_surrogate(objective),
        make_objective(objective),
        aggregate=make_aggregation(objective, config.rollout.max_response_length),
        discrepancy=make_discrepancy(objective),
        mean_discrepancy=make_mean_discrepancy(objective),
        group_size=config.rollout.group_size,
        microbatch_size=optimizer.microbatch_size,
        updates=optimizer.updates,
    )
    return compile_step(config, mesh, tx, step, keeps_reference=bool(objective.kl_coefficient))


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
