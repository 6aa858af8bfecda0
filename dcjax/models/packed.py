"""Scores of rows that are packed into bins: a prompt is computed once, and all its responses attend to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Int

from dcjax.arguments import as_sequences
from dcjax.models.attention import Segments
from dcjax.models.config import ModelConfig
from dcjax.models.layout import ONE_DEVICE, Layout
from dcjax.models.numerics import MASTERS, Numerics
from dcjax.models.scores import ScoredColumns, TokenScores, score_columns
from dcjax.models.transformer import Columns, run_columns
from dcjax.types import Array, Batch, Bins, Params, Places, Sequences, TokenDistributions


def packed_logps(
    config: ModelConfig,
    params: Params,
    sequences: Batch,
    *,
    places: Places,
    bins: Bins,
    quantities: Mapping[str, Callable[[TokenDistributions], Array]] = {},
    layout: Layout = ONE_DEVICE,
    numerics: Numerics = MASTERS,
) -> TokenScores:
    """`token_logps` of rows that `dcjax.rl.Packing` has given places: the same numbers, with less work.

    Args:
      config: the architecture.
      params: as `init_params` lays them out.
      sequences: D × R rows, prompts padded on the left and responses on the right.
      places: where each row's tokens lie, [D, R].
      bins: what was packed into.
      quantities: as for `token_logps`.
      layout: how devices share the work; each has one of the D shares.
      numerics: what is rounded.

    Returns:
      Scores of the rows, 0 outside of a row's response; the experts, if there are any, are those of columns,
      [M, D × 2, F / 2].

    Raises:
      ValueError: another number of shares than the devices have.
    """
    shares = len(places.present)
    if shares != layout.shares:
        raise ValueError(f"rows are packed in {shares} shares; devices hold {layout.shares}")
    by_share = partial(_split, shares)
    sequences = as_sequences(sequences)
    # those of rows that stand in for others are 0
    lengths = [jnp.where(places.present, by_share(length), 0) for length in _lengths(sequences)]
    tables = jax.vmap(partial(_tables, bins, sequences.prompt_mask.shape[1]))(places, *lengths)

    def of_columns(values: Array, *index: Array) -> Array:
        """[D × R, ...] -> [D × 2, F / 2, ...]: each column's entry of its row."""
        return _halve(jax.vmap(lambda values, *index: values[index])(by_share(values), *index))

    experts = sequences.experts
    columns = Columns(
        tokens=of_columns(sequences.tokens, tables.rows, tables.columns),
        positions=_halve(tables.positions),
        segments=Segments(
            _halve(tables.segments),
            tables.sources,
            tables.gathered,
            _halve(tables.reads),
            places.halvings[:, None],
            bins,
        ),
        experts=None if experts is None else jnp.moveaxis(of_columns(experts, tables.rows, tables.columns), 2, 0),
    )
    hidden, router = run_columns(
        config,
        params,
        columns,
        partial(_sum_tokens, tables.members),
        layout,
        positions=sequences.tokens.shape[1],
        numerics=numerics,
    )

    def of_responses(values: Array | None) -> Array | None:
        """[D × R, T, ...]: each column's entry of what belongs to response tokens."""
        return None if values is None else of_columns(values, tables.rows, tables.offsets)

    scored = ScoredColumns(
        hidden=hidden,
        targets=of_columns(sequences.tokens, tables.rows, tables.columns + 1),
        temperature=of_columns(sequences.temperature, tables.rows),
        candidate_tokens=of_responses(sequences.candidate_tokens),
        sampler_tokens=of_responses(sequences.sampler_tokens),
        sampler_logps=of_responses(sequences.sampler_logps),
        sampler_hidden=of_responses(sequences.sampler_hidden),
    )
    logps, entropy, computed = score_columns(
        config, params, scored, quantities, layout, numerics, sequences.sampler_head
    )
    to_rows = partial(_to_rows, places.responses, lengths[1], sequences.response_mask.shape[1])
    return TokenScores(to_rows(logps), to_rows(entropy), router, jax.tree.map(to_rows, computed))


class _Tables(NamedTuple):
    """What stands in the F columns of a share's bins, and in the N × X columns that prompts are gathered to."""

    # of each column, [F]: its row, its column there, and the position of its token
    rows: Array
    columns: Array
    positions: Array
    # what the column's token precedes: a token of the response, counted from 0, where it is of one
    offsets: Array
    # from 1, in order, the part of a row that it belongs to; 0 is padding
    segments: Array
    # the number that the gathered columns of the row's prompt have, for its response; 0 for none
    reads: Array
    # of each gathered column, [N × X]: the column that it is read from, and a number, -1 where it is none
    sources: Array
    gathered: Array
    # whether a column is one of a row, [R, F]
    members: Array


def _lengths(sequences: Sequences) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Columns of each row's prompt, without its last token, and of its response."""
    length = sequences.prompt_mask.shape[1]
    responses = jnp.sum(sequences.attention_mask[:, length:], axis=1)
    return jnp.sum(sequences.prompt_mask, axis=1) - 1, responses


def _tables(bins: Bins, length: int, places: Places, prompts: Int[Array, "R"], responses: Int[Array, "R"]) -> _Tables:
    """The tables of one share, whose rows have P = `length` columns of prompt."""
    count, columns = bins.rows, bins.columns
    # the first of the rows that share a prompt fills its columns
    firsts = jnp.argmax(places.prompts[:, None] == places.prompts, axis=1) == jnp.arange(count)
    owned = jnp.where(firsts & (places.prompts >= 0), prompts, 0)
    starts = jnp.concatenate([places.prompts, places.responses])
    part, offset, real = _parts(starts, jnp.concatenate([owned, responses]), columns)
    # numbered in their order, from which attention knows what it can skip
    ids = jnp.argsort(jnp.argsort(starts)) + 1
    row, in_response = part % count, part >= count
    position = jnp.where(real, offset + jnp.where(in_response, prompts[row], 0), 0)
    # gathered columns have the number of the response that reads them, of several the first one's
    reader, read, gathered = _parts(places.gathered, prompts, bins.number * bins.gathered)
    alike = (places.gathered[:, None] == places.gathered) & (prompts > 0)
    reads = jnp.where(prompts > 0, ids[count + jnp.argmax(alike, axis=1)], 0)
    return _Tables(
        rows=row,
        # a row's tokens stand side by side from P - prompt - 1 on
        columns=jnp.where(real, length - 1 - prompts[row] + position, 0),
        positions=position,
        offsets=jnp.where(real & in_response, offset, 0),
        segments=jnp.where(real, ids[part], 0),
        reads=jnp.where(real & in_response, reads[row], 0),
        sources=jnp.where(gathered, places.prompts[reader] + read, 0),
        gathered=jnp.where(gathered, ids[count + reader], -1),
        members=_inside(places.prompts, prompts, columns) | _inside(places.responses, responses, columns),
    )


def _inside(starts: Int[Array, "K"], lengths: Int[Array, "K"], columns: int) -> Bool[Array, "K F"]:
    """Which of the columns lie in each of K stretches."""
    places = jnp.arange(columns)
    return (places >= starts[:, None]) & (places < (starts + lengths)[:, None])


def _parts(
    starts: Int[Array, "K"], lengths: Int[Array, "K"], columns: int
) -> tuple[Int[Array, "F"], Int[Array, "F"], Bool[Array, "F"]]:
    """Of each column: the stretch that it lies in, how far behind its start, and whether it lies in any."""
    inside = _inside(starts, lengths, columns)
    part = jnp.argmax(inside, axis=0)
    return part, jnp.arange(columns) - starts[part], jnp.any(inside, axis=0)


def _halve(values: Array) -> Array:
    """[D, F, ...] -> [D × 2, F / 2, ...], since XLA is slow at reductions of a single row on a CPU."""
    return values.reshape(2 * len(values), -1, *values.shape[2:])


def _split(shares: int, values: Array) -> Array:
    """[D × R, ...] -> [D, R, ...]."""
    return values.reshape(shares, -1, *values.shape[1:])


def _sum_tokens(members: Bool[Array, "D R F"], values: Array) -> Array:
    """[D × 2, F / 2, ...] -> float32 [D × R, ...]: sums over each row's tokens."""
    flat = values.reshape(members.shape[0], members.shape[2], *values.shape[2:])
    operands = members.astype(jnp.float32), flat.astype(jnp.float32)
    sums = jnp.einsum("drf,df...->dr...", *operands, precision=lax.Precision.HIGHEST)
    return sums.reshape(-1, *values.shape[2:])


def _to_rows(first: Int[Array, "D R"], lengths: Int[Array, "D R"], length: int, values: Array) -> Array:
    """[D × 2, F / 2] -> [D × R, T]: each response's columns, and 0 behind them."""
    values = values.reshape(len(first), -1)
    offsets = jnp.arange(length)
    columns = jnp.where(offsets < lengths[..., None], first[..., None] + offsets, values.shape[1])
    return jax.vmap(lambda flat, at: flat.at[at].get(mode="fill", fill_value=0))(values, columns).reshape(-1, length)
