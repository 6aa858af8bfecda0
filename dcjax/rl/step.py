"""The training step: one pure function from (TrainState, Batch) to (TrainState, Metrics)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dcjax.arguments import as_sequences
from dcjax.rl.discrepancy import Discrepancy, probability_difference
from dcjax.rl.learning_rate import learning_rate_scale
from dcjax.rl.losses import Surrogate
from dcjax.rl.masked import Aggregation, masked_mean, response_mean, token_mean
from dcjax.rl.metrics import budget_metrics, mismatch_metrics, staleness_metrics
from dcjax.rl.transforms import Context, LossTransform, initial_terms
from dcjax.types import Array, Batch, Metrics, Params, TrainState

ApplyFn = Callable[[Params, Batch], tuple[Array, Array, dict[str, Array]]]
"""(params, batch) -> log-probs and entropies of the response tokens, both float32 [B, T], and metrics by row, [B]."""

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

GRAD_NORM_DECAY = 0.9
"""Of the moving average of the gradient norm (paper B, figure 3)."""


@flax.struct.dataclass
class Pass:
    """What a forward and backward pass leaves behind beside gradients, each with the batch's rows in front."""

    # [B, T]
    logps: Array
    entropy: Array
    clipped: Array
    # tokens that the objective left in the loss
    counted: Array
    # [B] each, of the model and of the objective's transforms
    row_metrics: dict[str, Array]


def make_train_step(
    apply_fn: ApplyFn,
    tx: optax.GradientTransformationExtraArgs,
    surrogate: Surrogate,
    objective: LossTransform,
    *,
    aggregate: Aggregation = token_mean,
    discrepancy: Discrepancy = probability_difference,
    mean_discrepancy: Callable[[Array, Array], Array] = response_mean,
    group_size: int,
    microbatch_size: int,
    updates: int = 1,
    ahead: bool = False,
) -> TrainStep:
    """Builds the step; jit it with donation of the state.

    With one update, the pass that is differentiated also yields `old_logps`. With several, they are computed once,
    before the first. Where rollouts are ahead of the trainer, `old_logps` are of the parameters that sampled them, so
    that mismatch and staleness stay apart. Gradients are summed over microbatches and divided once by the minibatch's
    denominator. Where `tx` holds a `loss_scale` (`dynamic_loss_scale`), the loss is differentiated at that scale.

    Args:
      apply_fn: the training policy.
      tx: one optax chain: clip, Adam, learning rate and, for DC-GRPO, `dual_ascent(..., every=updates)`.
      surrogate: `clipped_surrogate` with its bounds, say.
      objective: a chain of loss transforms.
      aggregate: how the tokens' losses are summed, and by what they are divided over a minibatch.
      discrepancy: δ of which `tx` and the metrics see the mean; the penalty's own, where there is one.
      mean_discrepancy: (δ, mask) -> δ̄, over all responses of the iteration.
      group_size: responses a prompt; a minibatch is made of whole prompts.
      microbatch_size: sequences in one forward and backward pass; divides a minibatch.
      updates: optimiser updates in one iteration, each on its share of the prompts.
      ahead: rollouts were sampled with the state's oldest history.

    Raises:
      ValueError: a size below 1; when the step is traced, a batch that does not divide into whole groups, updates and
        microbatches.
    """
    sizes = {"group_size": group_size, "microbatch_size": microbatch_size, "updates": updates}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")

    # from the pass that is differentiated
    apart = updates > 1 or ahead

    def loss(params: Params, batch: Batch, old_logps, reference_logps, mean_reward, multiplier, scale):
        logps, entropy, observed = apply_fn(params, batch)
        old_logps = jax.lax.stop_gradient(logps) if old_logps is None else old_logps
        context = Context(batch, logps, old_logps, multiplier, mean_reward, reference_logps)
        terms = objective(initial_terms(batch), context)
        losses, clipped = surrogate(
            logps, old_logps=old_logps, advantages=terms.advantages, weights=terms.weights, mask=terms.mask
        )
        total, denominator = aggregate(losses + terms.loss, terms.mask)
        passed = Pass(logps, entropy, clipped, terms.mask, terms.metrics | observed)
        return total * scale, (total, denominator, passed)

    def differentiate(state: TrainState, rows, mean_reward):
        multiplier = _multiplier(state)
        scale = 1.0 if (held := _loss_scale(state)) is None else held

        def accumulate(sums, rows):
            grads, (total, denominator, passed) = jax.grad(loss, has_aux=True)(
                state.params, *rows, mean_reward, multiplier, scale
            )
            return jax.tree.map(jnp.add, sums, (grads, total, denominator)), passed

        # microbatches are added up in float32, whatever the parameters' dtype
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros_like(leaf, jnp.promote_types(leaf.dtype, jnp.float32)), state.params
        )
        sums = (zeros, jnp.zeros(()), jnp.zeros(()))
        (grads, total, denominator), passed = jax.lax.scan(accumulate, sums, microbatches(rows))
        denominator = jnp.maximum(denominator, 1.0)
        grads = jax.tree.map(lambda g: g / (denominator * scale), grads)
        return grads, total / denominator, _gather(passed, 1)

    def microbatches(tree):
        return _deal(tree, jax.tree.leaves(tree)[0].shape[0] // microbatch_size, 1)

    def recompute(params: Params, minibatches: Batch) -> Array:
        def of_minibatch(minibatch: Batch) -> Array:
            return _gather(jax.lax.map(lambda rows: apply_fn(params, rows)[0], microbatches(minibatch)), 1)

        return jax.lax.map(of_minibatch, minibatches)

    def gaps(old_logps: Array, batch: Batch) -> Array:
        return discrepancy(old_logps=old_logps, rollout_logps=batch.rollout_logps, mask=batch.response_mask)

    def mean_gap(old_logps: Array, batch: Batch) -> Array:
        # over all responses of the iteration, whatever the objective drops
        return mean_discrepancy(gaps(old_logps, batch), batch.response_mask)

    def update(state: TrainState, rows, gap, batch: Batch):
        grads, loss, passed = differentiate(state, rows, jnp.mean(batch.rewards))
        # with one update its rows are the whole batch
        gap = mean_gap(passed.logps, rows[0]) if gap is None else gap
        measured = {"discrepancy": gap, "response_length": _mean_length(batch)}
        changes, opt_state = tx.update(grads, state.opt_state, state.params, **measured)
        state = dataclasses.replace(state, params=optax.apply_updates(state.params, changes), opt_state=opt_state)
        return state, (loss, optax.tree.norm(grads), passed)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rows = batch.rewards.shape[0]
        if rows % (updates * group_size) or rows // updates % microbatch_size:
            raise ValueError(f"a batch of {rows} responses does not divide by {sizes}")
        batch = as_sequences(batch)
        minibatches = _deal(batch, updates, group_size)
        reference_logps = None if state.reference is None else recompute(state.reference, minibatches)
        old_logps = gap = None
        if apart:
            old_logps = recompute(state.history[0] if ahead else state.params, minibatches)
            gap = mean_gap(_gather(old_logps, group_size), batch)
        trained, (losses, grad_norms, passed) = jax.lax.scan(
            lambda state, rows: update(state, rows, gap, batch), state, (minibatches, old_logps, reference_logps)
        )
        passed = _gather(passed, group_size)
        old_logps = _gather(old_logps, group_size) if apart else passed.logps
        smoothed = _smooth(state, grad_norms)
        metrics = _batch_metrics(batch, old_logps, passed, stale=apart) | _state_metrics(state)
        metrics |= {
            "loss": jnp.mean(losses),
            "grad_norm": jnp.mean(grad_norms),
            "grad_norm_smoothed": smoothed,
            # not finite where an update overflowed, which the loss shows only a step later
            "param_norm": optax.tree.norm(trained.params),
            "dual/discrepancy": mean_gap(old_logps, batch),
            "nonfinite_at": _first_nonfinite(old_logps, batch.response_mask),
        }
        if "dual/budget" in metrics:
            delta, mask = gaps(old_logps, batch), batch.response_mask
            against = budget_metrics(
                discrepancy=delta, mask=mask, budget=metrics["dual/budget"], average=mean_discrepancy
            )
            metrics |= {f"dual/{name}": value for name, value in against.items()}
        if "loss_scale" in metrics:
            metrics["overflow"] = jnp.mean(~jnp.isfinite(grad_norms))
        history = (*state.history, state.params)[1:] if state.history else ()
        moved_on = {"step": state.step + 1, "grad_norm_smoothed": smoothed, "history": history}
        return dataclasses.replace(trained, **moved_on), metrics

    return train_step


def _deal(tree, parts: int, unit: int):
    """Rows dealt round-robin in units to `parts`: [B, ...] -> [parts, B / parts, ...].

    Each part takes its share from every stretch of rows, so that rows sharded over devices stay where they are.
    """
    return jax.tree.map(
        lambda x: x.reshape(-1, parts, unit, *x.shape[1:]).swapaxes(0, 1).reshape(parts, -1, *x.shape[1:]),
        tree,
    )


def _gather(tree, unit: int):
    """Undoes `_deal`."""
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0], -1, unit, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree
    )


def _multiplier(state: TrainState) -> Array | None:
    return optax.tree.get(state.opt_state, "multiplier")


def _loss_scale(state: TrainState) -> Array | None:
    return optax.tree.get(state.opt_state, "loss_scale")


def _first_nonfinite(logps: Array, mask: Array) -> Array:
    """int32 []: the first response token, counted row by row, whose log-prob is not finite; −1 where all are."""
    bad = (mask & ~jnp.isfinite(logps)).reshape(-1)
    return jnp.where(jnp.any(bad), jnp.argmax(bad), -1)


def _mean_length(batch: Batch) -> Array:
    return jnp.mean(jnp.sum(batch.response_mask, axis=1).astype(jnp.float32))


def _smooth(state: TrainState, grad_norms: Array) -> Array:
    """Moves on by the mean norm of the iteration's updates; one that overflowed leaves it where it was."""
    grad_norm = jnp.mean(grad_norms)
    moved = GRAD_NORM_DECAY * state.grad_norm_smoothed + (1 - GRAD_NORM_DECAY) * grad_norm
    # 0 is the state before the first gradient
    moved = jnp.where(state.grad_norm_smoothed == 0, grad_norm, moved)
    return jnp.where(jnp.isfinite(grad_norm), moved, state.grad_norm_smoothed)


def _state_metrics(state: TrainState) -> Metrics:
    """What the optimiser's chain held for this iteration, of what it holds at all; GRPO is λ = 0."""
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


def _batch_metrics(batch: Batch, old_logps: Array, passed: Pass, *, stale: bool) -> Metrics:
    mask = batch.response_mask
    mismatch = mismatch_metrics(old_logps=old_logps, rollout_logps=batch.rollout_logps, mask=mask)
    staleness = staleness_metrics(logps=passed.logps, old_logps=old_logps, mask=mask) if stale else {}
    return {
        "reward": jnp.mean(batch.rewards),
        "response_length": _mean_length(batch),
        "entropy": masked_mean(passed.entropy, mask),
        "clip_fraction": masked_mean(passed.clipped.astype(jnp.float32), passed.counted),
        **{name: jnp.mean(rows) for name, rows in passed.row_metrics.items()},
        **{f"mismatch/{name}": value for name, value in mismatch.items()},
        **{f"staleness/{name}": value for name, value in staleness.items()},
    }
