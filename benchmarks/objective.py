"""What the discrepancy's penalty and the metrics cost beside the GRPO loss, and beside a whole training step.

    python benchmarks/objective.py [--json PATH]

- arrays: on [512, 8192] log-probs, no model: value and gradient of the GRPO loss, of DC-GRPO's, and of the other
  presets, 16 rows at a time as a training step takes them; the metrics alone. A goal is set for DC-GRPO.
- methods: the same of others' answers to the mismatch, and what M2PO takes of the whole minibatch before.
- whole: GRPO and DC-GRPO on the whole arrays at once, where memory costs more than the arithmetic: DC-GRPO's
  temporaries are 48 MiB, GRPO's 16.
- step: on the quickstart's shapes, as a share of its whole training step: DC-GRPO's loss with gradient and the metrics,
  and each method's loss; and the whole step with M2PO, which takes the log-probs of the minibatch once more.

How they are timed is said in timing.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import environment, measure, pin, ratio, row, table  # pyrefly: ignore[missing-import]

from dcjax.allocator import keep_freed_memory
from dcjax.models import init_params
from dcjax.recipe import build
from dcjax.recipe.build import build_optimizer
from dcjax.recipe.config import Config
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.rl.advantages import group_rewards
from dcjax.rl.masked import token_mean
from dcjax.rl.metrics import mismatch_metrics
from dcjax.rl.objective import Objective
from dcjax.rl.presets import METHODS, dc_direct, dc_grpo, grpo, thresholded_dual_grpo, with_method
from dcjax.rl.transforms import Context, initial_terms
from dcjax.sharding.mesh import make_mesh
from dcjax.types import Array, Batch

QUICKSTART = Path(__file__).parent.parent / "dcjax" / "recipes" / "quickstart.py"
LARGEST = (512, 8192)
"""Responses and their tokens."""
GROUP_SIZE = 8
MICROBATCH = 16
CALLS = 8
"""Of a program each time that it is timed: the first ones find the memory as another program left it."""


def random_batch(rows: int, prompt: int, response: int, group_size: int) -> Batch:
    """Ragged responses whose log-probs are those of an int8 engine, roughly."""
    rng = np.random.default_rng(0)
    rewards = rng.integers(0, 2, rows).astype(np.float32)
    mask = np.arange(response) < rng.integers(1, response + 1, (rows, 1))
    prompts = rng.integers(0, 16, (rows // group_size, prompt)).repeat(group_size, axis=0)
    return Batch(
        tokens=np.concatenate([prompts, rng.integers(0, 16, mask.shape)], axis=1).astype(np.int32),
        attention_mask=np.concatenate([np.ones(prompts.shape, bool), mask], axis=1),
        response_mask=mask,
        rollout_logps=np.where(mask, -rng.exponential(0.5, mask.shape), 0).astype(np.float32),
        temperature=np.ones(rows, np.float32),
        rewards=rewards,
        group_rewards=np.asarray(group_rewards(rewards, group_size=group_size)),
    )


def drifted(logps: Array, scale: float) -> jax.Array:
    """Log-probs of a policy near by."""
    noise = np.random.default_rng(1).normal(0, scale, logps.shape)
    return jnp.asarray(np.minimum(np.asarray(logps) + noise, 0), jnp.float32)


def context_of(logps, old_logps, batch: Batch) -> Context:
    """What a transform reads; the minibatch's quantities stand in for their cost, which is measured apart."""
    kept = {"m2po_kept": batch.response_mask}
    return Context(batch, logps, old_logps, jnp.float32(0.1), jnp.mean(batch.rewards), None, kept)


def loss_of(objective: Objective) -> Callable:
    """(logps, old_logps, batch) -> the loss and its gradient to `logps`."""

    def loss(logps, old_logps, batch: Batch):
        terms = objective.transform(initial_terms(batch), context_of(logps, old_logps, batch))
        losses, _ = objective.surrogate(
            logps, old_logps=old_logps, advantages=terms.advantages, weights=terms.weights, mask=terms.mask
        )
        total, denominator = token_mean(losses + terms.loss, terms.mask)
        return total / denominator

    return jax.value_and_grad(loss)


def in_microbatches(loss: Callable) -> Callable:
    """The loss summed over microbatches of rows, and its gradient's sum of squares.

    The gradient itself would be 16 MiB of new memory in some calls and of old in others.
    """

    def run(logps, old_logps, batch: Batch):
        cut = jax.tree.map(lambda x: x.reshape(-1, MICROBATCH, *x.shape[1:]), (logps, old_logps, batch))

        def step(sums, rows):
            value, grads = loss(*rows)
            return (sums[0] + value, sums[1] + jnp.sum(jnp.square(grads))), None

        return jax.lax.scan(step, (jnp.zeros(()), jnp.zeros(())), cut)[0]

    return run


def metrics_of(logps, old_logps, batch: Batch) -> dict:
    """The metrics of a step, in the loss's arguments."""
    del logps
    return mismatch_metrics(old_logps=old_logps, rollout_logps=batch.rollout_logps, mask=batch.response_mask)


def minibatch_quantity(logps, old_logps, batch: Batch) -> Array:
    """What M2PO takes of the whole minibatch, without the pass for its log-probs."""
    (compute,) = with_method(grpo(), "m2po").requires.of_minibatch.values()
    return jnp.sum(compute(context_of(logps, old_logps, batch)))


def both(logps, old_logps, batch: Batch) -> tuple:
    """DC-GRPO's loss with its gradient, and the metrics."""
    return loss_of(dc_grpo(updates=1))(logps, old_logps, batch), metrics_of(logps, old_logps, batch)


def bind(program: Callable, batch: Batch) -> Callable[[int], Any]:
    """A compiled program on arrays that are on the device."""
    old_logps = drifted(batch.rollout_logps, 0.02)
    logps, batch = drifted(old_logps, 0.05), jax.device_put(batch)
    return partial(_call, jax.jit(program), logps, old_logps, batch)


def _call(program: Callable, logps, old_logps, batch: Batch, number: int):
    del number
    for _ in range(CALLS - 1):
        jax.block_until_ready(program(logps, old_logps, batch))
    return program(logps, old_logps, batch)


def compare_arrays(rounds: int) -> list[dict[str, Any]]:
    """CPU-milliseconds of each preset's loss with gradient, and of the metrics; then of two on whole arrays."""
    batch = random_batch(LARGEST[0], 1, LARGEST[1], GROUP_SIZE)
    objectives = {
        "grpo": grpo(),
        "dc_grpo": dc_grpo(updates=1),
        "thresholded_dual_grpo": thresholded_dual_grpo(),
        "dc_direct": dc_direct(updates=1),
    }
    methods = {name: with_method(grpo(), name) for name in METHODS}
    cut = {name: bind(in_microbatches(loss_of(objective)), batch) for name, objective in objectives.items()}
    whole = {name: bind(loss_of(objectives[name]), batch) for name in ("grpo", "dc_grpo")}
    others = {name: bind(in_microbatches(loss_of(objective)), batch) for name, objective in methods.items()}
    others = {"grpo": cut["grpo"], **others, "m2po's quantity": bind(minibatch_quantity, batch)}
    size = list(LARGEST)
    return [
        _over_grpo(f"arrays {size}, {MICROBATCH} rows at a time", cut | {"metrics": bind(metrics_of, batch)}, rounds),
        _over_grpo(f"methods {size}, {MICROBATCH} rows at a time", others, rounds),
        _over_grpo(f"whole {size}", whole, rounds),
    ]


def _over_grpo(title: str, programs: dict[str, Callable], rounds: int) -> dict[str, Any]:
    cpu = {name: of.cpu * 1e3 / CALLS for name, of in measure(title, programs, rounds).items()}
    goals = {"dc_grpo": "<= 1.3"} if "metrics" in programs else {}
    rows = [row("grpo", cpu["grpo"], np.min)]
    rows += [
        row(name, cpu[name], np.min, ratio(cpu[name], cpu["grpo"], "grpo", goals.get(name, "")))
        for name in cpu
        if name != "grpo"
    ]
    return {"title": title, "unit": "CPU-ms", "rows": rows, "notes": []}


def compare_step(config: Config, rounds: int) -> dict[str, Any]:
    """CPU-milliseconds of the objective and the metrics, and of the quickstart's whole step."""
    sizes = config.rollout
    batch = random_batch(sizes.sequences, sizes.max_prompt_length, sizes.max_response_length, sizes.group_size)
    programs = {
        "step": whole_step(config, batch, None),
        "step with m2po": whole_step(config, batch, "m2po"),
        "objective": bind(loss_of(dc_grpo(updates=1)), batch),
        "objective + metrics": bind(both, batch),
        **{name: bind(loss_of(with_method(grpo(), name)), batch) for name in METHODS},
    }
    timed = measure("step", programs, rounds)
    cpu = {name: of.cpu * 1e3 / (1 if name.startswith("step") else CALLS) for name, of in timed.items()}
    rows = [row("training step", cpu["step"], np.min)]
    rows.append(row("dc_grpo", cpu["objective"], np.min, ratio(cpu["objective"], cpu["step"], "step")))
    together = cpu["objective + metrics"]
    rows.append(row("dc_grpo and metrics", together, np.min, ratio(together, cpu["step"], "step", "<= 0.02")))
    rows += [row(name, cpu[name], np.min, ratio(cpu[name], cpu["step"], "step")) for name in METHODS]
    more = cpu["step with m2po"]
    rows.append(row("training step with m2po", more, np.min, ratio(more, cpu["step"], "step")))
    shape = f"{sizes.sequences} x ({sizes.max_prompt_length} + {sizes.max_response_length})"
    return {"title": f"quickstart's step, {shape} tokens", "unit": "CPU-ms", "rows": rows, "notes": []}


def whole_step(config: Config, batch: Batch, method: Any) -> Callable[[int], Any]:
    """The quickstart's training step, packing included, each call on from the last one's state."""
    objective = ObjectiveConfig(algorithm="dc_grpo", zero_variance="drop", method=method)
    return steps_of(dataclasses.replace(config, objective=objective), batch)


def steps_of(config: Config, batch: Batch) -> Callable[[int], Any]:
    """Training steps on a batch that is packed each time, each on from the last one's state."""
    mesh = make_mesh(config.mesh)
    step, tx, packing = build.compile_train_step(config, mesh), build_optimizer(config), config.packing()
    params = jax.jit(partial(init_params, config.model))(jax.random.key(0))
    state = build.initial_state(config, mesh, tx, params)

    def run(number: int):
        nonlocal state
        del number
        state, metrics = step(state, packing(batch))
        return metrics

    return run


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--json", type=Path, metavar="PATH", help="write the figures there too")
    add("--rounds", type=int, default=21, help="runs of each program (default: 21)")
    add("--cores", type=int, default=1, help="cores to stay on (default: 1, the least noisy; 0: all)")
    return parser.parse_args()


def main() -> None:
    """Runs the comparisons and prints them."""
    args = parse()
    keep_freed_memory()
    pin(args.cores)
    config = runpy.run_path(str(QUICKSTART))["config"]()
    comparisons = [*compare_arrays(args.rounds), compare_step(config, args.rounds)]
    print(table(comparisons))
    if args.json:
        figures = {"environment": environment(args), "comparisons": comparisons}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
