"""Packing, on the host: which rows of an iteration go through a forward and backward pass together, and where they lie.

Responses are of many lengths, and the G of a group have their prompt in common. So a row is not computed with its
padding: the tokens of several rows share a bin, each prompt stands once in a microbatch, and all its responses there
attend to it. Bins are filled first-fit, longest response first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from dcjax.types import Batch, Bins, Microbatches, Places

POOL = 1.25
"""Tokens of the rows that a microbatch chooses from, as a multiple of its columns: enough short ones to fill gaps."""
DEFAULT_ROWS = 8
"""Responses of the limit's length that a microbatch has room for by default. A larger one reads the parameters less
often, but leaves more of the last one empty; on CPU that costs more than it saves."""
DEFAULT_TOKENS = 16_384
"""Tokens of a microbatch at most by default, where one row does not need more."""
ROWS_OF_BIN = 16
"""Rows of a microbatch at most, for each of its bins."""


class Row(NamedTuple):
    """What packing has to know of a row."""

    number: int
    # columns of its response
    response: int
    # columns of its prompt, without the last token
    prompt: int
    # equal for rows with equal prompts
    prompt_id: int


class Place(NamedTuple):
    """A row in its microbatch, as `Places` describes it."""

    row: int
    response: int
    prompt: int
    gathered: int


@dataclasses.dataclass(frozen=True)
class Packing:
    """How the iterations of a run are cut into microbatches of packed rows; `fitting` chooses the bins.

    Example: a batch of 128 responses, 8 to a prompt, on one device, for a step that was made with the same numbers.

        packing = Packing.fitting(prompt_length=64, response_length=512, rows=128, group_size=8)
        state, metrics = train_step(state, packing(batch))
    """

    # what a microbatch of one share has room for
    bins: Bins
    # parts of a minibatch's rows that are computed side by side, D
    shares: int = 1
    # minibatches of an iteration
    updates: int = 1
    # G; groups are dealt to the minibatches in turn
    group_size: int = 1

    @classmethod
    def fitting(
        cls,
        *,
        prompt_length: int,
        response_length: int,
        rows: int,
        group_size: int,
        tokens_per_microbatch: int | None = None,
        updates: int = 1,
        shares: int = 1,
        column_multiple: int = 1,
    ) -> Packing:
        """The packing for prompts and responses of at most these lengths.

        Args:
          prompt_length: P, in tokens.
          response_length: T, in tokens.
          rows: B, of an iteration.
          group_size: G.
          tokens_per_microbatch: columns that a share computes in one forward and backward pass, at most. By default as
            many as `DEFAULT_ROWS` of the longest responses and their prompts have, but not more than `DEFAULT_TOKENS`
            where a row fits into these.
          updates: minibatches of an iteration.
          shares: D.
          column_multiple: what the width of a bin is a multiple of, in columns.

        Raises:
          ValueError: tokens that are too few for the longest row.
        """

        def columns(tokens: int) -> int:
            return -(-tokens // column_multiple) * column_multiple

        # one bin needs room for a prompt beside its response; of several, another one may hold it
        widest, width = columns(prompt_length + response_length - 1), columns(max(response_length, prompt_length - 1))
        if tokens_per_microbatch is None:
            tokens_per_microbatch = max(widest, min((DEFAULT_ROWS + 1) * width, DEFAULT_TOKENS))
        if tokens_per_microbatch < widest:
            raise ValueError(
                f"tokens_per_microbatch is {tokens_per_microbatch}; it must be at least {widest}, which the longest "
                "prompt and response need"
            )
        number = tokens_per_microbatch // width
        width = width if number > 1 else tokens_per_microbatch // column_multiple * column_multiple
        bins = Bins(number, width, width, min(rows // updates // shares, ROWS_OF_BIN * number))
        return cls(bins, shares, updates, group_size)

    def __call__(self, batch: Batch) -> Batch:
        """The batch, which is on the host, with its microbatches; equal batches are cut alike.

        Raises:
          ValueError: a row that has no prompt, padding between tokens, or tokens for which a microbatch has no room.
        """
        rows = _rows(batch, self.bins)
        parts = self._parts(len(rows))
        cuts = [[_cut([rows[at] for at in share], self.bins) for share in minibatch] for minibatch in parts]
        table = np.full((*self._shape(len(rows)), len(Place._fields)), -1, np.int32)
        for update, share in np.ndindex(parts.shape[:2]):
            numbers = {row: number for number, row in enumerate(parts[update, share].tolist())}
            for at, placed in enumerate(cuts[update][share]):
                places = [place._replace(row=numbers[place.row]) for place in placed]
                table[share, update, at, : len(places)] = places
        counts = np.array([[len(minibatch[share]) for minibatch in cuts] for share in range(self.shares)], np.int32)
        numbers, responses, prompts, gathered = np.moveaxis(table, -1, 0)
        places = Places(responses, prompts, gathered, numbers >= 0)
        return dataclasses.replace(batch, microbatches=Microbatches(counts, numbers, places))

    def abstract(self, rows: int, sharding: jax.sharding.Sharding | None = None) -> Microbatches:
        """The shapes and dtypes of the microbatches of a batch with so many rows."""

        def table(dtype: type) -> Any:
            return jax.ShapeDtypeStruct(self._shape(rows), dtype, sharding=sharding)

        number = table(np.int32)
        counts: Any = jax.ShapeDtypeStruct((self.shares, self.updates), np.int32, sharding=sharding)
        return Microbatches(counts, number, Places(number, number, number, table(np.bool_)))

    def filled(self, batch: Batch) -> float:
        """The share of a packed batch's computed columns that hold a token; a prompt counts once for its group."""
        assert batch.microbatches is not None
        computed = batch.microbatches.count.max(axis=0).sum() * self.shares * self.bins.number * self.bins.width
        prompts = np.asarray(batch.prompt_mask).sum(axis=1)[:: self.group_size] - 1
        responses = np.asarray(batch.attention_mask).sum() - np.asarray(batch.prompt_mask).sum()
        return float((prompts.sum() + responses) / computed)

    def _parts(self, rows: int) -> Int[np.ndarray, "updates D rows"]:
        """The rows of each minibatch that each share computes."""
        dealt = np.arange(rows).reshape(-1, self.updates, self.group_size).swapaxes(0, 1)
        return dealt.reshape(self.updates, self.shares, -1)

    def _shape(self, rows: int) -> tuple[int, int, int, int]:
        """[D, updates, M, R]: in the worst case each row is a microbatch of its own."""
        return self.shares, self.updates, rows // self.updates // self.shares, self.bins.rows


def _rows(batch: Batch, bins: Bins) -> list[Row]:
    """The rows of a batch, checked."""
    mask = np.asarray(batch.attention_mask)
    length = mask.shape[1] - batch.response_mask.shape[1]
    prompts, responses = mask[:, :length].sum(axis=1), mask[:, length:].sum(axis=1)
    columns = np.arange(mask.shape[1])
    whole = (columns >= length - prompts[:, None]) & (columns < length + responses[:, None])
    if (wrong := np.flatnonzero((mask != whole).any(axis=1) | (prompts == 0))).size:
        raise ValueError(
            f"row {wrong[0]} of the batch has no prompt, or padding between its tokens; prompts are padded on the left "
            "and responses on the right"
        )
    if (most := max(responses.max(), prompts.max() - 1)) > bins.width or prompts.max() - 1 > bins.gathered:
        raise ValueError(
            f"a row of the batch needs {most} columns; its bins have {bins.width}, {bins.gathered} gathered"
        )
    ids = _prompt_ids(batch, length)
    return [
        Row(number, *of_row)
        for number, of_row in enumerate(zip(responses.tolist(), (prompts - 1).tolist(), ids, strict=True))
    ]


def _prompt_ids(batch: Batch, length: int) -> list[int]:
    """A number for each row's prompt; prompts whose tokens went to other experts are others."""
    known: dict[bytes, int] = {}
    tokens = np.where(batch.prompt_mask, np.asarray(batch.tokens)[:, :length], -1)
    experts = None if batch.experts is None else np.asarray(batch.experts)[:, : length - 1]
    ids = []
    for row, prompt in enumerate(tokens):
        key = prompt.tobytes() + (b"" if experts is None else experts[row].tobytes())
        ids.append(known.setdefault(key, len(known)))
    return ids


def _cut(rows: Sequence[Row], bins: Bins) -> list[list[Place]]:
    """The microbatches of one share: each takes from the next rows in order, until all have a place."""
    left, microbatches = list(rows), []
    while left:
        placed = _fill(_pool(left, POOL * bins.number * bins.width), bins)
        taken = {place.row for place in placed}
        left = [row for row in left if row.number not in taken]
        microbatches.append(placed)
    return microbatches


def _pool(rows: Sequence[Row], room: float) -> list[Row]:
    """The first rows, whole groups of them where they stand together, that need about so many columns."""
    columns, prompts, pool = 0, set(), []
    for row in rows:
        columns += row.response + (0 if row.prompt_id in prompts else row.prompt)
        if columns > room and pool and row.prompt_id not in prompts:
            break
        prompts.add(row.prompt_id)
        pool.append(row)
    return pool


def _fill(rows: Sequence[Row], bins: Bins) -> list[Place]:
    """The rows that find a place in one microbatch, the longest response first."""
    columns = _Columns(bins.number, bins.width)
    gathered = _Columns(bins.number, bins.gathered)
    prompts: dict[int, int] = {}
    placed: list[Place] = []
    for row in sorted(rows, key=lambda row: -row.response):
        if len(placed) == bins.rows:
            break
        new = row.prompt if row.prompt_id not in prompts else 0
        own = next((n for n in range(bins.number) if columns.has(n, row.response) and gathered.has(n, row.prompt)), -1)
        home = next((n for n in range(bins.number) if columns.has(n, new + (row.response if n == own else 0))), -1)
        if own < 0 or home < 0:
            continue
        response = columns.take(own, row.response)
        if row.prompt_id not in prompts:
            prompts[row.prompt_id] = columns.take(home, new) if new else -1
        placed.append(Place(row.number, response, prompts[row.prompt_id], gathered.take(own, row.prompt)))
    return placed


class _Columns:
    """The columns of some bins, of which each is filled from its start."""

    def __init__(self, bins: int, width: int):
        self._used, self._width = [0] * bins, width

    def has(self, number: int, columns: int) -> bool:
        """Whether a bin has that many left."""
        return self._used[number] + columns <= self._width

    def take(self, number: int, columns: int) -> int:
        """Takes them, and returns the first of them, counted through all bins."""
        first = number * self._width + self._used[number]
        self._used[number] += columns
        return first
