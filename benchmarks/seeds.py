"""What several seeds in one program save: the quickstart's update for S seeds at once, against S updates in turn.

    python benchmarks/seeds.py [--json PATH]

The update alone, on batches of equal shapes, which is the best case: rollouts end at different lengths, and a program
of several seeds waits for the longest of all. How programs are timed is said in timing.py.
"""

from __future__ import annotations

import argparse
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from objective import QUICKSTART, random_batch  # pyrefly: ignore[missing-import]
from timing import environment, measure, pin, ratio, row, table  # pyrefly: ignore[missing-import]

from dcjax.allocator import keep_freed_memory
from dcjax.models import init_params
from dcjax.recipe import build
from dcjax.recipe.config import Config
from dcjax.sharding.mesh import make_mesh

SEEDS = (2, 4, 8)
"""How many are trained in one program."""


def updates_of(config: Config, seeds: int) -> Callable[[int], Any]:
    """Updates of so many seeds in one program, each on from the last one's states; 1 is the step as a run has it."""
    sizes, mesh = config.rollout, make_mesh(config.mesh)
    step, tx = build.compile_train_step(config, mesh), build.build_optimizer(config)
    batch = random_batch(sizes.sequences, sizes.max_prompt_length, sizes.max_response_length, sizes.group_size)
    packed = config.packing()(batch)
    state = build.initial_state(config, mesh, tx, init_params(config.model, jax.random.key(0)))
    if seeds > 1:
        step = jax.jit(jax.vmap(step), donate_argnums=0)
        state, packed = (
            jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * seeds), each) for each in (state, packed)
        )

    def run(number: int):
        nonlocal state
        del number
        state, metrics = step(state, packed)
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
    """Times them, and prints each program's time a seed."""
    args = parse()
    keep_freed_memory()
    pin(args.cores)
    config = runpy.run_path(str(QUICKSTART))["config"]()
    timed = measure("seeds", {str(count): updates_of(config, count) for count in (1, *SEEDS)}, args.rounds)
    cpu = {int(name): of.cpu * 1e3 / int(name) for name, of in timed.items()}
    rows = [row("1 seed", cpu[1], min)]
    rows += [row(f"{count} seeds, each", cpu[count], min, ratio(cpu[count], cpu[1], "1 seed")) for count in SEEDS]
    comparison = {"title": "update of the quickstart", "unit": "CPU-ms a seed", "rows": rows, "notes": []}
    print(table([comparison]))
    if args.json:
        args.json.write_text(
            json.dumps({"environment": environment(args), "comparisons": [comparison]}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
