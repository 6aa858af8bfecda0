"""Whether several seeds in one program pay: the quickstart's rollout and update by hand, one after another and vmapped.

    python benchmarks/seeds.py [--seeds 4] [--json PATH]

Seeds have keys of their own, and copies of the same parameters, prompts and batch. Both programs are plain_jax.py's,
so that nothing of dcjax's limits them; verifiers, syncs and logging are left out. How they are timed is said in
timing.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import main_job  # pyrefly: ignore[missing-import]  (beside this file)
import numpy as np
import plain_jax  # pyrefly: ignore[missing-import]
from timing import environment, measure, pin, ratio, row, table  # pyrefly: ignore[missing-import]

from dcjax.allocator import keep_freed_memory

LARGEST_DIFFERENCE = 1e-4
"""Between what the programs compute: parameters, log-probs, and tokens, which must be equal."""
MICROBATCH = 32
"""Rows of a forward and backward pass of one seed."""


def stacked(trees):
    """Trees of equal shapes as one, the seed the first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *trees)


def compare(title: str, program, inputs: list[tuple[Any, ...]], rounds: int) -> dict[str, Any]:
    """CPU-milliseconds a seed of a program that is called for each seed, and of the same for all seeds at once.

    Raises:
      SystemExit: they do not compute the same.
    """
    alone, together = jax.jit(lambda *each: program(*each)), jax.jit(jax.vmap(program))  # neither donates
    all_inputs = stacked(inputs)
    expected, found = stacked([alone(*each) for each in inputs]), together(*all_inputs)
    different = max(
        float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True)
    )
    if not different <= LARGEST_DIFFERENCE:
        raise SystemExit(f"{title}: the programs differ by {different:.1e}, more than {LARGEST_DIFFERENCE}")
    programs = {
        "one after another": lambda number: [alone(*each) for each in inputs],
        "in one program": lambda number: together(*all_inputs),
    }
    cpu = {name: of.cpu * 1e3 / len(inputs) for name, of in measure(title, programs, rounds).items()}
    first, second = programs
    lines = [row(first, cpu[first], np.min), row(second, cpu[second], np.min, ratio(cpu[second], cpu[first], first))]
    return {"title": title, "unit": "CPU-ms a seed", "rows": lines, "notes": [f"largest difference {different:.1e}"]}


def main() -> None:
    """Prints the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="seeds in one program")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warm-start-steps", type=int, default=150)
    parser.add_argument("--cores", type=int, default=1, help="cores to stay on")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    keep_freed_memory()
    pin(args.cores)
    setup = main_job.open_setup(None, args.rounds)
    config, limits = setup.config, setup.config.rollout
    params = main_job.warmed_up(setup, 0.5, args.warm_start_steps)
    batch = main_job.sampled_batch(setup, params)
    rollout = plain_jax.make_rollout(
        config.model,
        group_size=limits.group_size,
        slots=config.serving.slots,
        limit=limits.max_response_length,
        end_token=setup.tokenizer.eos_token_id,
        noise_ahead=True,
    )
    update = plain_jax.make_update(config, microbatch_size=MICROBATCH, skip_last_layer=False)
    rest = (np.float32(limits.temperature), np.full(limits.sequences, limits.max_response_length, np.int32))
    arrays = {name: value for name, value in vars(batch).items() if value is not None}
    weights, prompts = plain_jax.unstack(config.model, params), main_job.padded_prompts(setup)
    state = plain_jax.initial_state(config.model, params)
    comparisons = [
        compare(
            "rollout", rollout, [(weights, *prompts, setup.key(seed), *rest) for seed in range(args.seeds)], args.rounds
        ),
        compare("update", update, [(state, arrays)] * args.seeds, args.rounds),
    ]
    print(table(comparisons))
    if args.json is not None:
        figures = {"environment": environment(args), "comparisons": comparisons}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
