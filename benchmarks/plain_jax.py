"""The main job in plain JAX, by hand: no Flax, no optax, no engine, one fixed batch shape. What dcjax is timed against.

It is written to be fast on a CPU: layers unrolled, each a flat product of two matrices; query heads that share a
key-value head merged into one product; rotary angles from a table; the last column, which predicts nothing, left out.

Letters in shapes: B rows, S columns of P prompt and T response tokens, E width, H query and K key-value heads of D,
V vocabulary, N sampled tokens so far. Prompts are padded on the left, so column P is every row's first response token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dcjax.models import ModelConfig
from dcjax.recipe.config import Config
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.recipe.optimizer import OptimizerConfig

Tree = Any
"""A pytree of arrays."""


def unstack(config: ModelConfig, params: Tree) -> Tree:
    """dcjax's parameters, copied, with `layers` as one mapping a layer."""

    def layer(number: int):
        return jax.tree.map(lambda leaf: jnp.array(leaf[number]), params["layers"])

    copied = {name: jnp.array(leaf) for name, leaf in params.items() if name != "layers"}
    return copied | {"layers": [layer(number) for number in range(config.num_layers)]}


# --- the model ---


def rms_norm(x, scale, eps):
    """x / sqrt(mean x² + eps) · scale over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def product(x, kernel):
    """x [..., N] @ kernel [N, M], as one product of two matrices, which the gradient then is too."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def rotations(config: ModelConfig, positions, length: int):
    """cos and sin [B, Q, 1, D / 2] of int positions [B, Q] below `length`, looked up in a table."""
    frequencies = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies
    return jnp.cos(angles)[positions][:, :, None], jnp.sin(angles)[positions][:, :, None]


def rotate(x, rotation):
    """RoPE on pairs (x_i, x_{i + D/2}) of x [B, Q, heads, D]."""
    cos, sin = rotation
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def heads(config: ModelConfig, x, kernel, scale=None, rotation=None):
    """x [B, Q, E] projected to [B, Q, heads, D]; normed and rotated for queries and keys."""
    projected = product(x, kernel).reshape(*x.shape[:2], -1, config.head_dim)
    return projected if scale is None else rotate(rms_norm(projected, scale, config.rms_norm_eps), rotation)


def attention(q, k, v, visible):
    """q [B, Q, H, D] on k and v [B, K, C, D]; bool visible [B, Q, C] -> [B, Q, H · D]."""
    rows, queries, num_heads, width = q.shape
    shared, columns = k.shape[1], k.shape[2]
    merged = (rows, shared, num_heads // shared * queries)
    q = q.reshape(rows, queries, shared, -1, width).transpose(0, 2, 3, 1, 4).reshape(*merged, width)
    scores = jnp.einsum("bkqd,bkcd->bkqc", q, k).reshape(rows, shared, -1, queries, columns) * width**-0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -1e30), axis=-1).reshape(*merged, columns)
    context = jnp.einsum("bkqc,bkcd->bkqd", weights, v).reshape(rows, shared, -1, queries, width)
    return context.transpose(0, 3, 1, 2, 4).reshape(rows, queries, -1)


def mlp(config: ModelConfig, layer, x):
    """x + SwiGLU(norm x)."""
    normed = rms_norm(x, layer["post_attention_layernorm"], config.rms_norm_eps)
    gated = jax.nn.silu(product(normed, layer["gate_proj"])) * product(normed, layer["up_proj"])
    return x + product(gated, layer["down_proj"])


def logits(config: ModelConfig, params, hidden):
    """hidden [..., E] -> [..., V]."""
    return product(hidden, params["embed_tokens" if config.tie_embeddings else "lm_head"].T)


# --- the update ---


def hidden_states(config: ModelConfig, params, tokens, mask, first: int, skip_last_layer: bool):
    """Normed hidden states [B, S - first, E] of columns `first` and later.

    With `skip_last_layer` the other columns give keys and values to the last layer and are then let go.
    """
    x = params["embed_tokens"][tokens]
    length = tokens.shape[1]
    rotation = rotations(config, jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0), length)
    visible = jnp.tril(jnp.ones((length, length), bool)) & mask[:, None, :]
    for number, layer in enumerate(params["layers"]):
        start = first if skip_last_layer and number == config.num_layers - 1 else 0
        normed = rms_norm(x, layer["input_layernorm"], config.rms_norm_eps)
        k = heads(config, normed, layer["k_proj"], layer["k_norm"], rotation)
        v = heads(config, normed, layer["v_proj"])
        asking = jax.tree.map(lambda a: a[:, start:], rotation)  # noqa: B023 (called at once)
        q = heads(config, normed[:, start:], layer["q_proj"], layer["q_norm"], asking)
        context = attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), visible[:, start:])
        x = mlp(config, layer, x[:, start:] + product(context, layer["o_proj"]))
    return rms_norm(x[:, first - length :], params["norm"], config.rms_norm_eps)


def token_logps(config: ModelConfig, params, batch, skip_last_layer: bool):
    """Log-probs [B, T] of the response tokens at the sampler's temperature."""
    limit = batch["response_mask"].shape[1]
    mask = batch["attention_mask"]
    first = mask.shape[1] - limit - 1
    hidden = hidden_states(config, params, batch["tokens"][:, :-1], mask[:, :-1], first, skip_last_layer)
    scaled = logits(config, params, hidden) / batch["temperature"][:, None, None]
    sampled = jnp.take_along_axis(scaled, batch["tokens"][:, -limit:, None], axis=-1)[..., 0]
    return sampled - jax.nn.logsumexp(scaled, axis=-1)


def grpo_loss(config: Config, params, batch, skip_last_layer: bool):
    """Sum of the clipped surrogate over counted tokens, and how many they are."""
    logps = token_logps(config.model, params, batch, skip_last_layer)
    groups = batch["group_rewards"]
    advantages = (batch["rewards"] - groups.mean(1)) / (groups.std(1, ddof=1) + 1e-6)
    counted = batch["response_mask"]
    settings = config.objective
    assert isinstance(settings, ObjectiveConfig)
    if settings.zero_variance == "drop":
        counted &= (groups.max(1) != groups.min(1))[:, None]
    ratio = jnp.exp(jnp.clip(logps - jax.lax.stop_gradient(logps), -20, 20))
    clipped = jnp.clip(ratio, 1 - settings.eps_low, 1 + settings.eps_high)
    losses = -jnp.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
    return jnp.sum(jnp.where(counted, losses, 0)), jnp.sum(counted).astype(jnp.float32)


def adamw(optimizer: OptimizerConfig, state: Tree, grads: Tree) -> tuple[Tree, jax.Array]:
    """The state after one update with gradients clipped to a global norm, and that norm before."""
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, optimizer.max_grad_norm / norm), grads)
    b1, b2, count = optimizer.beta1, optimizer.beta2, state["count"] + 1
    rate = optimizer.learning_rate * jnp.minimum(state["count"] / max(optimizer.warmup_steps, 1), 1.0)
    rate = rate if optimizer.warmup_steps else optimizer.learning_rate
    first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state["first"], grads)
    second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state["second"], grads)

    def move(p, m, v):
        direction = m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + optimizer.epsilon)
        return p - rate * (direction + optimizer.weight_decay * p)

    params = jax.tree.map(move, state["params"], first, second)
    return {"params": params, "first": first, "second": second, "count": count}, norm


def initial_state(config: ModelConfig, params: Tree) -> Tree:
    """Parameters (dcjax's layout, copied) with zero moments."""
    params = unstack(config, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    return {"params": params, "first": zeros, "second": jax.tree.map(jnp.copy, zeros), "count": jnp.float32(0)}


def make_update(config: Config, *, microbatch_size: int, skip_last_layer: bool) -> Callable:
    """A jitted (state, batch) -> (state, (loss, gradient norm)): GRPO without penalty, one update; donates the state.

    Args:
      config: the objective, the optimiser and the model; its own microbatch size is not read.
      microbatch_size: rows in one forward and backward pass.
      skip_last_layer: let prompt columns go after they gave the last layer their keys and values. A library's scanned
        layers are all alike and cannot; it saves less the shorter the prompt and the deeper the model.
    """

    def loss(params, rows):
        return grpo_loss(config, params, rows, skip_last_layer)

    settings = config.optimizer
    assert isinstance(settings, OptimizerConfig)

    def update(state, batch):
        def accumulate(sums, rows):
            (total, count), grads = jax.value_and_grad(loss, has_aux=True)(state["params"], rows)
            return jax.tree.map(jnp.add, sums, (grads, total, count)), None

        cut = jax.tree.map(lambda x: x.reshape(-1, microbatch_size, *x.shape[1:]), batch)
        sums = (jax.tree.map(jnp.zeros_like, state["params"]), jnp.zeros(()), jnp.zeros(()))
        (grads, total, count), _ = jax.lax.scan(accumulate, sums, cut)
        state, norm = adamw(settings, state, jax.tree.map(lambda g: g / count, grads))
        return state, (total / count, norm)

    return jax.jit(update, donate_argnums=0)


# --- the rollout ---


def cached_layers(config: ModelConfig, params, tokens, positions, caches, column, visible):
    """Tokens [B, Q] through all layers; their keys and values are written from `column` on, in place.

    Each layer has its own pair of caches [B, K, C, D]. Returns normed hidden states [B, Q, E] and the caches.
    """
    x = params["embed_tokens"][tokens]
    rotation = rotations(config, positions, visible.shape[-1])
    filled = []
    for layer, (keys, values) in zip(params["layers"], caches, strict=True):
        normed = rms_norm(x, layer["input_layernorm"], config.rms_norm_eps)
        q = heads(config, normed, layer["q_proj"], layer["q_norm"], rotation)
        k = heads(config, normed, layer["k_proj"], layer["k_norm"], rotation)
        v = heads(config, normed, layer["v_proj"])
        keys = jax.lax.dynamic_update_slice(keys, k.swapaxes(1, 2), (0, 0, column, 0))
        values = jax.lax.dynamic_update_slice(values, v.swapaxes(1, 2), (0, 0, column, 0))
        x = mlp(config, layer, x + product(attention(q, keys, values, visible), layer["o_proj"]))
        filled.append((keys, values))
    return rms_norm(x, params["norm"], config.rms_norm_eps), tuple(filled)


def prefill(config: ModelConfig, params, tokens, mask, limit: int):
    """The prompts' caches, with room for `limit` tokens more, and the hidden states [B, E] of their last tokens."""
    rows, width = tokens.shape
    shape = (rows, config.num_kv_heads, width + limit, config.head_dim)
    caches = tuple((jnp.zeros(shape), jnp.zeros(shape)) for _ in params["layers"])
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    visible = jnp.tril(jnp.ones((width, width + limit), bool)) & jnp.pad(mask, ((0, 0), (0, limit)))[:, None]
    hidden, caches = cached_layers(config, params, tokens, positions, caches, 0, visible)
    return hidden[:, -1], mask, caches


def noise(config: ModelConfig, keys, count):
    """Gumbel noise [B, V] of each row's `count`-th token: adding it to logits is what jax.random.categorical does."""
    return jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, count), (config.vocab_size,)))(keys)


def sample(config: ModelConfig, params, hidden, temperature, drawn):
    """A token a row and its log-prob, by Gumbel noise [B, V]."""
    scaled = logits(config, params, hidden) / temperature
    tokens = jnp.argmax(scaled + drawn, axis=-1).astype(jnp.int32)
    return tokens, jnp.take_along_axis(jax.nn.log_softmax(scaled), tokens[:, None], axis=1)[:, 0]


def decode(
    config: ModelConfig, params, prefix, keys, temperature, limits, *, limit: int, end_token: int, noise_ahead: bool
):
    """One static batch, until all its rows have ended: tokens and log-probs [B, T], lengths [B]."""
    hidden, mask, caches = prefix
    rows, width = mask.shape
    real = jnp.pad(mask, ((0, 0), (0, limit)), constant_values=True)
    drawn = jax.vmap(lambda count: noise(config, keys, count))(jnp.arange(limit)) if noise_ahead else None

    def step(carry):
        count, hidden, caches, ended, tokens, logps, lengths = carry
        gumbel = noise(config, keys, count) if drawn is None else drawn[count]
        token, logp = sample(config, params, hidden, temperature, gumbel)
        tokens = tokens.at[count].set(jnp.where(ended, 0, token))
        logps = logps.at[count].set(jnp.where(ended, 0, logp))
        lengths, ended = lengths + ~ended, ended | (token == end_token) | (count + 1 >= limits)
        visible = (real & (jnp.arange(width + limit) <= width + count))[:, None]
        positions = (jnp.sum(mask, axis=1) + count)[:, None]
        hidden, caches = cached_layers(config, params, token[:, None], positions, caches, width + count, visible)
        return count + 1, hidden[:, 0], caches, ended, tokens, logps, lengths

    nothing = (jnp.zeros((limit, rows), jnp.int32), jnp.zeros((limit, rows)), jnp.zeros(rows, jnp.int32))
    start = (jnp.int32(0), hidden, caches, jnp.zeros(rows, bool), *nothing)
    *_, tokens, logps, lengths = jax.lax.while_loop(lambda c: (c[0] < limit) & ~jnp.all(c[3]), step, start)
    return tokens.T, logps.T, lengths


def make_rollout(
    config: ModelConfig, *, group_size: int, slots: int, limit: int, end_token: int, noise_ahead: bool
) -> Callable:
    """A jitted (params, prompts [P, W], mask [P, W], key, temperature, limits [P · G]) -> tokens, logps, lengths.

    Tokens and logps are [P · G, T], lengths [P · G]; no response is longer than its limit, which is at most T.
    The prompts are prefilled once and together; their samples are decoded in batches of `slots`, one after the other.
    Sample i is drawn with fold_in(key, i), as dcjax's are; with `noise_ahead`, a batch's noise [T, slots, V] at once,
    which a small vocabulary allows.
    """

    def rollout(params, prompts, mask, key, temperature, limits):
        prefix = prefill(config, params, prompts, mask, limit)
        samples = jnp.arange(prompts.shape[0] * group_size).reshape(-1, slots)

        def batch(samples):
            rows = jax.tree.map(lambda x: x[samples // group_size], prefix)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, samples)
            settings = {"limit": limit, "end_token": end_token, "noise_ahead": noise_ahead}
            return decode(config, params, rows, keys, temperature, limits[samples], **settings)

        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(batch, samples))

    return jax.jit(rollout)
