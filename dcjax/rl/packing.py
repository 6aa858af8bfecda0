"""Packing, on the host: which rows of an iteration go through a forward and backward pass together, and where they lie.

Responses are of many lengths, and the G of a group have their prompt in common. So a row is not computed with its
padding: the tokens of several rows share a bin, each prompt stands once in a microbatch, and all its responses there
attend to it. Bins are filled first-fit, longest response first. They are as wide as the longest row may be; where all
rows of a microbatch are short, they are halved for attention, whose cost grows with their width, once or several times.

Devices wait for the one that has most microbatches. So the rows of a minibatch are dealt to them anew, the longest
first, where all need fewer then than by the order of the batch; the batch's rows are moved accordingly.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from dcjax.types import Batch, Bins, Microbatches, Places

DEFAULT_ROWS = 8
"""Responses of the limit's length that a microbatch has room for by default, beside a prompt. A larger one reads the
parameters less often, but leaves more of the last one empty."""
DEFAULT_TOKENS = {"cpu": 512}
"""Tokens of these responses at most, by JAX's platforms: on a CPU each doubling costs a token about 5% more."""
DEFAULT_TOKENS_ELSEWHERE = 16_384
"""The same on all others."""
SHORT_ROW, SHORT_PART = 12, 24
"""A microbatch has room for rows of a 24th of a bin's width, or of 12 columns where that is more."""
NARROWEST_BIN, MOST_HALVINGS = 64, 3
"""Columns of a halved bin, about, at least; and halvings at most, each of which is one more attention to compile."""
ALIGNMENT = 16
"""Columns that the default number of tokens is a multiple of, which vector units prefer."""


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


Cuts = list[tuple[int, list[Place]]]
"""The microbatches of a share: how often the bins of each are halved, and the rows in it."""


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
        platform: str = "cpu",
        masked: bool = True,
    ) -> Packing:
        """The packing for prompts and responses of at most these lengths.

        Args:
          prompt_length: P, in tokens.
          response_length: T, in tokens.
          rows: B, of an iteration.
          group_size: G.
          tokens_per_microbatch: columns that a share computes in one forward and backward pass, at most. By default as
            many as a prompt and `DEFAULT_ROWS` of the longest responses have, or as fit into `DEFAULT_TOKENS`.
          updates: minibatches of an iteration.
          shares: D.
          column_multiple: what a half of the columns is a multiple of.
          platform: by JAX's name, for the default.
          masked: whether attention computes all of a bin's columns under a mask. Then bins are halved, and responses in
            a bin share gathered columns; otherwise blocks are skipped in which nothing is seen.

        Raises:
          ValueError: tokens that are too few for the longest row.
        """
        context, multiple = prompt_length - 1, 2 * column_multiple
        longest, width = _round_up(context + response_length, multiple), max(response_length, context)
        if tokens_per_microbatch is None:
            fitting = DEFAULT_TOKENS.get(platform, DEFAULT_TOKENS_ELSEWHERE) // response_length
            responses = max(1, min(DEFAULT_ROWS, fitting)) * response_length
            tokens_per_microbatch = _round_up(responses + context, math.lcm(multiple, ALIGNMENT))
        if tokens_per_microbatch < longest:
            raise ValueError(
                f"tokens_per_microbatch is {tokens_per_microbatch}; it must be at least {longest}, which the longest "
                "prompt and response need"
            )
        columns = tokens_per_microbatch // multiple * multiple
        if masked:
            halvings = min(max(0, int(math.log2(width / NARROWEST_BIN))), MOST_HALVINGS)
            width, gathered = (_round_up(size, 2**halvings) for size in (width, max(context, width // 2)))
        else:
            # all as wide: a narrow last one would be computed as if it were not
            halvings, width = 0, -(-columns // (columns // width))
            gathered = width
        shortest = max(min(SHORT_ROW, width), width // SHORT_PART)
        most = min(rows // updates // shares, max(1, columns // shortest))
        return cls(Bins(columns, width, gathered, most, halvings, masked), shares, updates, group_size)

    def __call__(self, batch: Batch) -> Batch:
        """The batch, which is on the host, with its microbatches; equal batches are cut alike.

        Rows move to other shares of their minibatch where these then need fewer microbatches, as `Microbatches.order`
        says; a single share's never do.

        Raises:
          ValueError: a row that has no prompt, padding between tokens, or tokens for which a microbatch has no room.
        """
        rows = _rows(batch, self.bins)
        parts, shape = self._parts(len(rows)), self._shape(len(rows))
        counts, halvings = np.zeros(shape[:2], np.int32), np.zeros(shape[:3], np.int32)
        table = np.full((*shape, len(Place._fields)), -1, np.int32)
        order = np.zeros(shape[:3], np.int32)
        for update, minibatch in enumerate(parts):
            dealt = [[rows[at] for at in share] for share in minibatch]
            for share, (mine, cuts) in enumerate(_cut_shares(dealt, self.bins)):
                numbers = {row.number: number for number, row in enumerate(mine)}
                order[share, update], counts[share, update] = list(numbers), len(cuts)
                for at, (times, placed) in enumerate(cuts):
                    places = [place._replace(row=numbers[place.row]) for place in placed]
                    table[share, update, at, : len(places)], halvings[share, update, at] = places, times
        numbers, responses, prompts, gathered = np.moveaxis(table, -1, 0)
        places = Places(responses, prompts, gathered, numbers >= 0, halvings)
        microbatches = Microbatches(counts, numbers, places, order if self.shares > 1 else None)
        moved = self.rows_before(dataclasses.replace(batch, microbatches=microbatches))
        if (moved != np.arange(len(rows))).any():
            by_row = dataclasses.replace(batch, sampler_head=None)
            by_row = jax.tree.map(lambda leaf: np.asarray(leaf)[moved], by_row)
            batch = dataclasses.replace(by_row, sampler_head=batch.sampler_head)
        return dataclasses.replace(batch, microbatches=microbatches)

    def rows_before(self, batch: Batch) -> Int[np.ndarray, "rows"]:
        """The number that each row of a packed batch had before it was moved."""
        assert batch.microbatches is not None
        rows = np.arange(len(batch.rewards), dtype=np.int32)
        if (order := batch.microbatches.order) is not None:
            rows[self._parts(len(rows))] = np.asarray(order).swapaxes(0, 1)
        return rows

    def abstract(self, rows: int, sharding: jax.sharding.Sharding | None = None) -> Microbatches:
        """The shapes and dtypes of the microbatches of a batch with so many rows."""

        def table(axes: int, dtype: type = np.int32) -> Any:
            return jax.ShapeDtypeStruct(self._shape(rows)[:axes], dtype, sharding=sharding)

        number, order = table(4), table(3) if self.shares > 1 else None
        return Microbatches(table(2), number, Places(number, number, number, table(4, np.bool_), table(3)), order)

    def filled(self, batch: Batch) -> float:
        """The share of a packed batch's computed columns that hold a token; a prompt counts once for its group."""
        assert batch.microbatches is not None
        computed = batch.microbatches.count.max(axis=0).sum() * self.shares * self.bins.columns
        prompts = (np.asarray(batch.prompt_mask).sum(axis=1) - 1).sum() / self.group_size
        responses = np.asarray(batch.attention_mask).sum() - np.asarray(batch.prompt_mask).sum()
        return float((prompts + responses) / computed)

    def _parts(self, rows: int) -> Int[np.ndarray, "updates D rows"]:
        """Which rows of the batch are those of each minibatch that each share computes."""
        dealt = np.arange(rows).reshape(-1, self.updates, self.group_size).swapaxes(0, 1)
        return dealt.reshape(self.updates, self.shares, -1)

    def _shape(self, rows: int) -> tuple[int, int, int, int]:
        """[D, updates, M, R]: in the worst case each row is a microbatch of its own."""
        return self.shares, self.updates, rows // self.updates // self.shares, self.bins.rows


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


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
    ids = _prompt_ids(batch, length)
    rows = [
        Row(number, *of_row)
        for number, of_row in enumerate(zip(responses.tolist(), (prompts - 1).tolist(), ids, strict=True))
    ]
    for row in rows:
        if not _fits(row, bins):
            raise ValueError(
                f"row {row.number} of the batch needs {row.prompt} columns for its prompt and {row.response} for its "
                f"response; of {bins.columns} columns each bin has {bins.width}, and {bins.gathered} gathered"
            )
    return rows


def _fits(row: Row, bins: Bins) -> bool:
    """Whether there is room for the row alone, its prompt beside its response or in another bin."""
    shorter, longer = sorted([row.prompt, row.response])
    width, other = min(bins.width, bins.columns), min(bins.width, bins.columns - bins.width)
    return row.prompt <= bins.gathered and (shorter + longer <= width or (longer <= width and shorter <= other))


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


def _cut_shares(dealt: list[list[Row]], bins: Bins) -> list[tuple[list[Row], Cuts]]:
    """The rows of each share of a minibatch, and its microbatches: of the rows that it was dealt, in their order; or of
    others, in any order, where the share that has most microbatches then has fewer."""
    kept = [(rows, _cut(rows, bins, in_order=True)) for rows in dealt]
    if len(dealt) == 1 or _most(kept) == 1:
        return kept
    balanced = [(rows, _cut(rows, bins, in_order=False)) for rows in _balance(dealt)]
    return min(kept, balanced, key=_most)


def _most(shares: list[tuple[list[Row], Cuts]]) -> int:
    """Microbatches of the share that has most, which is what all compute."""
    return max(len(cuts) for _, cuts in shares)


def _balance(dealt: list[list[Row]]) -> list[list[Row]]:
    """The same rows, as many for each share, that need about as many columns: the longest response first, each goes to
    the share that needs fewest with it, where a prompt that the share has already costs nothing."""
    shares = [_Share(len(rows)) for rows in dealt]
    for row in sorted(itertools.chain.from_iterable(dealt), key=lambda row: -row.response):
        min((share for share in shares if share.room), key=lambda share: share.columns_with(row)).take(row)
    return [sorted(share.rows) for share in shares]


class _Share:
    """The rows that a share is given, of which it takes a fixed number."""

    def __init__(self, size: int):
        self.rows: list[Row] = []
        self._size, self._columns, self._prompts = size, 0, set()

    @property
    def room(self) -> bool:
        """Whether it takes another one."""
        return len(self.rows) < self._size

    def columns_with(self, row: Row) -> int:
        """Columns that it needs with another row."""
        return self._columns + row.response + (0 if row.prompt_id in self._prompts else row.prompt)

    def take(self, row: Row) -> None:
        """Takes it."""
        self._columns = self.columns_with(row)
        self._prompts.add(row.prompt_id)
        self.rows.append(row)


def _cut(rows: Sequence[Row], bins: Bins, *, in_order: bool) -> Cuts:
    """The microbatches of one share: each takes from the next rows in order, or from all, until all have a place."""
    left, microbatches = list(rows), []
    while left:
        pool = _pool(left, bins.columns) if in_order else left
        times = next(n for n in range(bins.halvings, -1, -1) if all(_fits(row, bins.halved(n)) for row in pool))
        placed = _fill(pool, bins.halved(times))
        taken = {place.row for place in placed}
        left = [row for row in left if row.number not in taken]
        microbatches.append((times, placed))
    return microbatches


def _pool(rows: Sequence[Row], room: int) -> list[Row]:
    """The first rows, whole groups of them where they stand together, that need so many columns, or a few more."""
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
    columns = _Columns(bins.number, bins.width, bins.columns)
    gathered = _Columns(bins.number, bins.gathered, bins.number * bins.gathered)
    # the first column of each prompt, and the first of its gathered ones in each bin that it is shared in
    prompts: dict[int, int] = {}
    shared: dict[tuple[int, int], int] = {}
    placed: list[Place] = []
    for row in sorted(rows, key=lambda row: -row.response):
        if len(placed) == bins.rows:
            break
        own, home = _find(row, columns, gathered, prompts, shared)
        if own < 0:
            continue
        response = columns.take(own, row.response)
        if row.prompt_id not in prompts:
            prompts[row.prompt_id] = columns.take(home, row.prompt) if row.prompt else -1
        into = shared.get((own, row.prompt_id))
        into = gathered.take(own, row.prompt) if into is None else into
        if bins.shared:
            shared[own, row.prompt_id] = into
        placed.append(Place(row.number, response, prompts[row.prompt_id], into))
    return placed


def _find(
    row: Row,
    columns: _Columns,
    gathered: _Columns,
    prompts: Collection[int],
    shared: Collection[tuple[int, int]],
) -> tuple[int, int]:
    """The first bin with room for a row's response, and the fullest with room for its prompt, if that is new; or -1.

    The longest responses need whole bins, which prompts must not begin.
    """
    for own in range(columns.bins):
        if columns.has(own, row.response) and ((own, row.prompt_id) in shared or gathered.has(own, row.prompt)):
            if row.prompt_id in prompts:
                return own, -1
            homes = [n for n in range(columns.bins) if columns.has(n, row.prompt + (row.response if n == own else 0))]
            if homes:
                return own, min(homes, key=columns.left)
    return -1, -1


class _Columns:
    """The columns of some bins, of which each is filled from its start, and the last may be narrower."""

    def __init__(self, bins: int, width: int, columns: int):
        self.bins = bins
        self._used, self._width, self._columns = [0] * bins, width, columns

    def has(self, number: int, columns: int) -> bool:
        """Whether a bin has that many left."""
        return columns <= self.left(number)

    def left(self, number: int) -> int:
        """How many a bin has left."""
        return min(self._width, self._columns - number * self._width) - self._used[number]

    def take(self, number: int, columns: int) -> int:
        """Takes them, and returns the first of them, counted through all bins."""
        first = number * self._width + self._used[number]
        self._used[number] += columns
        return first
