"""Log-probs and entropies of given tokens, without an array of all their logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Integer, Shaped

from dcjax.arguments import as_integers
from dcjax.models.config import ModelConfig
from dcjax.models.layers import EXACT, Arithmetic, round_up
from dcjax.models.layout import LOGITS, ONE_DEVICE, RESIDUAL, Layout
from dcjax.models.numerics import MASTERS, Numerics
from dcjax.models.transformer import RouterRecord, checked_inputs, hidden_states, logits, rounded_head
from dcjax.types import Array, Params, TokenDistributions


@flax.struct.dataclass
class TokenScores:
    """Scores of the last T tokens of each sequence under softmax(logits / temperature), in float32."""

    # natural log
    logps: Float[Array, "B T"]
    # nats, of the distribution that each token was drawn from
    entropy: Float[Array, "B T"]
    # None where the model has no experts; its experts are of the first S - 1 columns
    router: RouterRecord | None
    # what `quantities` computed, by their names
    quantities: dict[str, Float[Array, "B T"]]


def token_logps(
    config: ModelConfig,
    params: Params,
    tokens: Integer[Array, "B S"],
    attention_mask: Shaped[Array, "B S"] | None = None,
    *,
    response_length: int,
    temperature: Float[Array, "B"],
    segment_ids: Integer[Array, "B S"] | None = None,
    experts: Integer[Array, "M B S-1 k"] | None = None,
    candidate_tokens: Integer[Array, "B T K"] | None = None,
    quantities: Mapping[str, Callable[[TokenDistributions], Array]] = {},
    sampler_hidden: Float[Array, "B T E"] | None = None,
    sampler_head: SamplerHead | None = None,
    layout: Layout = ONE_DEVICE,
    numerics: Numerics = MASTERS,
) -> TokenScores:
    """Teacher-forced log-probs of the last `response_length` tokens, and the entropy of their distributions.

    Both are of softmax(logits / temperature), the distribution that the sampler drew from, or where it was truncated,
    of what is left of it. Only the T columns that predict a response token go through the head, `config.head_chunk` at
    a time, and what one chunk computed is computed again in the backward pass: logits never exist for more columns.

    Args:
      config: the architecture.
      params: as `init_params` lays them out.
      tokens: ids.
      attention_mask: True, or 1, on real tokens; all True where absent.
      response_length: T, below S.
      temperature: of the sampler, above 0.
      segment_ids: packed sequences, as for `hidden_states`; the first token of each is predicted from nothing, so its
        score means nothing.
      experts: routing replay, as for `hidden_states`; the last token is never fed, so one column fewer.
      candidate_tokens: of each response token, the tokens that could be drawn, -1 behind them; a row of -1 stands for
        the whole vocabulary, as its absence does.
      quantities: functions, by name, of the whole distributions of C columns, float32 [B, C] each; called once a chunk,
        and again in the backward pass.
      sampler_hidden: the sampler's normed hidden states that predicted the response tokens, from which the quantities
        get its distributions too, no more columns of them at a time than of the policy's own.
      sampler_head: what makes logits of them.
      layout: how devices share the work.
      numerics: what is rounded.

    Raises:
      ValueError: a response that leaves no column to predict its first token, or as of `hidden_states`.
    """
    if not 0 < response_length < tokens.shape[1]:
        raise ValueError(
            f"response_length is {response_length}; of {tokens.shape[1]} tokens it must leave at least one"
        )
    tokens, attention_mask, segment_ids = checked_inputs(config, tokens, attention_mask, segment_ids)
    candidate_tokens = None if candidate_tokens is None else as_integers("candidate_tokens", candidate_tokens)
    # the last token predicts nothing
    mask = None if attention_mask is None else (attention_mask & _has_next(attention_mask))[:, :-1]
    segments = None if segment_ids is None else segment_ids[:, :-1]
    hidden, router = hidden_states(
        config, params, tokens[:, :-1], mask, segment_ids=segments, experts=experts, layout=layout, numerics=numerics
    )
    columns = ScoredColumns(
        hidden=hidden[:, -response_length:],
        targets=tokens[:, -response_length:],
        temperature=jnp.broadcast_to(temperature[:, None], (len(tokens), response_length)),
        candidate_tokens=candidate_tokens,
        sampler_hidden=sampler_hidden,
    )
    logps, entropy, computed = score_columns(config, params, columns, quantities, layout, numerics, sampler_head)
    return TokenScores(logps, entropy, router, computed)


@runtime_checkable
class SamplerHead(Protocol):
    """An output head as it is served."""

    def logits(self, x: Float[Array, "N E"], arithmetic: Arithmetic) -> Float[Array, "N V"]:
        """Those of normed hidden states, in the dtype of the sums."""
        ...


class ScoredColumns(NamedTuple):
    """C columns of hidden states, and the response token that each one predicts."""

    hidden: Float[Array, "B C E"]
    targets: Int[Array, "B C"]
    temperature: Float[Array, "B C"]
    # these as in `types.Sequences`
    candidate_tokens: Int[Array, "B C K"] | None = None
    sampler_tokens: Int[Array, "B C H"] | None = None
    sampler_logps: Float[Array, "B C H"] | None = None
    sampler_hidden: Float[Array, "B C E"] | None = None


def score_columns(
    config: ModelConfig,
    params: Params,
    columns: ScoredColumns,
    quantities: Mapping[str, Callable[[TokenDistributions], Array]],
    layout: Layout,
    numerics: Numerics,
    sampler_head: SamplerHead | None = None,
) -> tuple[Float[Array, "B C"], Float[Array, "B C"], dict[str, Float[Array, "B C"]]]:
    """Log-probs of targets, entropies and quantities, `config.head_chunk` columns at a time; see `token_logps`."""
    params = rounded_head(config, params, numerics)

    def drawn_from(logits: Array, part: ScoredColumns) -> Array:
        scaled = logits / part.temperature[..., None]
        return scaled if part.candidate_tokens is None else _restrict(scaled, part.candidate_tokens)

    def score(part: ScoredColumns):
        own = logits(config, params, layout.constrain(part.hidden, RESIDUAL), layout, numerics)
        logps, entropy, log_probs = _score(drawn_from(own, part), part.targets)
        sampler = None
        if part.sampler_hidden is not None and sampler_head is not None:
            theirs = _sampler_logits(config, sampler_head, part.sampler_hidden, layout)
            sampler = jax.nn.log_softmax(drawn_from(theirs, part))
        distributions = TokenDistributions(
            log_probs, part.targets, part.candidate_tokens, sampler, part.sampler_tokens, part.sampler_logps
        )
        return logps, entropy, {name: compute(distributions) for name, compute in quantities.items()}

    length = columns.hidden.shape[1]
    chunks = -(-length // config.head_chunk)
    width = round_up(-(-length // chunks), layout.column_multiple)
    if width == length:
        return score(columns)
    # padding is divided by a temperature too
    parts = jax.tree.map(partial(_cut, chunks, width), columns._replace(temperature=columns.temperature - 1))
    parts = parts._replace(temperature=parts.temperature + 1)
    scored = jax.lax.map(jax.checkpoint(score, prevent_cse=False), parts)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(len(columns.hidden), -1)[:, :length], scored)


def _sampler_logits(
    config: ModelConfig, head: SamplerHead, hidden: Float[Array, "B C E"], layout: Layout
) -> Float[Array, "B C V"]:
    """float32 logits of the sampler, which is not differentiated."""
    head, hidden = jax.lax.stop_gradient((head, layout.constrain(hidden, RESIDUAL)))
    arithmetic = EXACT._replace(float32=config.precision.float32)
    # the row axes are not merged into one, which a mesh that splits both could not split
    rows = jax.vmap(lambda hidden: head.logits(hidden, arithmetic))(hidden)
    return layout.constrain(rows.astype(jnp.float32), LOGITS)


def _has_next(mask: Bool[Array, "B S"]) -> Bool[Array, "B S"]:
    """Whether a real token follows in the row."""
    return jnp.cumsum(mask, axis=1) < jnp.sum(mask, axis=1, keepdims=True)


def _restrict(logits: Float[Array, "B C V"], candidate_tokens: Int[Array, "B C K"]) -> Float[Array, "B C V"]:
    """Gives tokens that could not be drawn a logit that is finite, but so low that their probability is 0."""
    rows, columns = jnp.arange(len(logits))[:, None, None], jnp.arange(logits.shape[1])[:, None]
    ids = jnp.where(candidate_tokens < 0, logits.shape[-1], candidate_tokens)
    kept = jnp.zeros(logits.shape, bool).at[rows, columns, ids].set(True, mode="drop")
    whole = jnp.all(candidate_tokens < 0, axis=-1, keepdims=True)
    return jnp.where(kept | whole, logits, jnp.finfo(logits.dtype).min / 2)


def _score(logits: Float[Array, "B C V"], targets: Int[Array, "B C"]) -> tuple[Array, Array, Array]:
    """Log-prob of each target, entropy of each distribution and all log-probs, from one set of exponentials."""
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    exponentials = jnp.exp(shifted)
    total = jnp.sum(exponentials, axis=-1)
    log_total = jnp.log(total)
    chosen = jnp.take_along_axis(shifted, targets[..., None], axis=-1)[..., 0]
    entropy = log_total - jnp.sum(exponentials * shifted, axis=-1) / total
    return chosen - log_total, entropy, shifted - log_total[..., None]


def _cut(chunks: int, columns: int, x: Array) -> Array:
    """[B, T, ...] -> [chunks, B, columns, ...], padded behind."""
    padding = [(0, 0), (0, chunks * columns - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, padding).reshape(len(x), chunks, columns, *x.shape[2:]).swapaxes(0, 1)
