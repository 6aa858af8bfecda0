"""The scanned Qwen3 stack in Flax Linen, and what is computed from it: logits and token log-probs."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dcjax.models import layers
from dcjax.models.config import ModelConfig
from dcjax.types import Array, Params

UNROLL = 2
"""Layers in one turn of the scan: program size stays flat in depth, and a stack of two is no loop at all."""


class Block(nn.Module):
    """One decoder layer's parameters, each axis named once; the maths is `layers.block`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, rope: layers.Rope, mask):
        params = {name: self.param(name, *declared) for name, declared in self._declarations().items()}
        x, _ = layers.block(self.config, params, x, rope, lambda q, k, v: (layers.attention(q, k, v, mask), None))
        return x, None

    def _declarations(self) -> dict:
        c = self.config
        q_dim, kv_dim = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        # projections into the residual stream start smaller in deeper stacks (GPT-2), so its variance does not grow
        narrow = (2 * c.num_layers) ** -0.5
        return {
            "input_layernorm": _norm(c.hidden_size, "embed"),
            "q_proj": _kernel(c.hidden_size, q_dim, ("embed", "heads")),
            "k_proj": _kernel(c.hidden_size, kv_dim, ("embed", "kv_heads")),
            "v_proj": _kernel(c.hidden_size, kv_dim, ("embed", "kv_heads")),
            "o_proj": _kernel(q_dim, c.hidden_size, ("heads", "embed"), narrow),
            "q_norm": _norm(c.head_dim, "head_dim"),
            "k_norm": _norm(c.head_dim, "head_dim"),
            "post_attention_layernorm": _norm(c.hidden_size, "embed"),
            "gate_proj": _kernel(c.hidden_size, c.intermediate_size, ("embed", "mlp")),
            "up_proj": _kernel(c.hidden_size, c.intermediate_size, ("embed", "mlp")),
            "down_proj": _kernel(c.intermediate_size, c.hidden_size, ("mlp", "embed"), narrow),
        }


def _norm(size: int, axis: str):
    return nn.with_logical_partitioning(nn.initializers.ones_init(), (axis,)), (size,), jnp.float32


def _kernel(fan_in: int, fan_out: int, axes: tuple[str, str], scale: float = 1.0):
    init = nn.initializers.normal(scale * fan_in**-0.5)
    return nn.with_logical_partitioning(init, axes), (fan_in, fan_out), jnp.float32


class Transformer(nn.Module):
    """Embedding, scanned blocks and final norm: tokens [B, S] -> hidden states [B, S, E]. `head_kernel` is the head."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens, attention_mask):
        c = self.config
        table = ((c.vocab_size, c.hidden_size), jnp.float32)
        init = nn.with_logical_partitioning(nn.initializers.normal(c.hidden_size**-0.5), ("vocab", "embed"))
        embed_tokens: Any = self.param("embed_tokens", init, *table)
        x = embed_tokens[tokens]
        if not c.tie_embeddings:
            self.param("lm_head", init, *table)
        positions = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
        rope = layers.rope_table(positions, tokens.shape[1], c.head_dim, c.rope_theta)
        stack = nn.scan(
            nn.remat(Block, prevent_cse=False) if c.remat else Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
            unroll=UNROLL,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = stack(c, name="layers")(x, rope, layers.causal_mask(attention_mask))
        norm: Any = self.param("norm", *_norm(c.hidden_size, "embed"))
        return layers.rms_norm(x, norm, c.rms_norm_eps)


def _boxed_init(config: ModelConfig, key):
    dummy = jnp.zeros((1, 1), jnp.int32)
    return Transformer(config).init(key, dummy, dummy == 0)["params"]


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters, `layers` stacked along their first axis, partitioning metadata taken off."""
    return nn.unbox(_boxed_init(config, key))


def logical_axes(config: ModelConfig) -> Params:
    """The tree of `init_params`, at each leaf a PartitionSpec of logical axes for `sharding.rules` to map."""
    return nn.get_partition_spec(jax.eval_shape(lambda key: _boxed_init(config, key), jax.random.key(0)))


def count_params(config: ModelConfig) -> int:
    """Number of parameters, from abstract shapes; nothing is allocated."""
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def head_kernel(config: ModelConfig, params: Params):
    """The output head as a table [V, E]: the embedding where tied."""
    return params["embed_tokens" if config.tie_embeddings else "lm_head"]


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B S"],
    attention_mask: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B S V"]:
    """Next-token logits in float32.

    Args:
      config: the architecture.
      params: as `init_params` lays them out.
      tokens: ids; padding may stand on either side.
      attention_mask: True on real tokens; all True where absent. Positions count real tokens only.
    """
    mask = jnp.ones(tokens.shape, bool) if attention_mask is None else attention_mask
    hidden: Any = Transformer(config).apply({"params": params}, tokens, mask)
    return _logits(config, params, hidden)


def token_logps(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B S"],
    attention_mask: Bool[Array, "B S"],
    *,
    response_length: int,
    temperature: Float[Array, "B"],
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Teacher-forced log-probs of the last `response_length` tokens, and the entropy of their distributions (nats).

    Both are of softmax(logits / temperature), the distribution that the sampler drew from, in float32. Only the T
    columns that predict a response token go through the head.
    """
    # the last token predicts nothing
    hidden: Any = Transformer(config).apply({"params": params}, tokens[:, :-1], attention_mask[:, :-1])
    logits = _logits(config, params, hidden[:, -response_length:]) / temperature[:, None, None]
    distribution = jax.nn.log_softmax(logits)
    logps = jnp.take_along_axis(distribution, tokens[:, -response_length:, None], axis=-1)[..., 0]
    return logps, -jnp.sum(jnp.exp(distribution) * distribution, axis=-1)


def _logits(config: ModelConfig, params: Params, hidden: Array) -> Array:
    head = head_kernel(config, params)
    return jax.lax.dot_general(
        hidden, head.astype(hidden.dtype), (((2,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
