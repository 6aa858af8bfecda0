"""The quickstart's work by dcjax and by plain JAX, in turns within one process: rollout, update, and DC-GRPO's step.

    python benchmarks/main_job.py [--json PATH] [--run-dir RUN]

- rollout: dcjax's engine loop against static batches in a `lax.while_loop`, in tokens per CPU-second.
- update: dcjax's train step (GRPO) against a hand-written update of the same maths, in CPU-milliseconds.
- penalty: DC-GRPO's train step against GRPO's, with the same metrics, in CPU-milliseconds.

Both sides are checked to compute the same before they are compared. How they are timed is said in timing.py; the plain
side is in plain_jax.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import runpy
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import plain_jax  # pyrefly: ignore[missing-import]  (beside this file)
from timing import environment, measure, pin, ratio, row, table  # pyrefly: ignore[missing-import]

from dcjax.allocator import keep_freed_memory
from dcjax.data.arithmetic import build_tokenizer
from dcjax.data.task import encode_prompts
from dcjax.errors import RunError
from dcjax.loop.checkpoint import Checkpoints
from dcjax.loop.evaluate import responses
from dcjax.loop.run_directory import load_config
from dcjax.loop.warm_start import warm_start
from dcjax.recipe import build
from dcjax.recipe.build import build_optimizer, open_problems
from dcjax.recipe.config import Config
from dcjax.rewards.in_process import InProcessRewards
from dcjax.serving.formats import Format, FormatName
from dcjax.serving.rollout import sample_responses
from dcjax.sharding.mesh import make_mesh
from dcjax.types import Batch, Rollout

QUICKSTART = Path(__file__).parent.parent / "dcjax" / "recipes" / "quickstart.py"
SERVED: tuple[FormatName, ...] = ("float32", "bf16", "int8")
"""Formats whose rollouts are timed."""
LARGEST_DIFFERENCE = 1e-5
"""Between the parameters that dcjax's and the plain updates reach."""
CHECKED_UPDATES = 4
"""Of which the first has learning rate 0, in the warm-up."""
STANDARD_ERRORS = 4.0
"""By how many the mean response lengths of two samplers may differ."""


@dataclass(frozen=True)
class Setup:
    """What all comparisons share."""

    config: Config
    mesh: jax.sharding.Mesh
    tokenizer: Any
    problems: list
    rounds: int

    def key(self, number: int) -> jax.Array:
        """The sampling key of a round; -2 and -1 are the warm-up's."""
        return jax.random.fold_in(jax.random.key(self.config.seed), number + 2)


def open_setup(config: Config | None, rounds: int) -> Setup:
    """Of a run's config, or of the quickstart's."""
    config = config or runpy.run_path(str(QUICKSTART))["config"]()
    tokenizer = build_tokenizer()
    problems = list(open_problems(config, tokenizer).problems("train", config.seed, 0, config.rollout.prompts))
    return Setup(config, make_mesh(config.mesh), tokenizer, problems, rounds)


# --- weights ---


def load_weights(setup: Setup, args: argparse.Namespace) -> dict[str, Any]:
    """Parameters to sample with, by a name for the table."""
    if args.run_dir is not None:
        with Checkpoints(args.run_dir / "checkpoints") as checkpoints:
            if not (steps := checkpoints.steps()):
                raise RunError(f"{args.run_dir} holds no checkpoint")
            last = steps[-1]
            state, _ = checkpoints.restore(last, build.abstract_state(setup.config, setup.mesh))
        return {f"{args.run_dir}, step {last}": state.params}
    return {f"{share:.0%} scratchpads": warmed_up(setup, share, args.warm_start_steps) for share in args.scratchpads}


def warmed_up(setup: Setup, share: float, steps: int):
    """Parameters behind a warm start that ends on a share of long responses."""
    with tempfile.TemporaryDirectory() as folder:
        settings = dataclasses.replace(setup.config.warm_start, steps=steps, late_scratchpads=share)
        config = dataclasses.replace(setup.config, run_dir=Path(folder), warm_start=settings)
        return warm_start(config, setup.mesh, setup.tokenizer, config.task.open(setup.tokenizer))


# --- rollout ---


def engine_loop(setup: Setup, params, format: FormatName | Format) -> Callable[[int], Rollout]:
    """dcjax's rollout."""
    serving = dataclasses.replace(setup.config.serving, format=format)
    config = dataclasses.replace(setup.config, serving=serving)
    engine = build.build_engine(config, setup.mesh, [setup.tokenizer.eos_token_id])
    served, prompts = engine.sync(params, 0), encode_prompts(setup.tokenizer, setup.problems)
    group_size, temperature = config.rollout.group_size, config.rollout.temperature
    return lambda number: sample_responses(
        engine, served, prompts, samples_per_prompt=group_size, temperature=temperature, key=setup.key(number)
    )


def padded_prompts(setup: Setup) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [P, W], padded on the left, and the mask of those that are real."""
    prompts = encode_prompts(setup.tokenizer, setup.problems)
    tokens = np.zeros((len(prompts), setup.config.rollout.max_prompt_length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for number, prompt in enumerate(prompts):
        tokens[number, -len(prompt) :], mask[number, -len(prompt) :] = prompt, True
    return tokens, mask


def static_batches(setup: Setup, params, noise_ahead: bool) -> Callable[[int], tuple[np.ndarray, ...]]:
    """The plain rollout of the same prompts with the same keys: tokens, log-probs and lengths on the host."""
    config, limits = setup.config, setup.config.rollout
    rollout = plain_jax.make_rollout(
        config.model,
        group_size=limits.group_size,
        slots=config.serving.slots,
        limit=limits.max_response_length,
        end_token=setup.tokenizer.eos_token_id,
        noise_ahead=noise_ahead,
    )
    tokens, mask = padded_prompts(setup)
    weights, temperature = plain_jax.unstack(config.model, params), np.float32(limits.temperature)
    longest = np.full(limits.sequences, limits.max_response_length, np.int32)
    return lambda number: jax.device_get(rollout(weights, tokens, mask, setup.key(number), temperature, longest))


def compare_rollouts(setup: Setup, label: str, params) -> dict[str, Any]:
    """Tokens per CPU-second of the plain rollout and of each format."""
    programs: dict[str, Callable] = {
        "plain": static_batches(setup, params, False),
        "ahead": static_batches(setup, params, True),
    }
    programs |= {format: engine_loop(setup, params, format) for format in SERVED}
    timed = measure(f"rollout, {label}", programs, setup.rounds)
    lengths = {name: np.array([_lengths(result) for result in of.results]) for name, of in timed.items()}
    speed = {name: lengths[name].sum(axis=1) / of.cpu for name, of in timed.items()}
    rows = [
        row(f"plain JAX, static batches of {setup.config.serving.slots}", speed["plain"], np.max),
        row("plain JAX, noise ahead", speed["ahead"], np.max, ratio(speed["ahead"], speed["plain"], "plain")),
    ]
    for format in SERVED:
        _check_lengths(f"rollout, {label}", format, lengths[format], lengths["plain"])
        goal = ">= 1.3" if format == "float32" else ""
        over_plain = ratio(speed[format], speed["plain"], "plain", goal)
        over_ahead = ratio(speed[format], speed["ahead"], "plain, noise ahead")
        rows.append(row(f"dcjax, {format}", speed[format], np.max, over_plain, over_ahead))
    same = _same_responses(timed["plain"].results, timed["float32"].results)
    notes = [
        f"mean length {lengths['plain'].mean():.2f} tokens; {same:.1%} of responses are equal in plain and float32",
        "noise ahead: a batch's random numbers are drawn in one call before its loop, to the same samples",
        f"static batches keep {_occupancy(setup, lengths['plain']):.0%} of their slots busy",
    ]
    return {"title": f"rollout, {label}", "unit": "tokens per CPU-second", "rows": rows, "notes": notes}


def _occupancy(setup: Setup, lengths: np.ndarray) -> float:
    """Share of the slots' steps in static batches that sample a token: all that continuous batching can win back."""
    slots = setup.config.serving.slots
    return float(lengths.sum() / (slots * lengths.reshape(-1, slots).max(axis=1).sum()))


def _lengths(result) -> np.ndarray:
    return np.asarray(result.response_mask).sum(axis=1) if isinstance(result, Rollout) else result[2]


def _check_lengths(title: str, format: str, ours: np.ndarray, plain: np.ndarray) -> None:
    if ours.shape != plain.shape:
        raise SystemExit(f"{title}: {format} gave {ours.shape[1]} samples a round, plain JAX {plain.shape[1]}")
    allowed = STANDARD_ERRORS * np.sqrt((ours.var() + plain.var()) / ours.size)
    if abs(ours.mean() - plain.mean()) > allowed:
        means = f"{ours.mean():.2f} tokens in {format} and {plain.mean():.2f} in plain JAX"
        raise SystemExit(f"{title}: mean lengths, {means}, differ by more than {allowed:.2f}")


def _same_responses(plain: list, ours: list[Rollout]) -> float:
    """Share of responses equal token by token; all but near-ties are, as the keys are the same."""
    pairs = zip(plain, ours, strict=True)
    return float(
        np.mean([(tokens == rollout.tokens[:, -tokens.shape[1] :]).all(axis=1) for (tokens, *_), rollout in pairs])
    )


# --- update and penalty ---


class Stepper:
    """A train step on the same batch again and again, keeping its state."""

    def __init__(self, step: Callable, state: Any, batch: Any, prepare: Callable = lambda batch: batch):
        self.state, self._step, self._batch, self._prepare = state, step, batch, prepare

    def __call__(self, number: int = 0) -> Any:
        self.state, metrics = self._step(self.state, self._prepare(self._batch))
        return jax.block_until_ready((self.state, metrics))[1]


def sampled_batch(setup: Setup, params) -> Batch:
    """An iteration's batch from the deployed engine."""
    rollout = engine_loop(setup, params, setup.config.serving.format)(0)
    group_size = setup.config.rollout.group_size
    golds = [problem.answer for problem in setup.problems for _ in range(group_size)]
    scorer = InProcessRewards(setup.config.task.reward)
    rewards = scorer.submit(responses(setup.tokenizer, rollout), golds, rollout.finished.tolist()).result()
    return Batch.of(rollout, rewards=rewards, group_size=group_size)


def dcjax_step(setup: Setup, params, batch: Batch, algorithm: str, tokens_per_microbatch: int | None = None) -> Stepper:
    """dcjax's step as it trains with it, packing included; with None, with the recipe's tokens."""
    changed: dict[str, dict[str, Any]] = {"objective": {"algorithm": algorithm}}
    if tokens_per_microbatch is not None:
        changed["optimizer"] = {"tokens_per_microbatch": tokens_per_microbatch}
    sections = {name: dataclasses.replace(getattr(setup.config, name), **of) for name, of in changed.items()}
    config = dataclasses.replace(setup.config, **sections)
    copied = jax.tree.map(lambda leaf: jax.numpy.array(leaf, copy=True), params)
    state = build.initial_state(config, setup.mesh, build_optimizer(config), copied)
    return Stepper(build.compile_train_step(config, setup.mesh), state, batch, config.packing())


def plain_step(setup: Setup, params, batch: Batch, microbatch_size: int, skip: bool) -> Stepper:
    """The hand-written update."""
    update = plain_jax.make_update(setup.config, microbatch_size=microbatch_size, skip_last_layer=skip)
    arrays = {name: value for name, value in vars(batch).items() if value is not None}
    return Stepper(update, plain_jax.initial_state(setup.config.model, params), arrays)


def compare_updates(setup: Setup, params, batch: Batch, tokens: list[int], rows: list[int]) -> dict[str, Any]:
    """CPU-milliseconds of dcjax by tokens of a microbatch, of plain JAX by its rows; ratios are to its best."""
    packing, ours = setup.config.packing(), "dcjax, as the recipe"
    programs = {ours: dcjax_step(setup, params, batch, "grpo")}
    programs |= {f"dcjax, {size} tokens": dcjax_step(setup, params, batch, "grpo", size) for size in tokens}
    for kind, skip in (("plain JAX", False), ("plain JAX, skipping", True)):
        programs |= {f"{kind}, {size} rows": plain_step(setup, params, batch, size, skip) for size in rows}
    note = check_updates(setup, programs)
    cpu = {name: of.cpu * 1e3 for name, of in measure("update", programs, setup.rounds).items()}

    def best(kind: str) -> str:
        return min((f"{kind}, {size} rows" for size in rows), key=lambda name: np.median(cpu[name]))

    rivals = [best("plain JAX"), best("plain JAX, skipping")]
    lines = []
    for name in programs:
        goal = "<= 1.1" if name == ours else ""
        compared = rivals if name.startswith("dcjax") else []
        ratios = [ratio(cpu[name], cpu[rival], f"best {rival}", goal) for rival in compared]
        lines.append(row(name, cpu[name], np.min, *ratios))
    filled = packing.filled(packing(batch))
    notes = [
        note,
        f"the recipe's bins are {packing.bins.width} of {packing.bins.columns} tokens, {filled:.0%} filled",
        "skipping: prompt columns go through the last layer only as keys and values",
    ]
    return {"title": "update", "unit": "CPU-ms", "rows": lines, "notes": notes}


def check_updates(setup: Setup, programs: Mapping[Any, Stepper]) -> str:
    """How far the parameters of all programs moved, and how far apart they are afterwards.

    Raises:
      SystemExit: they differ by more than 1e-5.
    """
    reached, start = [], _parameters(setup, next(iter(programs.values())).state)
    for program in programs.values():
        for _ in range(CHECKED_UPDATES):
            program()
        reached.append(_parameters(setup, program.state))
    differences = {name: _largest_difference(tree, reached[0]) for name, tree in zip(programs, reached, strict=True)}
    worst = max(differences, key=differences.__getitem__)
    if not differences[worst] <= LARGEST_DIFFERENCE:
        raise SystemExit(f"update: {worst} differs by {differences[worst]:.1e}, more than {LARGEST_DIFFERENCE}")
    moved = _largest_difference(reached[0], start)
    return f"after {CHECKED_UPDATES} updates parameters agree to {differences[worst]:.1e}, having moved by {moved:.1e}"


def _parameters(setup: Setup, state):
    unstacked = isinstance(state, dict)
    params = state["params"] if unstacked else plain_jax.unstack(setup.config.model, state.params)
    return jax.device_get(params)


def _largest_difference(tree, reference) -> float:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True)
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)


def compare_penalty(setup: Setup, params, batch: Batch) -> dict[str, Any]:
    """CPU-milliseconds of DC-GRPO's step and of GRPO's."""
    programs = {name: dcjax_step(setup, params, batch, name) for name in ("grpo", "dc_grpo")}
    timed = measure("penalty", programs, 3 * setup.rounds)
    cpu = {name: of.cpu * 1e3 for name, of in timed.items()}
    rows = [row("grpo", cpu["grpo"], np.min)]
    rows.append(row("dc_grpo", cpu["dc_grpo"], np.min, ratio(cpu["dc_grpo"], cpu["grpo"], "grpo", "<= 1.02")))
    differing = sorted(set(timed["grpo"].results[-1]) ^ set(timed["dc_grpo"].results[-1]))
    notes = [f"metrics that only one of them has: {', '.join(differing) or 'none'}"]
    return {"title": "penalty", "unit": "CPU-ms", "rows": rows, "notes": notes}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--json", type=Path, metavar="PATH", help="write the figures there too")
    add("--run-dir", type=Path, metavar="RUN", help="weights of a run's newest checkpoint, instead of warm starts")
    add("--warm-start-steps", type=int, default=150, help="supervised updates before sampling (default: 150)")
    scratchpads = "share of long responses that each warm start ends on (default: .15 as before RL, .5, and 1 as after)"
    add("--scratchpads", type=float, nargs="+", default=[0.15, 0.5, 1.0], metavar="SHARE", help=scratchpads)
    tokens = "tokens in dcjax's forward and backward pass, beside the recipe's own (default: 512 1024 2048)"
    add("--tokens", type=int, nargs="+", default=[512, 1024, 2048], metavar="NUMBER", help=tokens)
    rows = "rows in plain JAX's forward and backward pass (default: 8 16 32 64)"
    add("--microbatches", type=int, nargs="+", default=[8, 16, 32, 64], metavar="ROWS", help=rows)
    add("--rounds", type=int, default=11, help="runs of each program, 3 times as many for the penalty (default: 11)")
    add("--cores", type=int, default=1, help="cores to stay on (default: 1, the least noisy; 0: all)")
    return parser.parse_args()


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All comparisons, in the order of the table.

    Raises:
      RunError: the run directory cannot be read.
      ValueError: a size that does not fit the recipe.
    """
    setup = open_setup(load_config(args.run_dir) if args.run_dir else None, args.rounds)
    weights = load_weights(setup, args)
    comparisons = [compare_rollouts(setup, label, params) for label, params in weights.items()]
    params = list(weights.values())[-1]
    batch = sampled_batch(setup, params)
    comparisons.append(compare_updates(setup, params, batch, args.tokens, args.microbatches))
    comparisons.append(compare_penalty(setup, params, batch))
    return comparisons


def main() -> None:
    """Runs the comparisons and prints them."""
    args = parse()
    keep_freed_memory()
    pin(args.cores)
    try:
        comparisons = compare(args)
    except (RunError, ValueError) as error:
        sys.exit(f"main_job: {error}")
    print(table(comparisons))
    if args.json:
        figures = {"environment": environment(args), "comparisons": comparisons}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
