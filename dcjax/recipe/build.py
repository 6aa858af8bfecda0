"""Builds the objects that a `Config` describes."""

from __future__ import annotations

import dataclasses
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
from dcjax.keys import make_key
from dcjax.models import ModelConfig, abstract_params, init_params, load_hf, logical_axes, packed_logps
from dcjax.models.numerics import MASTERS, Numerics
from dcjax.models.parallel.forward import mesh_layout
from dcjax.models.parameters import head_name
from dcjax.recipe import sections
from dcjax.recipe.config import Config
from dcjax.recipe.engine import make_engine
from dcjax.recipe.optimizer import Optimizer, chain_with
from dcjax.rl.objective import Objective
from dcjax.rl.step import ApplyFn, PolicyOutputs, TrainStep, make_train_step
from dcjax.serving.decoder import NO_EXCESS_PRECISION
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.formats import Format, serving_format
from dcjax.serving.mismatch import NO_MISMATCH
from dcjax.serving.scoring import Reading
from dcjax.serving.sync import abstract_serving, head_shardings
from dcjax.sharding.rules import batch_sharding, replicated, shardings, with_shardings
from dcjax.types import Batch, Bins, Metrics, Params, TrainState
from dcjax.user_code import refusals_of

Transform = optax.GradientTransformationExtraArgs
PolicyName = Literal["deployed", "training", "deployed_ema", "training_ema"]


def make_apply_fn(
    model: ModelConfig, mesh: Mesh, bins: Bins, objective: Objective | None = None, numerics: Numerics = MASTERS
) -> ApplyFn:
    """(params, batch) -> `PolicyOutputs` of the training policy, under the sampler's transform of logits.

    Args:
      model: the architecture; where it has experts, the metrics are of what its routers did, by row.
      mesh: the devices.
      bins: what the rows of a microbatch are packed into.
      objective: whose required quantities the head computes; None requires none.
      numerics: what is rounded.
    """
    quantities = {} if objective is None else objective.requires.of_head

    def apply_fn(params: Params, batch: Batch) -> PolicyOutputs:
        if batch.places is None:
            raise ValueError("the batch is not packed; a `Packing` gives it microbatches")
        layout = mesh_layout(mesh)
        scores = packed_logps(
            model,
            params,
            batch,
            places=batch.places,
            bins=bins,
            quantities=quantities,
            layout=layout,
            numerics=numerics,
        )
        metrics = {} if scores.router is None else scores.router.metrics
        return PolicyOutputs(scores.logps, scores.entropy, metrics, scores.quantities)

    return apply_fn


def params_shardings(config: Config, mesh: Mesh) -> Params:
    """Where each parameter lives."""
    return shardings(mesh, logical_axes(config.model))


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
    return _fresh_params(config.model, mesh)(make_key(config.seed))


@cache
def _fresh_params(model: ModelConfig, mesh: Mesh) -> Callable[[jax.Array], Params]:
    return jax.jit(partial(init_params, model), out_shardings=shardings(mesh, logical_axes(model)))


def objective_of(config: Config) -> Objective:
    """The objective of RL; the same object for equal sections.

    Raises:
      ValueError: the section builds none.
    """
    return sections.build_objective(
        config.objective,
        updates=config.optimizer.updates,
        max_response_length=config.rollout.max_response_length,
    )


def optimizer_of(config: Config) -> Optimizer:
    """How RL descends; the same object for equal sections.

    Raises:
      ValueError: the section builds none, or does not fit the objective.
    """
    return sections.build_optimizer(config.optimizer, objective_of(config), steps=config.steps)


def build_optimizer(config: Config) -> Transform:
    """The whole optax chain of RL; the same object for configs that have it in common."""
    return chain_with(optimizer_of(config), objective_of(config).ascent, config.training_forward()[0].precision.compute)


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
            reference=objective_of(config).requires.reference_logps,
            history=config.rollout.async_level or config.mismatch.staleness,
        )


def state_shardings(config: Config, mesh: Mesh, tx: Transform, kept: PastParams = PastParams()) -> Any:
    """Where each leaf of the TrainState lives: moments and averages beside their parameters, scalars everywhere."""
    return _state_shardings(config.model, mesh, tx, kept)


@cache
def _state_shardings(model: ModelConfig, mesh: Mesh, tx: Transform, kept: PastParams) -> Any:
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


def _create_state(tx: Transform, kept: PastParams, params: Params) -> TrainState:
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
    config: Config, mesh: Mesh, tx: Transform, params: Params, kept: PastParams = PastParams()
) -> TrainState:
    """Step 0 from given parameters, which are donated."""
    return state_initializer(config, mesh, tx, kept)(params)


def state_initializer(config: Config, mesh: Mesh, tx: Transform, kept: PastParams) -> Any:
    """`initial_state`'s program, from params to a state."""
    return _initializer(config.model, mesh, tx, kept)


@cache
def _initializer(model: ModelConfig, mesh: Mesh, tx: Transform, kept: PastParams) -> Callable[[Params], TrainState]:
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

    requires = objective_of(config).requires
    head = requires.sampler_head
    read = abstract_reading(config, mesh) if reads_sampler(config) else None
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
        sampler_tokens=array(np.int32, response, head) if head else None,
        sampler_logps=array(np.float32, response, head) if head else None,
        sampler_hidden=None if read is None else read.hidden,
        sampler_head=None if read is None else read.head,
        microbatches=config.packing().abstract(rows, batch_sharding(mesh)),
    )


def abstract_reading(config: Config, mesh: Mesh) -> Reading:
    """Shapes, dtypes and shardings of what `serving.scoring.read_hidden` gives of an iteration's responses."""
    rollout, format, keep = config.rollout, serving_format(config.serving.format), config.serving.keep
    shape = (rollout.sequences, rollout.max_response_length, config.model.hidden_size)
    hidden: Any = jax.ShapeDtypeStruct(shape, format.activations, sharding=batch_sharding(mesh))
    head = abstract_serving(config.model, format, keep).weights[head_name(config.model)]
    return Reading(hidden, with_shardings(head, head_shardings(config.model, format, mesh, keep)))


def compile_step(
    model: ModelConfig,
    mesh: Mesh,
    tx: Transform,
    step: TrainStep,
    kept: PastParams = PastParams(),
    head: Any = None,
    rounds: bool = False,
) -> TrainStep:
    """A step jitted on a mesh: the state where it lives and donated, the batch's rows split, metrics everywhere.

    Args:
      model: the architecture.
      mesh: the devices.
      tx: the optimiser's chain.
      step: the step.
      kept: past parameters that the state holds.
      head: where the sampler's head lies, if batches have it.
      rounds: whether the forward rounds as a serving format does, however XLA fuses it.
    """
    state, rows = _state_shardings(model, mesh, tx, kept), batch_sharding(mesh)
    fields: dict[str, Any] = {field.name: rows for field in dataclasses.fields(Batch)}
    batch = Batch(**fields | {"sampler_head": head})
    return jax.jit(
        step,
        in_shardings=(state, batch),
        out_shardings=(state, replicated(mesh)),
        donate_argnums=0,
        compiler_options=NO_EXCESS_PRECISION if rounds else None,
    )


@dataclass(frozen=True)
class _StepKey:
    """All that the RL step depends on: steps with equal keys are one program."""

    model: ModelConfig
    objective: Objective
    tx: Transform
    kept: PastParams
    group_size: int
    bins: Bins
    updates: int
    ahead: bool
    # the engine's format and what it keeps, where the step reads the sampler's distributions
    sampler: tuple[Format, tuple[str, ...]] | None
    # of the forward
    numerics: Numerics


def compile_train_step(config: Config, mesh: Mesh) -> TrainStep:
    """The RL step, the same one for configs of the same program."""
    model, numerics = config.training_forward()
    key = _StepKey(
        model=model,
        objective=objective_of(config),
        tx=build_optimizer(config),
        kept=PastParams.needed_by(config),
        group_size=config.rollout.group_size,
        bins=config.packing().bins,
        updates=config.optimizer.updates,
        ahead=config.rollout.async_level > 0,
        sampler=(serving_format(config.serving.format), config.serving.keep) if reads_sampler(config) else None,
        numerics=numerics,
    )
    return _compile_train_step(key, mesh)


def reads_sampler(config: Config) -> bool:
    """Whether rollouts are read once more for the sampler's whole distributions."""
    return objective_of(config).requires.sampler_distributions


def make_step(objective: Objective, apply_fn: ApplyFn, tx: Transform, **settings: Any) -> TrainStep:
    """`make_train_step` with all that an objective says of it; `settings` are its sizes and `ahead`."""
    return make_train_step(
        apply_fn,
        tx,
        objective.surrogate,
        objective.transform,
        aggregate=objective.aggregate,
        discrepancy=objective.discrepancy,
        mean_discrepancy=objective.mean_discrepancy,
        requires=objective.requires,
        **settings,
    )


@cache
def _compile_train_step(key: _StepKey, mesh: Mesh) -> TrainStep:
    step = make_step(
        key.objective,
        make_apply_fn(key.model, mesh, key.bins, key.objective, key.numerics),
        key.tx,
        group_size=key.group_size,
        updates=key.updates,
        ahead=key.ahead,
    )
    head = None if key.sampler is None else head_shardings(key.model, key.sampler[0], mesh, key.sampler[1])
    return compile_step(key.model, mesh, key.tx, step, key.kept, head, rounds=key.numerics != MASTERS)


def metrics_to_host(metrics: Metrics) -> dict[str, float]:
    """A step's metrics as floats. One whose gradients overflowed at its loss scale, and were left out, has no norm."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if values.get("overflow"):
        del values["grad_norm"]
    return values


def build_engine(config: Config, mesh: Mesh, end_tokens: Sequence[int]) -> Qwen3Engine:
    """The engine that deploys the policy.

    Raises:
      RunError: the model, the hardware or its memory cannot serve that.
    """
    head = objective_of(config).requires.sampler_head
    return make_engine(
        config.model, config.serving, config.rollout, config.mismatch, mesh, end_tokens=end_tokens, records_head=head
    )


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
      RunError: their files are missing or cannot be used, or a task of the reader's own fails.
    """
    with refusals_of(config.task):
        return config.task.open(tokenizer)
