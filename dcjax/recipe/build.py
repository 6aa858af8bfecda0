"""Builds the objects that a `Config` describes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from dcjax.data.task import Problems
from dcjax.errors import RunError
from dcjax.models import ModelConfig, abstract_params, init_params, load_hf, logical_axes, read_config, token_logps
from dcjax.models.parallel.forward import check_model, mesh_layout
from dcjax.recipe.config import Config, what_is_compiled
from dcjax.recipe.engine import make_engine
from dcjax.recipe.objective import (
    make_aggregation,
    make_discrepancy,
    make_mean_discrepancy,
    make_objective,
    make_surrogate,
)
from dcjax.recipe.optimizer import make_optimizer
from dcjax.rl.step import TrainStep, make_train_step
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.mismatch import NO_MISMATCH
from dcjax.sharding.mesh import make_mesh, set_aside
from dcjax.sharding.rules import batch_sharding, replicated, shardings, with_shardings
from dcjax.types import Array, Batch, Metrics, Params, TrainState

Optimizer = optax.GradientTransformationExtraArgs
PolicyName = Literal["deployed", "training", "deployed_ema"]


def apply_policy(config: Config, mesh: Mesh, params: Params, batch: Batch) -> tuple[Array, Array, dict[str, Array]]:
    """The training policy's log-probs and entropies of a batch's responses, under the sampler's transform of logits.

    And, where the model has experts, what its routers did, by row.
    """
    scores = token_logps(
        config.model,
        params,
        batch.tokens,
        batch.attention_mask,
        response_length=batch.response_mask.shape[1],
        temperature=batch.temperature,
        experts=None if batch.experts is None else jnp.moveaxis(batch.experts, 2, 0).astype(jnp.int32),
        candidate_tokens=batch.candidate_tokens,
        layout=mesh_layout(mesh),
    )
    return scores.logps, scores.entropy, {} if scores.router is None else scores.router.metrics


def params_shardings(config: Config, mesh: Mesh) -> Params:
    """Where each parameter lives."""
    return shardings(mesh, logical_axes(config.model))


def with_pretrained_model(config: Config) -> Config:
    """The config with the architecture that `pretrained` has, if it names a folder.

    Raises:
      RunError: the folder holds no model that is supported, or one that the mesh does not divide.
    """
    if config.pretrained is None:
        return config
    model = config.model
    computed = {name: getattr(model, name) for name in ("remat", "attention", "head_chunk", "precision")}
    try:
        model = dataclasses.replace(read_config(config.pretrained), **computed)
        check_model(model, dataclasses.asdict(config.mesh))
        return dataclasses.replace(config, model=model)
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
    return _fresh_params(config.model, mesh)(jax.random.key(config.seed))


@cache
def _fresh_params(model: ModelConfig, mesh: Mesh) -> Callable[[jax.Array], Params]:
    return jax.jit(partial(init_params, model), out_shardings=shardings(mesh, logical_axes(model)))


def build_optimizer(config: Config) -> Optimizer:
    """The optimiser of RL; the same object for configs that have it in common."""
    compute = config.model.precision.compute
    return make_optimizer(config.optimizer, config.objective, steps=config.steps, compute=compute)


@dataclass(frozen=True)
class PastParams:
    """Past parameters that a TrainState holds beside its own."""

    # those that RL started from
    reference: bool = False
    # those before each of so many iterations
    history: int = 0

    @classmethod
    def needed_by(cls, config: Config) -> PastParams:
        """What RL needs."""
        return cls(
            reference=bool(config.objective.kl_coefficient),
            history=config.rollout.async_level or config.mismatch.staleness,
        )


def state_shardings(config: Config, mesh: Mesh, tx: Optimizer, kept: PastParams = PastParams()) -> Any:
    """Where each leaf of the TrainState lives: moments and averages beside their parameters, scalars everywhere."""
    return _state_shardings(config.model, mesh, tx, kept)


@cache
def _state_shardings(model: ModelConfig, mesh: Mesh, tx: Optimizer, kept: PastParams) -> Any:
    params = shardings(mesh, logical_axes(model))
    everywhere: Any = replicated(mesh)
    shapes = abstract_params(model)
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
        reference=params if kept.reference else None,
        history=(params,) * kept.history,
    )


def _create_state(tx: Optimizer, kept: PastParams, params: Params) -> TrainState:
    def copied() -> Params:
        # the step donates the parameters' own buffers
        return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)

    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        grad_norm_smoothed=jnp.zeros(()),
        reference=copied() if kept.reference else None,
        history=tuple(copied() for _ in range(kept.history)),
    )


def abstract_starting_params(config: Config, mesh: Mesh) -> Params:
    """Shapes, dtypes and shardings of `starting_params`."""
    return with_shardings(abstract_params(config.model), params_shardings(config, mesh))


def initial_state(
    config: Config, mesh: Mesh, tx: Optimizer, params: Params, kept: PastParams = PastParams()
) -> TrainState:
    """Step 0 from given parameters, which are donated."""
    return state_initializer(config, mesh, tx, kept)(params)


def state_initializer(config: Config, mesh: Mesh, tx: Optimizer, kept: PastParams) -> Any:
    """`initial_state`'s program, from params to a state."""
    return _initializer(config.model, mesh, tx, kept)


@cache
def _initializer(model: ModelConfig, mesh: Mesh, tx: Optimizer, kept: PastParams) -> Callable[[Params], TrainState]:
    places = _state_shardings(model, mesh, tx, kept)
    return jax.jit(partial(_create_state, tx, kept), out_shardings=places, donate_argnums=0)


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the RL TrainState, to restore a checkpoint into."""
    tx, kept = build_optimizer(config), PastParams.needed_by(config)
    shapes = jax.eval_shape(partial(_create_state, tx, kept), abstract_params(config.model))
    return with_shardings(shapes, state_shardings(config, mesh, tx, kept))


def abstract_batch(config: Config, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of what an iteration trains on."""
    rollout, model, rows = config.rollout, config.model, config.rollout.sequences
    prompt, response = rollout.max_prompt_length, rollout.max_response_length
    routed = (prompt + response - 1, sum(model.sparse_layers), model.num_experts_per_tok)

    def array(dtype: type, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=batch_sharding(mesh))

    return Batch(
        tokens=array(np.int32, prompt + response),
        attention_mask=array(np.bool_, prompt + response),
        response_mask=array(np.bool_, response),
        rollout_logps=array(np.float32, response),
        temperature=array(np.float32),
        rewards=array(np.float32),
        group_rewards=array(np.float32, rollout.group_size),
        candidate_tokens=array(np.int32, response, rollout.top_k) if rollout.top_k else None,
        experts=array(np.int16, *routed) if rollout.replay_routing else None,
    )


def compile_step(
    config: Config, mesh: Mesh, tx: Optimizer, step: TrainStep, kept: PastParams = PastParams()
) -> TrainStep:
    """A step jitted on a mesh: the state where it lives and donated, the batch's rows split, metrics everywhere."""
    state = state_shardings(config, mesh, tx, kept)
    return jax.jit(
        step, in_shardings=(state, batch_sharding(mesh)), out_shardings=(state, replicated(mesh)), donate_argnums=0
    )


def compile_train_step(config: Config, mesh: Mesh) -> TrainStep:
    """The RL step, the same one for configs of the same program."""
    return _compile_train_step(what_is_compiled(config), mesh)


@cache
def _compile_train_step(config: Config, mesh: Mesh) -> TrainStep:
    objective, optimizer, tx = config.objective, config.optimizer, build_optimizer(config)
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
        ahead=config.rollout.async_level > 0,
    )
    return compile_step(config, mesh, tx, step, PastParams.needed_by(config))


def metrics_to_host(metrics: Metrics) -> dict[str, float]:
    """A step's metrics as floats. One whose gradients overflowed at its loss scale, and were left out, has no norm."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if values.get("overflow"):
        del values["grad_norm"]
    return values


def training_mesh(config: Config) -> Mesh:
    """The run's mesh, on devices that do not only serve.

    Raises:
      ValueError: too few devices, or serving ones that hosts cannot give equally many of.
    """
    count, size = config.serving.devices, math.prod(dataclasses.asdict(config.mesh).values())
    if count and size + count > jax.device_count():
        raise ValueError(
            f"serving.devices is {count}, behind {size} of the mesh; {jax.device_count()} were found, "
            "so the sum must be at most that"
        )
    return make_mesh(config.mesh, set_aside(jax.devices(), count)[0])


def build_engine(config: Config, mesh: Mesh, end_tokens: Sequence[int]) -> Qwen3Engine:
    """The engine that deploys the policy.

    Raises:
      RunError: the model, the hardware or its memory cannot serve that.
    """
    return make_engine(config.model, config.serving, config.rollout, config.mismatch, mesh, end_tokens=end_tokens)


def build_training_engine(config: Config, mesh: Mesh, end_tokens: Sequence[int]) -> Qwen3Engine:
    """One that samples from the training policy: in float32, with nothing added.

    Raises:
      RunError: as `build_engine`.
    """
    exact = dataclasses.replace(config.serving, format="float32", kv_cache="auto", keep=())
    return make_engine(config.model, exact, config.rollout, NO_MISMATCH, mesh, end_tokens=end_tokens)


def make_engines(config: Config, mesh: Mesh, end_tokens: Sequence[int]) -> dict[PolicyName, Qwen3Engine]:
    """`deployed` in the run's serving format, `training` in the trainer's float32, for masters on this mesh.

    Raises:
      RunError: they cannot be served.
    """
    return {
        "deployed": build_engine(config, mesh, end_tokens),
        "training": build_training_engine(config, mesh, end_tokens),
    }


def open_problems(config: Config, tokenizer: PreTrainedTokenizerFast) -> Problems:
    """The task's problems.

    Raises:
      RunError: their files are missing or cannot be used.
    """
    try:
        return config.task.open(tokenizer)
    except (ValueError, FileNotFoundError) as error:
        raise RunError(str(error)) from None
