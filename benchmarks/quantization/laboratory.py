"""A model, a text that it sampled, and how far each way to serve it is from the float32 trainer on that text."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from rounding import Mixed, Simulated  # pyrefly: ignore[missing-import]

from dcjax.data.chat import chat_prompt
from dcjax.data.task import encode
from dcjax.errors import RunError
from dcjax.keys import make_key
from dcjax.models import ModelConfig, forward
from dcjax.models.cache import CachedAttention, attend_cached, forward_cached, init_cache, stack_layers
from dcjax.models.parameters import parameters
from dcjax.models.transformer import head_kernel
from dcjax.serving.decoder import NO_EXCESS_PRECISION
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.formats import Format, cache_dtype
from dcjax.serving.formats.served import arithmetic, products
from dcjax.serving.rollout import sample_responses
from dcjax.serving.sync import make_sync, stored_parameters
from dcjax.tools.open_model import OpenedModel
from dcjax.tools.probe.gaps import gap
from dcjax.types import Array, Params, Rollout

RESPONSE, SEED = 64, 0
PROMPTS = (
    "Give me three tips for staying healthy.",
    "What is the capital of France, and what is it known for?",
    "Write a short poem about the sea.",
    "Explain photosynthesis in simple terms.",
    "A farmer has 12 cows and buys 7 more. How many cows does he have?",
    "Translate 'good morning' into Spanish and French.",
    "Write a Python function that reverses a string.",
    "Why is the sky blue?",
    "List five animals that live in the desert.",
    "Summarise the plot of Romeo and Juliet.",
    "How do I make pancakes?",
    "What is 17 times 23? Think step by step.",
    "Tell me a joke about computers.",
    "Who was Marie Curie?",
    "What are the benefits of reading books?",
    "Describe a rainy day in the city.",
)

KERNELS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Of a dense layer."""

Policy = dict[str, Any]
"""What is served: "embedding", stacked "layers", "norm" and "head"."""


class Text(NamedTuple):
    """Responses behind their prompts, which begin in column 0; padding is behind all."""

    tokens: Int[Array, "B S"]
    # the columns that each response's tokens are predicted from
    columns: Int[Array, "B T"]
    responses: Int[Array, "B T"]
    # True on the tokens of responses
    mask: Bool[Array, "B T"]

    @staticmethod
    def of(rollout: Rollout) -> Text:
        """A rollout's."""
        lengths, width = rollout.prompt_mask.sum(axis=1), rollout.prompt_mask.shape[1]
        tokens = np.stack([np.roll(row, n - width) for row, n in zip(rollout.tokens, lengths, strict=True)])
        columns = lengths[:, None] - 1 + np.arange(rollout.response_mask.shape[1])
        return Text(tokens[:, :-1], columns, rollout.tokens[:, width:], rollout.response_mask)

    def at(self, x: Float[Array, "... B S E"]) -> Float[jax.Array, "... B T E"]:
        """The columns that responses are predicted from."""
        return jnp.take_along_axis(x, self.columns[..., None], axis=-2)

    def seen(self) -> Bool[np.ndarray, "B S"]:
        """True on the tokens that responses are predicted from, and those before them."""
        last = np.max(np.where(self.mask, self.columns, 0), axis=1, keepdims=True)
        return np.arange(self.tokens.shape[1]) <= last


class Scores(NamedTuple):
    """What a policy says of a text."""

    # natural logs, of the responses' tokens
    logps: Float[Array, "B T"]
    # nats, from this policy to the trainer's
    kl: Float[Array, "B T"]
    # behind each layer, where responses are predicted from
    residuals: Float[Array, "L B T E"]


@partial(jax.jit, static_argnums=0)
def trainer_logps(config: ModelConfig, params: Params, text: Text) -> Float[Array, "B T V"]:
    """The trainer's log-probs of all tokens of the vocabulary."""
    return jax.nn.log_softmax(text.at(forward(config, params, text.tokens)))


@partial(jax.jit, static_argnums=(0, 1, 2, 3), compiler_options=NO_EXCESS_PRECISION)
def _scores(
    config: ModelConfig,
    activations: jnp.dtype,
    cached: jnp.dtype,
    attention: CachedAttention,
    policy: Policy,
    text: Text,
    trained: Float[Array, "B T V"],
) -> Scores:
    batch, length = text.tokens.shape
    caches = stack_layers([init_cache(config, batch, length, cached)] * config.num_layers)
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    x = policy["embedding"].lookup(text.tokens, activations)
    decoded = forward_cached(config, policy, x, positions, caches, products(config), attention=attention)
    rows = text.at(decoded.hidden)
    logits = policy["head"].logits(rows.reshape(-1, rows.shape[-1]), arithmetic(config))
    logps = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(trained.shape)
    kl = jnp.sum(jnp.exp(logps) * (logps - trained), axis=-1)
    return Scores(_of(text, logps), kl, jax.vmap(text.at)(decoded.residuals))


def _of(text: Text, logps: Float[Array, "B T V"]) -> Float[jax.Array, "B T"]:
    return jnp.take_along_axis(logps, text.responses[..., None], axis=-1)[..., 0]


def serve(config: ModelConfig, params: Params, format: Format, keep: Sequence[str] = ()) -> Policy:
    """The model in a format."""
    weights = make_sync(config, format, keep=keep)(params, 0).weights
    layers, head = stack_layers(weights["layers"]), head_kernel(config, weights)
    return {"embedding": weights["embed_tokens"], "layers": layers, "norm": weights["norm"], "head": head}


def mixed(wide: Policy, narrow: Policy, names: Collection[str], layers: Collection[int]) -> Policy:
    """The wide policy with what has these names from the narrow one: KERNELS of these layers, "embedding", "head"."""
    inside = np.isin(np.arange(len(wide["layers"]["input_layernorm"])), list(layers))
    of_layers = {
        name: Mixed(matrix, narrow["layers"][name], inside & (name in names)) if name in KERNELS else matrix
        for name, matrix in wide["layers"].items()
    }
    tables = {name: Mixed(wide[name], narrow[name], np.array(name in names)) for name in ("embedding", "head")}
    return {**tables, "layers": of_layers, "norm": wide["norm"]}


@dataclass(frozen=True)
class Laboratory:
    """A model, a text, and what the trainer says of it."""

    config: ModelConfig
    params: Params
    text: Text
    trained: Float[Array, "B T V"]

    @staticmethod
    def of(config: ModelConfig, params: Params, text: Text) -> Laboratory:
        """Scores the text by the trainer."""
        return Laboratory(config, params, text, trainer_logps(config, params, text))

    def scores(
        self,
        policy: Policy,
        format: Format,
        kv_cache: str = "bf16",
        attention: CachedAttention = attend_cached,
    ) -> Scores:
        """What a policy says, its activations and cache as in this format."""
        cached = cache_dtype(format, kv_cache)
        return _scores(self.config, format.activations, cached, attention, policy, self.text, self.trained)

    def gap(self, *policy: Any, **cache: Any) -> dict[str, float]:
        """The gap between what `scores` returns and the trainer, with the standard error of its mean."""
        return self.figures(self.scores(*policy, **cache))

    def figures(self, scores: Scores) -> dict[str, float]:
        """Mean |p − q| and its standard error, as responses scatter; 99th percentile, largest, and mean KL in nats."""
        old, new, mask = np.asarray(_of(self.text, self.trained)), np.asarray(scores.logps), self.text.mask
        found = gap(old_logps=old, rollout_logps=new, mask=mask)
        off = np.where(mask, np.abs(np.exp(old) - np.exp(new)) - found["prob_diff_mean"], 0).sum(axis=1)
        error = math.sqrt(len(off) / (len(off) - 1) * np.sum(off**2)) / np.sum(mask)
        return {
            "mean": found["prob_diff_mean"],
            "error": float(error),
            "p99": found["prob_diff_p99"],
            "largest": found["prob_diff_max"],
            "kl": float(np.mean(np.asarray(scores.kl)[mask])),
        }

    def share_of_bytes(self, format: Format, keep: Sequence[str] = ()) -> float:
        """Bytes of the weights against float32's; of simulated formats those that they would have."""
        stored = stored_parameters(self.config, format, keep)
        held = [p.bytes for p in stored]
        if isinstance(format, Simulated) and format.of_weights is not None:
            widths = {p.name: p.shape[p.contracted_axis] for p in parameters(self.config) if p.contracted_axis}
            held = [
                p.float32_bytes / 32 * format.of_weights.bits_each(widths[p.name]) if p.quantized else p.bytes
                for p in stored
            ]
        return sum(held) / sum(p.float32_bytes for p in stored)


def sample(model: OpenedModel) -> Laboratory:
    """A model in a folder, and its responses to PROMPTS as the float32 engine samples them.

    Raises:
      RunError: it has experts, or its tokenizer's chat template does not take a message.
    """
    config = model.config.model
    if config.num_experts:
        raise RunError(f"{model.directory} has {config.num_experts} experts a layer; it must be a dense model")
    prompts = encode(model.tokenizer, [chat_prompt(model.tokenizer, message) for message in PROMPTS])
    engine = Qwen3Engine(
        config,
        format="float32",
        slots=len(prompts),
        max_prompt_length=max(map(len, prompts)),
        max_response_length=RESPONSE,
        end_tokens=model.end_tokens,
        prompts=len(prompts),
    )
    params, key = model.params(), make_key(SEED)
    served = engine.sync(params, 0)
    rollout = sample_responses(engine, served, prompts, samples_per_prompt=1, temperature=1.0, key=key)
    return Laboratory.of(config, params, Text.of(rollout))
