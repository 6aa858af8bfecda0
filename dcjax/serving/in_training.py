"""The numerics of a serving format in the training forward: what is rounded in serving is rounded in training too.

The backward pass is that of a forward without the roundings, a straight-through estimator: gradients move the float32
masters, which stay what is saved and exported. So the policy that is differentiated, and whose log-probs are compared
with the sampler's, is the one that is deployed, but for the order of sums in other kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax

from dcjax.models import ModelConfig
from dcjax.models.cache import LARGEST, quantize_rows
from dcjax.models.config import DTYPES
from dcjax.models.numerics import MASTERS, Numerics
from dcjax.models.parameters import parameter_named
from dcjax.models.rotation import rotate
from dcjax.serving.formats import Format, wide_format
from dcjax.serving.formats.served import kept_wide
from dcjax.types import Array

InTraining = Literal["masters", "weights", "all"]
"""What the training forward takes from a serving format: nothing, its weights, or activations and KV cache too."""


def training_numerics(
    config: ModelConfig, format: Format, kv_cache: jnp.dtype, keep: Sequence[str], how: InTraining
) -> tuple[ModelConfig, Numerics]:
    """The architecture and the numerics of a training forward in a serving format; equal arguments give the same.

    Args:
      config: the architecture, with the trainer's own precision.
      format: the serving format.
      kv_cache: dtype of keys and values.
      keep: patterns of names of kernels and tables that stay in the activations' dtype.
      how: "masters" is the trainer's own forward. "weights" has every parameter as it is served, in the trainer's
        precision. "all" rounds activations to the format's too, quantised where it quantises them, and attends to keys
        and values as the cache holds them. Products of rounded numbers are float32, in which they are exact.

    Raises:
      ValueError: a pattern of `keep` matches nothing, or for "all" a kernel within the layers, in a format that
        quantises activations.
    """
    return _training_numerics(config, format, kv_cache, tuple(keep), how)


@cache
def _training_numerics(
    config: ModelConfig, format: Format, kv_cache: jnp.dtype, keep: tuple[str, ...], how: InTraining
) -> tuple[ModelConfig, Numerics]:
    if how == "masters":
        return config, MASTERS
    kept = kept_wide(config, keep)
    weight = partial(_weight, config, format, frozenset(kept))
    if how == "weights":
        return config, Numerics(weight=weight)
    if kept and format.quantizes_activations:
        raise ValueError(
            f"serving.keep has {', '.join(keep)}, and serving.format {format.name} quantises activations, which "
            "serving.in_training=all would do before kept weights too; leave one of them out, or train in weights"
        )
    computed: Any = next(name for name, dtype in DTYPES.items() if dtype == format.activations)
    precision = dataclasses.replace(config.precision, compute=computed, head=computed, accumulation="float32")
    rows = partial(_straight_through, format.rounded_activations)
    return dataclasses.replace(config, precision=precision), Numerics(weight, rows, partial(_attended, kv_cache))


def _weight(config: ModelConfig, format: Format, kept: frozenset[str], name: str, leaf: Array) -> Array:
    """A parameter as the engine multiplies by it, float32; of the same shape."""
    role = parameter_named(config, name).role
    if role == "router":
        return leaf
    if role == "wide":
        return _straight_through(partial(_rounded_to, format.activations), leaf)
    stores = wide_format(format.activations) if name in kept else format
    return _straight_through(stores.rounded if role == "table" else partial(_rounded_kernel, stores), leaf)


def _rounded_kernel(format: Format, kernel: Array) -> Array:
    return format.rounded(kernel.swapaxes(-1, -2)).swapaxes(-1, -2)


def _rounded_to(dtype: jnp.dtype, x: Array) -> Array:
    return x.astype(dtype).astype(jnp.float32)


def _attended(kv_cache: jnp.dtype, q: Array, k: Array, v: Array) -> tuple[Array, ...]:
    """Queries, keys and values as `models.cache.attend_cached` has them; in 8 bits with a scale for each vector."""
    if kv_cache not in LARGEST:
        return q, *(_straight_through(partial(_rounded_to, kv_cache), x).astype(x.dtype) for x in (k, v))
    if kv_cache == jnp.int8:
        # turned alike, they keep their product
        q, k = rotate(q).astype(q.dtype), rotate(k)
    held, scales = zip(*(_narrowed(kv_cache, x) for x in (k, v)), strict=True)
    return q, *(x.astype(q.dtype) for x in held), *scales


def _narrowed(dtype: jnp.dtype, x: Array) -> tuple[Array, Array]:
    """Vectors in 8 bits as float32 numbers, of which x / scale has the derivative, and their scales [..., 1]."""
    values, scale = lax.stop_gradient(quantize_rows(x, dtype))
    scale = scale[..., None]
    inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    return _straight_through(lambda _: values.astype(jnp.float32), x.astype(jnp.float32) * inverse), scale


def _straight_through(rounding: Callable[[Array], Array], x: Array) -> Array:
    """rounding(x), to the bit, whose derivative is taken for 1."""
    return lax.stop_gradient(rounding(x)) + (x - lax.stop_gradient(x))
