"""Packing, on the host: which rows of an iteration go through a forward and backward pass together, and where they lie.

Responses are of many lengths, and the G of a group have their prompt in common. So a row is not computed with its
padding: the tokens of several rows share a bin, each prompt stands once in a microbatch, and all its responses there
attend to it. Bins are filled first-fit, longest response first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dcjax.types import Batch, Bins, Microbatches, Places

POOL = 1.25
"""Tokens that a microbatch chooses from, as a multiple of those that it has room for: enough small ones to fill gaps."""


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


def pack(batch: Batch, bins: Bins, *, shares: int, updates: int, group_size: int) -> Microbatches:
    """Cuts an iteration into microbatches of packed rows; equal batches are cut alike.

    Args:
      batch: on the host.
      bins: what a microbatch of one share has room for.
      shares: parts of a minibatch's rows that are computed side by side, D.
      updates: minibatches.
      group_size: G; groups are dealt to the minibatches in turn.

    Raises:
      ValueError: a row that has no prompt, padding between tokens, or tokens for which a microbatch has no room.
    """
    rows = _rows(batch, bins)
    minibatches = np.arange(len(rows)).reshape(-1, updates, group_size).swapaxes(0, 1).reshape(updates, shares, -1)
    cuts = [[_cut([rows[at] for at in share], bins) for share in minibatch] for minibatch in minibatches]
    size = minibatches.shape[-1]
    table = np.full((shares, updates, size, bins.rows, len(Place._fields)), -1, np.int32)
    for update, minibatch in enumerate(cuts):
        for share, microbatches in enumerate(minibatch):
            numbers = {row: number for number, row in enumerate(minibatches[update, share].tolist())}
            for microbatch, placed in enumerate(microbatches):
                table[share, update, microbatch, : len(placed)] = [
                    place._replace(row=numbers[place.row]) for place in placed
                ]
    counts = np.array([[len(minibatch[share]) for minibatch in cuts] for share in range(shares)], np.int32)
    numbers, responses, prompts, gathered = np.moveaxis(table, -1, 0)
    return Microbatches(counts, numbers, Places(responses, prompts, gathered, numbers >= 0))


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
        raise ValueError(f"a row of the batch needs {most} columns; its bins have {bins.width}, {bins.gathered} gathered")
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
