"""What the packed update costs: against the tokens of its batch, on the host, and in memory.

    python benchmarks/packing.py [--json PATH] [--picture PATH]

The model and GRPO's step are those of peers/model.py, the responses ragged: lognormal, of a mean of .35 × 64 tokens.

- tokens: CPU-milliseconds of the update, packing included, where the batch has 1, 2, 4 and 8 times the rows, and the
  limit of a response stays at 64 tokens.
- limit: the same where the limit is 64, 128, 256 and 512 tokens, and the batch is the one of 8 times the rows: the same
  responses, with more columns behind them. A doubling costs 5% at most.
- host: packing alone, as a share of the update that it is for; 2% at most.
- shares: how much of what 64 devices with two rows each compute holds a token, and 16 with eight each, where responses
  are uniform in [0, 8192]: with rows where the batch's order puts them, and dealt as packing does; on TPUs, whose bins
  are not halved.
- memory: what XLA plans for the compiled step at once, against a step that takes 16 rows as they are into a microbatch.

How they are timed is said in timing.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from timing import environment, measure, pin, ratio, row, table  # pyrefly: ignore[missing-import]

sys.path.append(str(Path(__file__).parent / "peers"))
import model  # pyrefly: ignore[missing-import]
import work  # pyrefly: ignore[missing-import]

from dcjax.allocator import keep_freed_memory
from dcjax.models import init_params, token_logps
from dcjax.recipe import build
from dcjax.recipe.build import build_optimizer
from dcjax.recipe.config import Config
from dcjax.rl.packing import Packing
from dcjax.rl.step import PolicyOutputs
from dcjax.sharding.mesh import make_mesh
from dcjax.types import Batch, Params, Sequences

RESULTS = Path(__file__).parent / "results"
GROWTH = (1, 2, 4, 8)
LIMIT, GROUP_SIZE, BATCHES = 8192, 8, 20
"""Of shares: the longest response, responses to a prompt, and batches drawn."""
SHARES = {64: 2, 16: 8}
"""Devices, and rows of an update that each has."""
UNPACKED_ROWS = 16
"""Rows of a microbatch that is not packed, with which recipes trained by default."""
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Work:
    """A batch, by its size and the longest response that there might have been."""

    times: int
    limit: int

    @property
    def config(self) -> Config:
        """The run whose update this is."""
        config = model.config(slots=1, steps_per_call=1)
        sizes = {"prompts": self.times * work.PROMPTS, "max_response_length": self.limit}
        return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, **sizes))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each response, the same whatever the limit."""
        return model.draw_lengths(self.config.rollout.sequences, limit=work.RESPONSE_LENGTH)

    def batch(self) -> Batch:
        """Random tokens and rewards."""
        rng, config, lengths = np.random.default_rng(0), self.config.rollout, self.lengths
        asked = rng.integers(work.VOCABULARY, size=(config.prompts, work.PROMPT_LENGTH))
        prompts = np.repeat(asked, config.group_size, axis=0)
        mask = np.arange(self.limit) < lengths[:, None]
        responses = np.where(mask, rng.integers(work.VOCABULARY, size=mask.shape), 0)
        sequences = Sequences(
            tokens=np.concatenate([prompts, responses], axis=1).astype(np.int32),
            attention_mask=np.concatenate([np.ones(prompts.shape, bool), mask], axis=1),
            response_mask=mask,
            rollout_logps=np.where(mask, -5.0, 0.0).astype(np.float32),
            temperature=np.ones(len(mask), np.float32),
        )
        rewards = rng.random(len(mask)).astype(np.float32)
        return Batch.of(sequences, rewards=rewards, group_size=config.group_size)


class Update:
    """The update of a batch as a run does it, again and again from its own state."""

    def __init__(self, of: Work):
        config = of.config
        mesh = make_mesh(config.mesh)
        self.packing, self.batch = config.packing(), of.batch()
        self._step = build.compile_train_step(config, mesh)
        params = jax.jit(partial(init_params, config.model))(jax.random.key(0))
        self._state = build.initial_state(config, mesh, build_optimizer(config), params)

    def pack(self, number: int = 0) -> Batch:
        """The host's part."""
        del number
        return self.packing(self.batch)

    def __call__(self, number: int) -> dict[str, float]:
        """The host's part and the device's."""
        self._state, metrics = self._step(self._state, self.pack(number))
        return build.metrics_to_host(metrics)


def compare_times(rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The tables of time, and the points of the picture."""
    by_tokens = [Work(times, work.RESPONSE_LENGTH) for times in GROWTH]
    by_limit = [Work(GROWTH[-1], times * work.RESPONSE_LENGTH) for times in GROWTH]
    updates = {of: Update(of) for of in dict.fromkeys(by_tokens + by_limit)}
    programs: dict[Any, Callable] = dict(updates) | {("host", of): updates[of].pack for of in by_tokens}
    cpu = {name: timed.cpu * 1e3 for name, timed in measure("packing", programs, rounds).items()}

    def tokens(of: Work) -> str:
        return f"{of.lengths.sum()} tokens"

    def note(of: Work) -> str:
        bins, filled = updates[of].packing.bins, updates[of].packing.filled(updates[of].pack())
        return f"{tokens(of)}, limit {of.limit}: {bins.columns} columns in bins of {bins.width}, {filled:.0%} filled"

    def grown(
        title: str, line: list[Work], name: Callable[[Work], str], goal: str, per: Callable[[Work], float]
    ) -> dict[str, Any]:
        rows = [row(name(line[0]), cpu[line[0]], np.min)]
        for before, after in itertools.pairwise(line):
            cost = {of: cpu[of] / per(of) for of in (before, after)}
            rows.append(row(name(after), cpu[after], np.min, ratio(cost[after], cost[before], name(before), goal)))
        return {"title": title, "unit": "CPU-ms", "rows": rows, "notes": [note(of) for of in line]}

    host = [
        row(tokens(of), cpu["host", of], np.min, ratio(cpu["host", of], cpu[of], "update", "<= 0.02"))
        for of in by_tokens
    ]
    tables = [
        grown("tokens, time of each against", by_tokens, tokens, "", lambda of: of.lengths.sum()),
        grown("limit", by_limit, lambda of: f"limit {of.limit}", "<= 1.05", lambda of: 1.0),
        {"title": "host: packing", "unit": "CPU-ms", "rows": host, "notes": []},
    ]
    points = {
        "tokens": [[int(of.lengths.sum()), float(np.median(cpu[of]))] for of in by_tokens],
        "limit": [[of.limit, float(np.median(cpu[of]))] for of in by_limit],
    }
    return tables, points


# --- shares ---


def compare_shares() -> dict[str, Any]:
    """Filled columns in percent, of each batch, without and with balance."""
    rows = []
    for (shares, each), prompt in itertools.product(SHARES.items(), (1024, 150)):
        for columns in (9216, 10_240, 13_312, 17_408):
            packing = Packing.fitting(
                prompt_length=prompt,
                response_length=LIMIT,
                rows=shares * each,
                group_size=GROUP_SIZE,
                tokens_per_microbatch=columns,
                shares=shares,
                platform="tpu",
                masked=False,
            )
            filled = 100 * np.array([_filled(packing, prompt, shares * each, seed) for seed in range(BATCHES)])
            in_order, balanced = filled.T
            name = f"{shares} × {each}, prompt {prompt}, F {columns}"
            rows.append(row(f"{name}, in order", in_order, np.max))
            rows.append(row(f"{name}, balanced", balanced, np.max, ratio(balanced, in_order, "in order", ">= 1")))
    return {"title": "shares: columns filled", "unit": "%", "rows": rows, "notes": []}


def _filled(packing: Packing, prompt: int, rows: int, seed: int) -> tuple[float, float]:
    """The filled share of the columns, where each share is packed alone in the batch's order, and as packing says."""
    lengths = np.random.default_rng(seed).integers(0, LIMIT + 1, rows)
    mask = np.concatenate([np.ones((rows, prompt), bool), np.arange(LIMIT) < lengths[:, None]], axis=1)
    tokens = np.where(mask, (np.arange(rows) // GROUP_SIZE)[:, None], 0).astype(np.int32)
    scalars = np.zeros(rows, np.float32)
    sequences = Sequences(tokens, mask, mask[:, prompt:], np.zeros((rows, LIMIT), np.float32), scalars)
    batch = Batch.of(sequences, rewards=scalars, group_size=GROUP_SIZE)
    packed, alone = packing(batch), Packing(packing.bins)
    parts = [jax.tree.map(lambda x, of=of: x[of], batch) for of in np.split(np.arange(rows), packing.shares)]
    in_order = max(_count(alone(part)) for part in parts)
    filled = packing.filled(packed)
    return filled * _count(packed) / in_order, filled


def _count(packed: Batch) -> int:
    """Microbatches that all shares compute in the only update."""
    assert packed.microbatches is not None
    return int(np.asarray(packed.microbatches.count).max())


# --- memory ---


def unpacked_step(config: Config) -> Callable:
    """The same step on rows as they are."""

    def apply_fn(params: Params, batch: Batch) -> PolicyOutputs:
        length = batch.response_mask.shape[1]
        scores = token_logps(
            config.model,
            params,
            batch.tokens,
            batch.attention_mask,
            response_length=length,
            temperature=batch.temperature,
        )
        return PolicyOutputs(scores.logps, scores.entropy)

    objective, tx = build.objective_of(config), build_optimizer(config)
    sizes = {"group_size": config.rollout.group_size, "microbatch_size": UNPACKED_ROWS}
    step = build.make_step(objective, apply_fn, tx, **sizes)
    return build.compile_step(config.model, make_mesh(config.mesh), tx, step)


def compare_memory() -> dict[str, Any]:
    """Mebibytes of the state, the batch and all that is computed from them, at the most."""
    rows = []
    for times in GROWTH:
        config = Work(1, times * work.RESPONSE_LENGTH).config
        mesh = make_mesh(config.mesh)
        state, batch = build.abstract_state(config, mesh), build.abstract_batch(config, mesh)
        packed = np.array([_memory(build.compile_train_step(config, mesh), state, batch)])
        as_rows = np.array([_memory(unpacked_step(config), state, dataclasses.replace(batch, microbatches=None))])
        limit = f"limit {config.rollout.max_response_length}"
        rows.append(row(f"{limit}, {UNPACKED_ROWS} rows as they are", as_rows, np.min))
        rows.append(row(f"{limit}, packed", packed, np.min, ratio(packed, as_rows, "rows", "<= 1")))
    return {"title": "memory", "unit": "MiB", "rows": rows, "notes": []}


def _memory(step: Any, state: Any, batch: Any) -> float:
    planned = step.lower(state, batch).compile().memory_analysis()
    held = planned.argument_size_in_bytes + planned.output_size_in_bytes - planned.alias_size_in_bytes
    return (held + planned.temp_size_in_bytes) / MEBIBYTE


# --- output ---


def draw(points: dict[str, Any], path: Path) -> None:
    """A picture of both growths, each with the line that it is held against."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    (tokens, limits) = figure.subplots(1, 2)
    number, milliseconds = np.array(points["tokens"]).T
    tokens.plot(number, milliseconds, "o-", label="measured")
    tokens.plot(number, milliseconds[0] * number / number[0], "k:", label="in proportion to the first")
    tokens.set(xlabel="response tokens (limit 64)", ylabel="update (CPU-ms, one core)", ylim=(0, None))
    limit, milliseconds = np.array(points["limit"]).T
    limits.plot(limit, milliseconds, "o-", label="measured")
    limits.plot(limit, milliseconds[0] * 1.05 ** np.log2(limit / limit[0]), "k:", label="5% more with each doubling")
    limits.set(xscale="log", xlabel="limit of a response (the same tokens)", ylim=(0, None))
    for axes, ticks in ((tokens, number), (limits, limit)):
        axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.legend()
    figure.savefig(path, dpi=150)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--json", type=Path, default=RESULTS / "packing.json", metavar="PATH", help="where the figures go")
    add("--picture", type=Path, default=RESULTS / "packing.png", metavar="PATH", help="where growth is drawn")
    add("--rounds", type=int, default=11, help="runs of each program (default: 11)")
    add("--cores", type=int, default=1, help="cores to stay on (default: 1, the least noisy; 0: all)")
    return parser.parse_args()


def main() -> None:
    """Measures, prints, writes and draws."""
    args = parse()
    keep_freed_memory()
    pin(args.cores)
    tables, points = compare_times(args.rounds)
    tables += [compare_shares(), compare_memory()]
    print(table(tables))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    figures = {"environment": environment(args), "comparisons": tables, "growth": points}
    args.json.write_text(json.dumps(figures, indent=2) + "\n")
    draw(points, args.picture)


if __name__ == "__main__":
    main()
