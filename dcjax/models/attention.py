"""Causal self-attention of the training forward, by one of three kernels; and the choice of the one for decoding.

All compute softmax(q kᵀ / √D) v under the same mask; they differ in rounding and in memory. `xla` stores all S × S
attention weights. `cudnn` (GPU) and `splash` (Pallas, TPU) store only blocks of them, in the forward and in the
backward pass, but for packed rows `cudnn` stores an S × (X + S) mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from dcjax.models.branches import one_of
from dcjax.models.config import AttentionKernel
from dcjax.models.layers import attend_grouped, pad_columns, round_up
from dcjax.types import Array, Bins

Kernel = Literal["xla", "cudnn", "splash"]
"""The kernels of the training forward that `auto` chooses among."""

CachedKernel = Literal["xla", "ragged_tpu", "ragged_gpu"]
"""Of attention on a KV cache: the ragged ones (Pallas) read what is filled, `xla` all that there is room for."""

# the platforms, by JAX's names, and the dtypes that the kernels support besides xla
_BLOCKED: dict[Kernel, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cudnn": (("gpu", "cuda"), ("bfloat16", "float16")),
    "splash": (("tpu",), ("bfloat16", "float32")),  # its compiler, Mosaic, does not support float16
}
_RAGGED: dict[CachedKernel, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ragged_tpu": _BLOCKED["splash"],
    "ragged_gpu": (("gpu", "cuda"), ("bfloat16", "float16", "float32")),
}
_LANES = 128  # splash requires blocks of keys that are multiples of a TPU's lanes
_BLOCK = 512  # queries and keys in one step of splash: 1 MiB of float32 scores, well within a TPU core's own memory


@flax.struct.dataclass
class Segments:
    """Several sequences packed into a row of columns, which do not see each other."""

    # adjacent columns with the same number, from 1, are one sequence; 0 is padding
    ids: Int[Array, "B S"]
    # further keys of each row, before its own: columns of all B rows, counted through; None where there are none
    gathered: Int[Array, "B X"] | None = None
    # the number of such a key, -1 for none
    gathered_ids: Int[Array, "B X"] | None = None
    # the number of the gathered keys that a column sees; None stands for `ids`, which splash takes for it
    reads: Int[Array, "B S"] | None = None
    # where all rows together hold the columns of bins: how often these are halved, and the bins
    halvings: Int[Array, "1 1"] | None = None
    bins: Bins | None = flax.struct.field(default=None, pytree_node=False)

    def padded(self, multiple: int) -> Segments:
        """With padding appended until `multiple` divides both numbers of columns."""
        pad = partial(pad_columns, multiple=multiple)
        ids, reads = pad(self.ids), None if self.reads is None else pad(self.reads)
        if self.gathered is None or self.gathered_ids is None:
            return Segments(ids)
        return Segments(ids, pad(self.gathered), pad(self.gathered_ids + 1) - 1, reads)

    def in_bins(self, bins: Bins) -> Segments:
        """Those with the columns of each bin in a row of their own."""
        assert self.reads is not None and self.gathered is not None and self.gathered_ids is not None
        ids, reads = (_cut(x, bins.width) for x in (self.ids, self.reads))
        gathered, numbers = (
            _cut(x[:, : len(ids) * bins.gathered], bins.gathered) for x in (self.gathered, self.gathered_ids)
        )
        return Segments(ids, gathered, numbers, reads)


def resolve(kernel: AttentionKernel, platform: str, dtype: DTypeLike) -> Kernel:
    """The kernel of the training forward that `kernel` means on JAX's `platform` ("cpu", "gpu" or "cuda", "tpu") for q,
    k, v of `dtype`: a named one whether or not it runs there.

    `auto`, and `ragged`, which is about decoding alone, are splash on TPU in bf16 and float32, cudnn on GPU in bf16 and
    fp16, xla elsewhere.
    """
    if kernel != "auto" and kernel != "ragged":
        return kernel
    supported = _supported(_BLOCKED, platform, dtype)
    return supported[0] if supported else "xla"


def choose(kernel: AttentionKernel, platform: str, dtype: DTypeLike) -> Kernel:
    """`resolve`, where the kernel runs.

    cuDNN itself checks the width of a head when it is called: it must be a multiple of 8 and at most 256, or 128 before
    Hopper.

    Raises:
      ValueError: the kernel does not run on the platform, or not in the dtype.
    """
    chosen = resolve(kernel, platform, dtype)
    if chosen == "xla" or chosen in _supported(_BLOCKED, platform, dtype):
        return chosen
    raise _refusal(chosen, platform, dtype, [_BLOCKED[chosen]])


def choose_cached(kernel: AttentionKernel, platform: str, dtype: DTypeLike) -> CachedKernel:
    """The kernel of decoding in a model whose `attention` is `kernel`, for activations of `dtype`.

    On TPUs that is a ragged one where `kernel` means splash or is `ragged`; on GPUs only where it is `ragged`, as that
    kernel has not been run on one yet.

    Raises:
      ValueError: `kernel` is `ragged`, and there is none for the platform, or not in the dtype.
    """
    supported = _supported(_RAGGED, platform, dtype)
    if kernel == "ragged" and not supported:
        raise _refusal(kernel, platform, dtype, _RAGGED.values())
    named = kernel == "ragged" or (kernel in ("auto", "splash") and platform == "tpu")
    return supported[0] if named and supported else "xla"


def _supported(table: Mapping[Any, tuple[Sequence[str], Sequence[str]]], platform: str, dtype: DTypeLike) -> list[Any]:
    name = jnp.dtype(dtype).name
    return [kind for kind, (platforms, dtypes) in table.items() if platform in platforms and name in dtypes]


def _refusal(
    kernel: AttentionKernel, platform: str, dtype: DTypeLike, able: Iterable[tuple[Sequence[str], Sequence[str]]]
) -> ValueError:
    name = jnp.dtype(dtype).name
    places = ", and ".join(f"on {' or '.join(platforms)} in {' or '.join(dtypes)}" for platforms, dtypes in able)
    return ValueError(
        f"model.attention is {kernel!r}, which does not run on {platform} in {name}; "
        f"it runs {places}, and auto and xla run everywhere"
    )


def causal_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    k_scale: Float[Array, "B S K 1"] | None = None,
    v_scale: Float[Array, "B S K 1"] | None = None,
    *,
    kernel: AttentionKernel,
    float32: lax.Precision = lax.Precision.HIGHEST,
    segments: Segments | None = None,
) -> Float[Array, "B S H D"]:
    """softmax(q kᵀ / √D) v in q's dtype: a query sees the keys at or before its own column.

    Rows hold real tokens first and padding last, so causal order alone hides padding from real tokens. With
    `segments` a query sees its own segment only, and all keys that are gathered for it. Padding is segment 0: it sees
    itself, so that every row of the result is finite, and at most other padding besides.

    `auto` and `ragged` are resolved for JAX's default platform at trace time. Another kernel is used as it is, so that
    a program for a TPU can be compiled on a host without one; `choose` checks beforehand whether it runs on a platform.

    Keys and values that come with a scale for each vector are those of a cache in 8 bits, as wide numbers: xla
    multiplies scores and weights by the scales, as attention on a cache does, and other kernels get the products, in
    q's dtype.
    """
    chosen = resolve(kernel, jax.default_backend(), q.dtype)
    attend = partial({"xla": _xla, "cudnn": _cudnn, "splash": _splash}[chosen], float32=float32)
    operands = q, k, v
    if k_scale is not None and v_scale is not None:
        scaled = q, (k * k_scale).astype(q.dtype), (v * v_scale).astype(q.dtype)
        operands = (q, k, v, k_scale, v_scale) if chosen == "xla" else scaled
    if segments is None or segments.bins is None:
        return attend(segments, *operands)
    bins = segments.bins
    if not bins.halvings:
        return _attend_in_bins(attend, bins, segments, *operands)
    assert segments.halvings is not None
    by_halvings = [partial(_attend_in_bins, attend, bins.halved(times)) for times in range(bins.halvings + 1)]
    return one_of(by_halvings, segments.halvings[0, 0], segments, *operands)


def _attend_in_bins(attend: Callable[..., Array], bins: Bins, segments: Segments, *operands: Array) -> Array:
    """`attend` where all rows together hold the columns of bins."""
    out = attend(segments.in_bins(bins), *(_cut(x, bins.width) for x in operands))
    return out.reshape(-1, *out.shape[2:])[: bins.columns].reshape(operands[0].shape)


def _cut(x: Array, width: int) -> Array:
    """[B, S, ...] -> [N, W, ...], padded behind."""
    return pad_columns(x.reshape(1, -1, *x.shape[2:]), width).reshape(-1, width, *x.shape[2:])


def _xla(
    segments: Segments | None,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *scales: Float[Array, "B S K 1"],
    float32: lax.Precision,
) -> Float[Array, "B S H D"]:
    k, v, *by_vector = (_with_gathered(x, segments).swapaxes(1, 2) for x in (k, v, *scales))
    mask = _mask(q.shape[1], segments)[:, :, None]
    return attend_grouped(q, k, v, mask, *(scale[..., 0] for scale in by_vector), float32=float32)


def _cudnn(
    segments: Segments | None,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    float32: lax.Precision,
) -> Float[Array, "B S H D"]:
    # cuDNN takes only 16-bit dtypes, to which it does not apply
    del float32
    length = q.shape[1]
    if segments is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    # cuDNN refuses a mask of odd length in training
    padded = segments.padded(2)
    q, k, v = pad_columns(q, 2), _with_gathered(k, padded), _with_gathered(v, padded)
    out = jax.nn.dot_product_attention(q, k, v, mask=_mask(q.shape[1], padded), implementation="cudnn")
    return out[:, :length]


def _splash(
    segments: Segments | None,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    float32: lax.Precision,
) -> Float[Array, "B S H D"]:
    # A Pallas call is not partitioned by jit: this computes on one device's arrays, and sharded ones need shard_map
    # around it, over batch and heads.
    length = q.shape[1]
    block = min(_BLOCK, round_up(length, _LANES))
    # the kernel does not scale the scores; the factor is rarely a power of two, so q is scaled in float32, rounded once
    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    if segments is None:
        # the added columns come last, so causal order hides them from all others
        k, v, ids = pad_columns(k, block), pad_columns(v, block), None
    else:
        padded = segments.padded(block)
        k, v, ids = _with_gathered(k, padded), _with_gathered(v, padded), (padded.ids, _key_ids(padded))
    operands = [x.swapaxes(1, 2) for x in (pad_columns(scaled, block), k, v)]
    attend = jax.vmap(_splash_kernel(block))
    if q.dtype == jnp.float32:
        attend = _with_float32_precision(float32, attend)
    return attend(*operands, ids).swapaxes(1, 2)[:, :length]


def _with_gathered(x: Float[Array, "B S K D"], segments: Segments | None) -> Float[Array, "B C K D"]:
    """Keys or values of each row, those first that are gathered for it; padded to as many columns as the segments."""
    if segments is None:
        return x
    own = pad_columns(x, segments.ids.shape[1])
    if segments.gathered is None:
        return own
    return jnp.concatenate([x.reshape(-1, *x.shape[2:])[segments.gathered], own], axis=1)


def _key_ids(segments: Segments) -> Int[Array, "B C"]:
    """The sequence that sees each key, if all of `reads` are `ids`."""
    if segments.gathered_ids is None:
        return segments.ids
    return jnp.concatenate([segments.gathered_ids, segments.ids], axis=1)


def _mask(length: int, segments: Segments | None) -> Bool[Array, "#B 1 S C"]:
    """Which keys each query sees."""
    if segments is None:
        return jnp.tril(jnp.ones((length, length), bool))[None, None]
    ids, reads = segments.ids, segments.ids if segments.reads is None else segments.reads
    own = jnp.tril(ids[:, :, None] == ids[:, None])
    if segments.gathered_ids is None:
        return own[:, None]
    return jnp.concatenate([reads[:, :, None] == segments.gathered_ids[:, None], own], axis=2)[:, None]


def _with_float32_precision(float32: lax.Precision, function: Callable[..., Array]) -> Callable[..., Array]:
    """The function with this precision for its products, forward and backward, which set no precision themselves."""
    # Mosaic supports only these two precisions
    name = "default" if float32 == lax.Precision.DEFAULT else "highest"

    @jax.custom_vjp
    def at_precision(*operands):
        with jax.default_matmul_precision(name):
            return function(*operands)

    def forward(*operands):
        with jax.default_matmul_precision(name):
            return jax.vjp(function, *operands)

    def backward(back, gradient):
        with jax.default_matmul_precision(name):
            return back(gradient)

    at_precision.defvjp(forward, backward)
    return at_precision


def _splash_kernel(block: int) -> Callable[..., Array]:
    """(q [H, S, D], k [K, X + S, D], v [K, X + S, D], ids of queries and keys, or None) -> [H, S, D]."""
    # one backward kernel for k and v and one for q: the fused one keeps a dq for each block of keys, quadratic in S
    sizes = splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def attend(q: Array, k: Array, v: Array, ids: tuple[jax.Array, jax.Array] | None) -> Any:
        (heads, length), more = q.shape[:2], k.shape[1] - q.shape[1]
        # gathered keys come before all columns
        mask = splash_attention.CausalMask((length, length + more), offset=more)
        kernel = splash_attention.make_splash_mha_single_device(
            splash_attention.MultiHeadMask([mask] * heads), block_sizes=sizes
        )
        if ids is None:
            return kernel(q, k, v)
        _skip_blocks(kernel, block, *ids)
        return kernel(q, k, v, splash_attention.SegmentIds(*ids))

    return attend


def _skip_blocks(kernel: Any, block: int, ids: Int[Array, "S"], key_ids: Int[Array, "C"]) -> None:
    """Has a causal kernel skip the blocks in which no query sees a key.

    A block is looked at by the smallest and largest of its numbers, so that this is exact where a row's sequences are
    numbered in their order.
    """
    queries, keys = ids.reshape(-1, block), key_ids.reshape(-1, block)
    more = len(keys) - len(queries)

    def bounds(numbers: Array) -> tuple[Array, Array]:
        smallest = jnp.min(jnp.where(numbers > 0, numbers, jnp.iinfo(numbers.dtype).max), axis=1)
        return smallest, jnp.max(numbers, axis=1)

    (low, high), (key_low, key_high) = bounds(queries), bounds(keys)
    place, key_place = jnp.arange(len(queries))[:, None], jnp.arange(len(keys)) - more
    # a column of padding sees itself
    seen = (key_place == place) | (key_place < place) & (low[:, None] <= key_high) & (key_low <= high[:, None])
    forward = {"block_mask": seen[None].astype(jnp.int32), "data_next": _next_block(seen)[None]}
    backward = forward | {"data_next": _next_block(seen.T).T[None]}
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(**forward)
    kernel.dq_mask_info = kernel.dq_mask_info._replace(**forward)
    kernel.dkv_mask_info = kernel.dkv_mask_info._replace(**backward)


def _next_block(seen: Bool[Array, "A B"]) -> Int[Array, "A B"]:
    """The block to hold at each place of a row: its own where it is computed, else the one before or to come."""
    last = lax.cummax(jnp.where(seen, jnp.arange(seen.shape[1]), -1), axis=1)
    return jnp.where(last < 0, jnp.argmax(seen, axis=1, keepdims=True), last).astype(jnp.int32)
