"""The training step: one pure function from (TrainState, Batch) to (TrainState, Metrics).

The file follows a batch from top to bottom. `_train_step` is one training iteration: it recomputes log-probs
(`_recompute`), makes each of the optimiser's updates (`_update`) on the gradients of a minibatch
(`_accumulate_gradients`), and computes the metrics (`_metrics`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dcjax.arguments import as_sequences
from dcjax.rl.discrepancy import Discrepancy, DistributionGap, discrepancy_of, probability_difference
from dcjax.rl.learning_rate import learning_rate_scale
from dcjax.rl.losses import Surrogate
from dcjax.rl.masked import Aggregation, LossSum, masked_mean, response_mean, token_mean
from dcjax.rl.metrics import budget_metrics, mismatch_metrics, sequence_ess, sign_skew, staleness_metrics
from dcjax.rl.microbatches import Cut, Microbatch
from dcjax.rl.objective import NO_REQUIREMENTS, Iteration, Requirements
from dcjax.rl.transforms import Context, LossTransform, initial_terms
from dcjax.types import Array, Batch, Metrics, Microbatches, Params, TrainState


class PolicyOutputs(NamedTuple):
    """What the training policy computes for a batch."""

    # log-probs of the response tokens, float32 [B, T]
    logps: Array
    # entropies of the distributions that they were drawn from, float32 [B, T]
    entropy: Array
    # of the model, by row, [B]
    metrics: Mapping[str, Array] = MappingProxyType({})
    # the `HeadQuantity`s that the objective requires, by name, [B, T]
    quantities: Mapping[str, Array] = MappingProxyType({})


ApplyFn = Callable[[Params, Batch], tuple]
"""(params, batch) -> `PolicyOutputs`, or a plain tuple of its first two, three or four fields."""

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

GRAD_NORM_DECAY = 0.9
"""Decay of the moving average of the gradient norm (paper B, figure 3)."""


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """What a step is built from: the arguments of `make_train_step`, which describes them.

    Raises:
      ValueError: a size below 1.
    """

    apply_fn: ApplyFn
    tx: optax.GradientTransformationExtraArgs
    surrogate: Surrogate
    objective: LossTransform
    aggregate: Aggregation
    discrepancy: Discrepancy | DistributionGap
    mean_discrepancy: Callable[[Array, Array], Array]
    requires: Requirements
    group_size: int
    microbatch_size: int | None
    updates: int
    ahead: bool

    def __post_init__(self) -> None:
        for name, size in self.sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that a batch has to divide by."""
        sizes = {"group_size": self.group_size, "microbatch_size": self.microbatch_size, "updates": self.updates}
        return {name: size for name, size in sizes.items() if size is not None}

    @property
    def recomputes_old_logps(self) -> bool:
        """Whether `old_logps` take a pass of their own; where not, the pass that is differentiated yields them."""
        return self.updates > 1 or self.ahead or bool(self.requires.of_iteration)

    def token_discrepancy(self, old: OldOutputs, batch: Batch) -> Array:
        """δ of each token, [B, T]."""
        return discrepancy_of(self.discrepancy, old.logps, batch, old.quantities)

    def batch_discrepancy(self, old: OldOutputs, batch: Batch) -> Array:
        """δ̄ over all responses of the batch, [], whatever the objective drops."""
        return self.mean_discrepancy(self.token_discrepancy(old, batch), batch.response_mask)


class OldOutputs(NamedTuple):
    """What the training policy computes at the rollout's weights, [B, T] each, under stop-gradient."""

    logps: Array
    # those of the head that the objective requires there, by name
    quantities: dict[str, Array]

    @classmethod
    def of(cls, outputs: PolicyOutputs, names: Collection[str]) -> OldOutputs:
        """Of what the policy gave."""
        quantities = {name: outputs.quantities[name] for name in names}
        return cls(*jax.lax.stop_gradient((outputs.logps, quantities)))


class Rows(NamedTuple):
    """The rows of one update, or of one microbatch of it, with the log-probs that were computed before the updates."""

    batch: Batch
    # None where the pass that is differentiated yields it
    old: OldOutputs | None
    # [B, T]; None where the state has no reference policy
    reference_logps: Array | None
    # [B] or [B, T]: the quantities of the whole iteration or minibatch that are no scalars
    quantities: dict[str, Array]


class Shared(NamedTuple):
    """What all rows of an update share: scalars over all the iteration's responses, and over the minibatch's."""

    mean_reward: Array
    response_length: Array
    # δ̄; None where the pass that is differentiated yields it
    discrepancy: Array | None
    # by name, what the objective requires
    quantities: dict[str, Array]


@flax.struct.dataclass
class RowOutputs:
    """What the differentiated pass computed for each row, besides the gradients."""

    # [B, T] each
    logps: Array
    # old ones of the head, by name
    quantities: dict[str, Array]
    entropy: Array
    clipped: Array
    # tokens that the objective left in the loss
    loss_mask: Array
    # [B] each, of the model and of the objective's transforms
    metrics: dict[str, Array]
    # [B] each, sums over the response
    sums: dict[str, Array]

    def as_old(self) -> OldOutputs:
        """What the pass gave, where its parameters are the rollout's weights."""
        return OldOutputs(self.logps, self.quantities)


class UpdateOutputs(NamedTuple):
    """What one update leaves for the metrics."""

    loss: Array
    # what the minibatch's losses were divided by; 0 where none counts
    denominator: Array
    grad_norm: Array
    rows: RowOutputs


def make_train_step(
    apply_fn: ApplyFn,
    tx: optax.GradientTransformationExtraArgs,
    surrogate: Surrogate,
    objective: LossTransform,
    *,
    aggregate: Aggregation = token_mean,
    discrepancy: Discrepancy | DistributionGap = probability_difference,
    mean_discrepancy: Callable[[Array, Array], Array] = response_mean,
    requires: Requirements = NO_REQUIREMENTS,
    group_size: int,
    microbatch_size: int | None = None,
    updates: int = 1,
    ahead: bool = False,
) -> TrainStep:
    """Builds the step; jit it with the state donated.

    With one update an iteration, the pass that is differentiated also yields `old_logps`. With several, they are
    computed once, before the first update. Where rollouts are sampled ahead of the trainer, `old_logps` are those of
    the parameters that sampled, so that mismatch and staleness are measured separately. What the objective requires
    of the whole iteration is computed from them, before the first update; what it requires of a minibatch takes one
    more pass before each. Gradients are summed over microbatches and divided once by the minibatch's denominator. Where
    `tx` holds a `loss_scale` (`dynamic_loss_scale`), the loss is multiplied by it and the gradients are divided by it.

    Args:
      apply_fn: the training policy.
      tx: one optax chain: clip, Adam, learning rate and, for DC-GRPO, `dual_ascent(..., every=updates)`.
      surrogate: for example `clipped_surrogate` with its bounds.
      objective: a chain of loss transforms.
      aggregate: how the losses of tokens are summed, and what the sum of a minibatch is divided by.
      discrepancy: the δ whose mean `tx` and the metrics get; where the objective has a penalty, the penalty's own.
      mean_discrepancy: (δ, mask) -> δ̄, over all responses of the iteration.
      requires: what the objective reads in `Context` that is not always there.
      group_size: responses to one prompt; a minibatch consists of whole prompts.
      microbatch_size: sequences in one forward and backward pass; divides a minibatch, and is one by default. A batch
        that says itself how it is cut (`Batch.microbatches`) has no need of it.
      updates: optimiser updates in one iteration, each on its share of the prompts.
      ahead: whether rollouts were sampled with the oldest parameters of the state's history.

    Raises:
      ValueError: a size below 1; when the step is traced, a batch that does not divide into whole groups, updates and
        microbatches, or a requirement that is not met.
    """
    spec = StepSpec(
        apply_fn=apply_fn,
        tx=tx,
        surrogate=surrogate,
        objective=objective,
        aggregate=aggregate,
        discrepancy=discrepancy,
        mean_discrepancy=mean_discrepancy,
        requires=requires,
        group_size=group_size,
        microbatch_size=microbatch_size,
        updates=updates,
        ahead=ahead,
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return _train_step(spec, state, batch)

    return train_step


def _train_step(spec: StepSpec, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One training iteration: every row of the batch is in one minibatch, and every minibatch makes one update."""
    rows = batch.rewards.shape[0]
    if rows % (spec.updates * spec.group_size) or rows // spec.updates % (spec.microbatch_size or 1):
        raise ValueError(f"a batch of {rows} responses does not divide by {spec.sizes}")
    batch = as_sequences(batch)
    _check_requirements(spec.requires, state, batch)
    # the cut of each minibatch, first by updates
    cuts = jax.tree.map(lambda x: x.swapaxes(0, 1), batch.microbatches)
    numbers = _row_numbers(cuts, spec.group_size)
    spec = _with_sampler_head(spec, batch.sampler_head)
    batch = dataclasses.replace(batch, microbatches=None, sampler_head=None)
    minibatches = _split_rows(batch, spec.updates, spec.group_size)

    # what stays the same through the updates
    reference_logps = None
    if state.reference is not None:
        reference_logps = _recompute(spec, state.reference, minibatches, cuts, ()).logps
    old, shared = None, Shared(jnp.mean(batch.rewards), _mean_response_length(batch), None, {})
    by_row: dict[str, Array] = {}
    if spec.recomputes_old_logps:
        sampling_params = state.history[0] if spec.ahead else state.params
        old = _recompute(spec, sampling_params, minibatches, cuts, spec.requires.of_old_head)
        whole, whole_reference = _merge_rows((old, reference_logps), spec.group_size)
        scalars, by_row = _iteration_quantities(spec.requires, Iteration(batch, whole.logps, whole_reference), numbers)
        shared = shared._replace(discrepancy=spec.batch_discrepancy(whole, batch), quantities=scalars)

    def update(state: TrainState, inputs: tuple[Rows, Microbatches | None]) -> tuple[TrainState, UpdateOutputs]:
        minibatch, cut = inputs
        return _update(spec, state, minibatch, _cut(spec, minibatch.batch, cut), shared)

    rows_of_updates = _split_rows(by_row, spec.updates, spec.group_size)
    minibatches = Rows(minibatches, old, reference_logps, rows_of_updates)
    trained, outputs = jax.lax.scan(update, state, (minibatches, cuts))

    outputs = outputs._replace(rows=_merge_rows(outputs.rows, spec.group_size))
    old = outputs.rows.as_old() if old is None else _merge_rows(old, spec.group_size)
    trained = dataclasses.replace(trained, grad_norm_smoothed=_smoothed_grad_norm(state, outputs.grad_norm))
    metrics = _metrics(spec, batch, old, outputs, numbers, before=state, after=trained)
    history = (*state.history, state.params)[1:] if state.history else ()
    return dataclasses.replace(trained, step=state.step + 1, history=history), metrics


def _with_sampler_head(spec: StepSpec, head: Any) -> StepSpec:
    """The same with a policy that gets the sampler's head beside the rows of every batch."""
    if head is None:
        return spec
    return dataclasses.replace(
        spec, apply_fn=lambda params, rows: spec.apply_fn(params, dataclasses.replace(rows, sampler_head=head))
    )


def _check_requirements(requires: Requirements, state: TrainState, batch: Batch) -> None:
    if requires.reference_logps and state.reference is None:
        raise ValueError("the objective requires reference_logps; the TrainState has no reference policy")
    if requires.candidate_tokens and batch.candidate_tokens is None:
        raise ValueError("the objective requires candidate_tokens; the batch has none, so sample with a top_k")
    if requires.sampler_distributions and (batch.sampler_hidden is None or batch.sampler_head is None):
        raise ValueError(
            "the objective requires the sampler's distributions; the batch has no sampler_hidden and sampler_head, "
            "which dcjax.serving.scoring.read_hidden gives"
        )
    if requires.sampler_head and batch.sampler_tokens is None:
        raise ValueError(
            "the objective requires the sampler's most probable tokens; the batch has no sampler_tokens, which an "
            "engine with records_head samples"
        )


def _row_numbers(cuts: Microbatches | None, group_size: int) -> Array | None:
    """int32 [B]: the number that each row had before packing moved it; None where it moves none."""
    if cuts is None or cuts.order is None:
        return None
    return _merge_rows(cuts.order.reshape(len(cuts.order), -1), group_size)


def _iteration_quantities(
    requires: Requirements, iteration: Iteration, numbers: Array | None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The quantities of the whole iteration, which see rows in the order that these had before packing moved them."""
    if numbers is not None:
        iteration = jax.tree.map(lambda x: x[jnp.argsort(numbers)], iteration)
    scalars, by_row = _quantities(requires.of_iteration, iteration, iteration.old_logps.shape)
    if numbers is not None:
        by_row = jax.tree.map(lambda x: x[numbers], by_row)
    return scalars, by_row


def _quantities(
    functions: Mapping[str, Callable[[Any], Array]], rows: Iteration | Context, shape: tuple[int, ...]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """What these functions compute of all rows [B, T] before a gradient: scalars, and what is by row or token."""
    scalars, by_row = {}, {}
    for name, compute in functions.items():
        computed = jax.lax.stop_gradient(compute(rows))
        if computed.shape not in ((), shape[:1], shape):
            raise ValueError(f"the quantity {name!r} has the shape {computed.shape}; it must be [], [B] or [B, T]")
        (by_row if computed.shape else scalars)[name] = computed
    return scalars, by_row


def _cut(spec: StepSpec, minibatch: Batch, cut: Microbatches | None) -> Cut:
    """How a minibatch is computed: as the batch says, or by rows as they are."""
    if cut is not None:
        return Cut.packed(cut)
    rows = len(minibatch.rewards)
    return Cut.by_rows(rows, spec.microbatch_size or rows)


def _recompute(
    spec: StepSpec, params: Params, minibatches: Batch, cuts: Microbatches | None, names: Collection[str]
) -> OldOutputs:
    """What the policy gives under `params`, a microbatch at a time, [updates, B / updates, T] each."""

    def compute(inputs: tuple[Batch, Microbatches | None]) -> OldOutputs:
        minibatch, cut = inputs
        return _outputs_of_minibatch(spec, params, minibatch, _cut(spec, minibatch, cut), names)

    return jax.lax.map(compute, (minibatches, cuts))


def _outputs_of_minibatch(
    spec: StepSpec, params: Params, minibatch: Batch, cut: Cut, names: Collection[str]
) -> OldOutputs:
    def compute(microbatch: Microbatch, outputs: OldOutputs) -> OldOutputs:
        rows = dataclasses.replace(microbatch.take(minibatch), places=microbatch.places)
        return microbatch.put(outputs, OldOutputs.of(_apply(spec, params, rows), names))

    zeros = jnp.zeros(minibatch.response_mask.shape)
    return cut.fold(compute, OldOutputs(zeros, dict.fromkeys(names, zeros)))


def _apply(spec: StepSpec, params: Params, rows: Batch) -> PolicyOutputs:
    """What the policy gives, checked for what the objective requires of it."""
    outputs = PolicyOutputs(*spec.apply_fn(params, rows))
    if missing := [name for name in spec.requires.of_head if name not in outputs.quantities]:
        raise ValueError(f"the objective requires the quantity {missing[0]!r}; apply_fn does not compute it")
    return outputs


def _update(
    spec: StepSpec, state: TrainState, minibatch: Rows, cut: Cut, shared: Shared
) -> tuple[TrainState, UpdateOutputs]:
    """One optimiser update by the minibatch's gradients; the scalars that `tx` is given are of the whole batch."""
    if spec.requires.of_minibatch:
        minibatch, shared = _with_minibatch_quantities(spec, state, minibatch, cut, shared)
    grads, loss, denominator, rows = _accumulate_gradients(spec, state, minibatch, cut, shared)
    discrepancy = shared.discrepancy
    if discrepancy is None:
        # this is the only update, and its minibatch the whole batch
        discrepancy = spec.batch_discrepancy(rows.as_old(), minibatch.batch)
    changes, opt_state = spec.tx.update(
        grads,
        state.opt_state,
        state.params,
        discrepancy=discrepancy,
        response_length=shared.response_length,
        sequence_ess=sequence_ess(
            logps=rows.logps, reference_logps=minibatch.batch.rollout_logps, mask=minibatch.batch.response_mask
        ),
    )
    state = dataclasses.replace(state, params=optax.apply_updates(state.params, changes), opt_state=opt_state)
    return state, UpdateOutputs(loss, denominator, optax.tree.norm(grads), rows)


def _with_minibatch_quantities(
    spec: StepSpec, state: TrainState, minibatch: Rows, cut: Cut, shared: Shared
) -> tuple[Rows, Shared]:
    """The same with what the objective requires of the minibatch, at the parameters before its update."""
    now = _outputs_of_minibatch(spec, state.params, minibatch.batch, cut, spec.requires.of_old_head)
    old = now if minibatch.old is None else minibatch.old
    context = Context(
        minibatch.batch,
        now.logps,
        old.logps,
        optax.tree.get(state.opt_state, "multiplier"),
        shared.mean_reward,
        minibatch.reference_logps,
        {**shared.quantities, **minibatch.quantities, **now.quantities},
        old.quantities,
    )
    scalars, by_row = _quantities(spec.requires.of_minibatch, context, now.logps.shape)
    return (
        minibatch._replace(quantities={**minibatch.quantities, **by_row}),
        shared._replace(quantities={**shared.quantities, **scalars}),
    )


def _accumulate_gradients(
    spec: StepSpec, state: TrainState, minibatch: Rows, cut: Cut, shared: Shared
) -> tuple[Params, Array, Array, RowOutputs]:
    """Gradients, loss and denominator of a minibatch: sums over its microbatches, divided once by the last."""
    loss_scale = optax.tree.get(state.opt_state, "loss_scale", 1.0)
    loss_fn = partial(
        _microbatch_loss,
        spec,
        shared=shared,
        multiplier=optax.tree.get(state.opt_state, "multiplier"),
        loss_scale=loss_scale,
    )

    # sums are float32, whatever the parameters' dtype
    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.promote_types(leaf.dtype, jnp.float32)), state.params)
    sums = jax.tree.map(jax.new_ref, zeros)

    def add_microbatch(microbatch: Microbatch, carry):
        others, outputs = carry
        loss, pull_back, (*terms, rows) = jax.vjp(
            lambda wide: loss_fn(optax.tree.cast_like(wide, state.params), minibatch, microbatch),
            optax.tree.cast_like(state.params, zeros),
            has_aux=True,
        )
        # each layer's gradients are added to the sums as they come; they are never in memory for all layers
        pull_back.with_refs(sums)(jnp.ones_like(loss))  # pyrefly: ignore[missing-attribute]
        return jax.tree.map(jnp.add, others, terms), microbatch.put(outputs, rows)

    _, (_, _, shapes) = jax.eval_shape(loss_fn, state.params, minibatch, cut.at(0))
    outputs = cut.empty(len(minibatch.batch.rewards), shapes)
    (total, denominator), rows = cut.fold(add_microbatch, ([jnp.zeros(()), jnp.zeros(())], outputs))
    divisor = jnp.maximum(denominator, 1.0)
    grads = jax.tree.map(lambda grad: jax.freeze(grad) / (divisor * loss_scale), sums)
    return grads, total / divisor, denominator, rows


def _microbatch_loss(
    spec: StepSpec,
    params: Params,
    minibatch: Rows,
    microbatch: Microbatch,
    *,
    shared: Shared,
    multiplier: Array | None,
    loss_scale: Array | float,
) -> tuple[Array, tuple[Array, Array, RowOutputs]]:
    """The scaled sum of the losses, which is differentiated, and beside it the sum, its denominator and the rows."""
    batch, old, reference_logps, by_row = microbatch.take(minibatch)
    outputs = _apply(spec, params, dataclasses.replace(batch, places=microbatch.places))
    logps = outputs.logps
    old = OldOutputs.of(outputs, spec.requires.of_old_head) if old is None else old
    old_logps, quantities = old.logps, {**shared.quantities, **by_row, **outputs.quantities}
    context = Context(
        batch, logps, old_logps, multiplier, shared.mean_reward, reference_logps, quantities, old.quantities
    )
    terms = spec.objective(initial_terms(batch), context)
    losses, clipped = spec.surrogate(
        logps, old_logps=old_logps, advantages=terms.advantages, weights=terms.weights, mask=terms.mask
    )
    total, denominator = _sum_present(spec.aggregate, losses + terms.loss, terms.mask, microbatch.present)
    references = {"engine": batch.rollout_logps} | ({"policy": old_logps} if spec.recomputes_old_logps else {})
    skew = sign_skew(jax.lax.stop_gradient(logps), references, terms.advantages, batch.response_mask)
    log_ratio = jnp.max(jnp.abs(jnp.where(batch.response_mask, logps - old_logps, 0.0)), axis=1)
    metrics = {**terms.metrics, **outputs.metrics, "check/log_ratio": log_ratio}
    sums = {f"skew/{name}": value for name, value in skew.items()}
    held = {name: outputs.quantities[name] for name in spec.requires.of_old_head}
    rows = RowOutputs(logps, held, outputs.entropy, clipped, terms.mask, metrics, sums)
    return total * loss_scale, (total, denominator, rows)


def _sum_present(aggregate: Aggregation, losses: Array, mask: Array, present: Array) -> LossSum:
    """The sums over those rows that are there; an aggregation is a sum over rows, so it may see them one by one."""
    sums = jax.vmap(lambda losses, mask: aggregate(losses[None], mask[None]))(losses, mask)
    return LossSum(*(jnp.sum(jnp.where(present, row, 0)) for row in sums))


def _metrics(
    spec: StepSpec,
    batch: Batch,
    old: OldOutputs,
    outputs: UpdateOutputs,
    numbers: Array | None,
    *,
    before: TrainState,
    after: TrainState,
) -> Metrics:
    """Metrics of an iteration; λ, budget, loss scale and learning rate are those that its updates used.

    `ess_scale` is that of the iteration's last update.
    """
    metrics = _row_metrics(spec, batch, old.logps, outputs.rows) | _optimizer_metrics(before)
    metrics |= {
        "loss": jnp.mean(outputs.loss),
        "check/denominator_share": _denominator_share(spec, outputs),
        "grad_norm": jnp.mean(outputs.grad_norm),
        "grad_norm_smoothed": after.grad_norm_smoothed,
        # not finite where an update overflowed, which the loss shows only one step later
        "param_norm": optax.tree.norm(after.params),
        "dual/discrepancy": spec.batch_discrepancy(old, batch),
        "nonfinite_at": _first_nonfinite(old.logps, batch.response_mask, numbers),
    }
    if "dual/budget" in metrics:
        against_budget = budget_metrics(
            discrepancy=spec.token_discrepancy(old, batch),
            mask=batch.response_mask,
            budget=metrics["dual/budget"],
            average=spec.mean_discrepancy,
        )
        metrics |= {f"dual/{name}": value for name, value in against_budget.items()}
    if (ess_scale := optax.tree.get(after.opt_state, "ess_scale")) is not None:
        metrics["ess_scale"] = ess_scale
    if "loss_scale" in metrics:
        metrics["overflow"] = jnp.mean(~jnp.isfinite(outputs.grad_norm))
    return metrics


def _row_metrics(spec: StepSpec, batch: Batch, old_logps: Array, rows: RowOutputs) -> Metrics:
    """Means over the batch's rows and tokens; staleness only where `old_logps` are not those of the same pass."""
    mask = batch.response_mask
    mismatch = mismatch_metrics(old_logps=old_logps, rollout_logps=batch.rollout_logps, mask=mask)
    staleness = {}
    if spec.recomputes_old_logps:
        staleness = staleness_metrics(logps=rows.logps, old_logps=old_logps, mask=mask)
    return {
        "reward": jnp.mean(batch.rewards),
        "response_length": _mean_response_length(batch),
        "entropy": masked_mean(rows.entropy, mask),
        "clip_fraction": masked_mean(rows.clipped.astype(jnp.float32), rows.loss_mask),
        **{name: jnp.mean(values) for name, values in rows.metrics.items()},
        **{name: jnp.sum(sums) / jnp.maximum(jnp.sum(mask), 1) for name, sums in rows.sums.items()},
        **{f"mismatch/{name}": value for name, value in mismatch.items()},
        **{f"staleness/{name}": value for name, value in staleness.items()},
    }


def _denominator_share(spec: StepSpec, outputs: UpdateOutputs) -> Array:
    """What losses were divided by, as a share of the denominator of all rows as one: 1 if it is whole minibatches'."""
    mask = outputs.rows.loss_mask
    whole = spec.aggregate(jnp.zeros(mask.shape), mask).denominator
    return jnp.where(whole > 0, jnp.sum(outputs.denominator) / jnp.where(whole > 0, whole, 1.0), 1.0)


def _optimizer_metrics(state: TrainState) -> Metrics:
    """The scalars that the optimiser's state holds for this iteration; λ is 0 where there is no dual ascent."""
    fields = {
        "dual/multiplier": "multiplier",
        "dual/budget": "budget",
        "dual/saturated": "saturated",
        "loss_scale": "loss_scale",
        "learning_rate_period": "decay_period",
    }
    held = {name: optax.tree.get(state.opt_state, field) for name, field in fields.items()}
    found = {name: value.astype(jnp.float32) for name, value in held.items() if value is not None}
    return {"dual/multiplier": jnp.zeros(()), "learning_rate_scale": learning_rate_scale(state.opt_state)} | found


def _smoothed_grad_norm(state: TrainState, grad_norms: Array) -> Array:
    """The moving average after an iteration with these norms; it stays as it was where one of them overflowed."""
    grad_norm = jnp.mean(grad_norms)
    moved = GRAD_NORM_DECAY * state.grad_norm_smoothed + (1 - GRAD_NORM_DECAY) * grad_norm
    # it is 0 before the first gradient, and then starts at that gradient's norm
    moved = jnp.where(state.grad_norm_smoothed == 0, grad_norm, moved)
    return jnp.where(jnp.isfinite(grad_norm), moved, state.grad_norm_smoothed)


def _mean_response_length(batch: Batch) -> Array:
    return jnp.mean(jnp.sum(batch.response_mask, axis=1).astype(jnp.float32))


def _first_nonfinite(logps: Array, mask: Array, numbers: Array | None) -> Array:
    """int32 []: the first response token, counted row by row, whose log-prob is not finite; −1 if all are finite.

    Rows have these numbers, [B], or are counted as they come.
    """
    bad, (rows, length) = mask & ~jnp.isfinite(logps), logps.shape
    numbers = jnp.arange(rows) if numbers is None else numbers
    first = jnp.min(jnp.where(bad, numbers[:, None] * length + jnp.arange(length), bad.size))
    return jnp.where(first < bad.size, first, -1)


def _split_rows(tree, parts: int, unit: int):
    """Deals rows out to `parts` in turn, `unit` neighbours at a time: [B, ...] -> [parts, B / parts, ...].

    Each part takes its share from every stretch of rows, so that rows sharded over devices stay where they are.
    """
    return jax.tree.map(
        lambda x: x.reshape(-1, parts, unit, *x.shape[1:]).swapaxes(0, 1).reshape(parts, -1, *x.shape[1:]), tree
    )


def _merge_rows(tree, unit: int):
    """Undoes `_split_rows`: [parts, B / parts, ...] -> [B, ...]."""
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0], -1, unit, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree
    )
