"""Sparse experts of Qwen3-MoE: the router, and three products over rows sorted by expert.

No token is dropped and no expert has a capacity: every choice of an expert is a row, and the work grows with the number
of rows alone. The products are passed in, so that a quantised engine runs the same layer with its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jaxtyping import Float, Int, Shaped

from dcjax.models.config import ModelConfig
from dcjax.models.layers import Arithmetic, precision_of
from dcjax.types import Array

GroupedDot = Callable[[Array, Any, Array], Array]
"""(rows [N, K] sorted by group, kernels of E × K × M, int32 sizes [E]) -> [N, M] in the rows' dtype.

Row n is multiplied by the kernel of its group; rows after the last group belong to none, and their results are
meaningless. Kernels are an array, or an engine's form of weights.
"""

Choice = Array | Callable[[Array], Array]
"""Experts [B, S, k] themselves (routing replay), or how they are chosen from the router's probabilities [B, S, E]."""

SwiGLU = Callable[[Array, Array], Array]
"""(rows [N, D] sorted by expert, int32 [E] rows of each) -> [N, D]: every row through its expert."""


@flax.struct.dataclass
class Routing:
    """The experts that each token was routed to, and the router's probabilities."""

    # most probable first, unless imposed
    experts: Int[Array, "B S k"]
    # float32 softmax over all experts
    probabilities: Float[Array, "B S E"]
    # float32 log of the softmax's denominator, which the z metric squares
    logsumexp: Float[Array, "B S"]


Mixture = Callable[[Array, Routing, Array, tuple[Any, Any, Any], GroupedDot], Array]
"""`mix`, or a function that computes the same."""


def route(
    config: ModelConfig,
    router: Float[Array, "D E"],
    x: Float[Array, "B S D"],
    experts: Choice | None = None,
) -> tuple[Routing, Float[Array, "B S k"]]:
    """Each token's experts and their weights in x's dtype; router, softmax and weights are float32 inside.

    The result is that of Hugging Face's Qwen3-MoE: the k largest of softmax(x router), the lowest index first among
    equal ones, divided by their sum if `norm_topk_prob`. `experts` imposes another choice; the weights still come from
    the router, so that it has gradients.
    """
    # by default accelerators would multiply float32 in fewer bits, which would change the choice of experts
    logits = jnp.matmul(x.astype(jnp.float32), router.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    logps = logits - logsumexp[..., None]
    probabilities = jnp.exp(logps)
    if experts is None:
        _, experts = lax.top_k(probabilities, config.num_experts_per_tok)
    elif callable(experts):
        experts = experts(probabilities)
    chosen = jnp.take_along_axis(logps, experts, axis=-1)
    # p / Σ p as a softmax of log p: imposed experts may all have probabilities too small for float32
    weights = jax.nn.softmax(chosen, axis=-1) if config.norm_topk_prob else jnp.exp(chosen)
    return Routing(experts=experts, probabilities=probabilities, logsumexp=logsumexp), weights.astype(x.dtype)


def swiglu(
    kernels: tuple[Any, Any, Any], grouped_dot: GroupedDot, rows: Float[Array, "N D"], sizes: Int[Array, "E"]
) -> Float[Array, "N D"]:
    """down(silu(gate row) · up row) with the three kernels of each row's expert."""
    gate, up, down = kernels
    gated = jax.nn.silu(grouped_dot(rows, gate, sizes)) * grouped_dot(rows, up, sizes)
    return grouped_dot(gated, down, sizes)


def mix_rows(
    x: Float[Array, "B S D"],
    experts: Int[Array, "B S k"],
    weights: Float[Array, "B S k"],
    num_experts: int,
    through: SwiGLU,
) -> Float[Array, "B S D"]:
    """Σ_k weight · expert(x), in float32, where `through` maps rows sorted by expert to their outputs."""
    choices = experts.reshape(-1)
    order = jnp.argsort(choices, stable=True)
    inverse = jnp.argsort(order)
    sizes = jnp.bincount(choices, length=num_experts).astype(jnp.int32)
    rows = _permute(jnp.repeat(x.reshape(-1, x.shape[-1]), weights.shape[-1], axis=0), order, inverse)
    outputs = _permute(through(rows, sizes), inverse, order).reshape(*weights.shape, -1)
    # a sum rather than a matrix product, which hardware could round to fewer bits
    return jnp.sum(weights[..., None].astype(jnp.float32) * outputs.astype(jnp.float32), axis=2)


def mix(
    x: Float[Array, "B S D"],
    routing: Routing,
    weights: Float[Array, "B S k"],
    kernels: tuple[Any, Any, Any],
    grouped_dot: GroupedDot,
) -> Float[Array, "B S D"]:
    """Σ_k weight · expert(x), in float32, on a device that has all experts."""
    num_experts = routing.probabilities.shape[-1]
    return mix_rows(x, routing.experts, weights, num_experts, partial(swiglu, kernels, grouped_dot))


def moe(
    config: ModelConfig,
    params: Mapping[str, Any],
    x: Float[Array, "B S D"],
    grouped_dot: GroupedDot,
    experts: Choice | None = None,
    mixture: Mixture = mix,
) -> tuple[Float[Array, "B S D"], Routing]:
    """Σ_k weight · down(silu(gate x) · up x) of each token's experts, in x's dtype and summed in float32.

    Args:
      config: the architecture, of which `num_experts_per_tok` and `norm_topk_prob` are read.
      params: one layer's: router [D, E], experts_gate_proj and experts_up_proj [E, D, F], experts_down_proj [E, F, D].
      x: normalised hidden states.
      grouped_dot: the product with each of the three kernels.
      experts: imposes another choice, as in `route`.
      mixture: how the chosen experts are computed: by `mix`, unless devices share them.
    """
    routing, weights = route(config, params["router"], x, experts)
    kernels = tuple(params[f"experts_{name}_proj"] for name in ("gate", "up", "down"))
    return mixture(x, routing, weights, kernels, grouped_dot).astype(x.dtype), routing


@jax.custom_vjp
def _permute(rows: Float[Array, "N D"], order: Int[Array, "N"], inverse: Int[Array, "N"]) -> Float[Array, "N D"]:
    """rows[order]; its gradient is a gather too, where differentiation of indexing would scatter."""
    return rows[order]


_permute.defvjp(
    lambda rows, order, inverse: (rows[order], inverse),
    lambda inverse, gradient: (gradient[inverse], None, None),
)


def router_metrics(routing: Routing, sum_tokens: Callable[[Array], Array]) -> dict[str, Float[Array, "B"]]:
    """How evenly and how confidently the tokens of each row were routed; 0 for a row that has none.

    `router/load_balance` is E Σ_e f_e P_e (Switch Transformer, arXiv:2101.03961, eq. 4-6), where f_e is the share of
    the tokens' k choices that went to e and P_e its mean probability: 1 if even, E if all go to one. `router/z` is the
    mean of logsumexp² (ST-MoE, arXiv:2202.08906, eq. 5), and `router/entropy` that of the router's entropy (nats).

    Args:
      routing: of all columns.
      sum_tokens: [B, S, ...] -> [B, ...]: the sum over the tokens of each row.
    """
    num_experts, k = routing.probabilities.shape[-1], routing.experts.shape[-1]
    chosen = jnp.sum(jax.nn.one_hot(routing.experts, num_experts), axis=2)
    entropy = jnp.sum(jax.scipy.special.entr(routing.probabilities), axis=-1)
    tokens = jnp.maximum(sum_tokens(jnp.ones_like(entropy)), 1)
    share = sum_tokens(chosen) / (k * tokens[:, None])
    probability = sum_tokens(routing.probabilities) / tokens[:, None]
    return {
        "router/load_balance": num_experts * jnp.sum(share * probability, axis=-1),
        "router/z": sum_tokens(jnp.square(routing.logsumexp)) / tokens,
        "router/entropy": sum_tokens(entropy) / tokens,
    }


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_dot(
    rows: Float[Array, "N K"], kernels: Float[Array, "E K M"], group_sizes: Int[Array, "E"], arithmetic: Arithmetic
) -> Float[Array, "N M"]:
    """The training product: row n times its group's kernel, both in the rows' dtype.

    Gradients of kernels are cast from the sums' dtype straight to the kernels', without rounding to the rows' dtype.
    """
    return grouped_product(rows, kernels, group_sizes, arithmetic).astype(rows.dtype)


def _grouped_dot_forward(rows, kernels, group_sizes, arithmetic):
    return grouped_dot(rows, kernels, group_sizes, arithmetic), (rows, kernels, group_sizes)


def _grouped_dot_backward(arithmetic, saved, gradient):
    rows, kernels, group_sizes = saved
    of_rows = grouped_product(gradient, kernels, group_sizes, arithmetic, transposed=True)
    of_kernels = _outer_products(rows, gradient, group_sizes, arithmetic)
    return of_rows.astype(rows.dtype), of_kernels.astype(kernels.dtype), None


grouped_dot.defvjp(_grouped_dot_forward, _grouped_dot_backward)


def grouped_product(
    rows: Shaped[Array, "N K"],
    kernels: Any,
    group_sizes: Int[Array, "E"],
    arithmetic: Arithmetic,
    transposed: bool = False,
    read: Callable[[Any, jnp.dtype], jax.Array] = jnp.asarray,
) -> Shaped[Array, "N M"]:
    """Row n times its group's kernel, or the kernel's transpose; the sums are not rounded to the rows' dtype.

    An engine's quantised experts call it with int8 rows and kernels, and int32 sums. Kernels may be stored in any form
    with leaves [E, ...], of which `read` makes arrays [..., K, M] in a given dtype. It has no gradient of its own.
    Compilers for accelerators support ragged products; the CPU's would multiply every row by every kernel.
    """
    contracted = 2 if transposed else 1

    def ragged(rows, kernels, group_sizes):
        dims = lax.RaggedDotDimensionNumbers((((1,), (contracted,)), ((), ())), (0,), (0,))
        return lax.ragged_dot_general(rows, read(kernels, rows.dtype), group_sizes, dims, **arithmetic.of(rows.dtype))

    def in_blocks(rows, kernels, group_sizes):
        def product(block, expert):
            # kernels are read one by one, because few tokens need only few of them
            kernel = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, expert, keepdims=False), kernels)
            return _dot(block, read(kernel, block.dtype), (1, contracted - 1), arithmetic)

        return blocked(rows, group_sizes, product)

    return _by_platform(in_blocks, ragged)(rows, kernels, group_sizes)


def _outer_products(
    rows: Float[Array, "N K"], gradient: Float[Array, "N M"], group_sizes: Int[Array, "E"], arithmetic: Arithmetic
) -> Float[Array, "E K M"]:
    """The product rowsᵀ gradient of each group."""

    def ragged(rows, gradient, group_sizes):
        dims = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
        return lax.ragged_dot_general(rows, gradient, group_sizes, dims, **arithmetic.of(rows.dtype))

    def in_blocks(rows, gradient, group_sizes):
        size = _block_size(len(rows), len(group_sizes))
        rows, gradient = _append_rows(rows, size), _append_rows(gradient, size)

        def add(totals, expert, start, used):
            block = lax.dynamic_slice_in_dim(rows, start, size)
            block = jnp.where(jnp.arange(size)[:, None] < used, block, 0)
            product = _dot(block, lax.dynamic_slice_in_dim(gradient, start, size), (0, 0), arithmetic)
            return totals.at[expert].add(product.astype(totals.dtype))

        shape, sums = (len(group_sizes), rows.shape[1], gradient.shape[1]), arithmetic.accumulate
        return _over_blocks(group_sizes, size, add, jnp.zeros(shape, _carry_dtype(sums))).astype(sums)

    # TPUs have no arithmetic in float16, and the kernel refuses it
    tpu = ragged if rows.dtype == jnp.float16 else partial(tiled_outer_products, arithmetic)
    return _by_platform(in_blocks, ragged, tpu=tpu)(rows, gradient, group_sizes)


def tiled_outer_products(
    arithmetic: Arithmetic,
    rows: Float[Array, "N K"],
    gradient: Float[Array, "N M"],
    group_sizes: Int[Array, "E"],
    tiles: tuple[int, int, int] = (512, 512, 512),
) -> Float[Array, "E K M"]:
    """The product rowsᵀ gradient of each group, by a TPU kernel that reads no rows but a group's own.

    XLA makes of the same product one that multiplies every row for every group.

    Args:
      arithmetic: of the products; sums are float32.
      rows: sorted by group; those behind the last group are not read.
      gradient: one row for each of them.
      group_sizes: int32.
      tiles: of N, K and M that are in a core's memory at once.
    """
    missing = -len(rows) % tiles[0]
    rows, gradient = _append_rows(rows, missing), _append_rows(gradient, missing)
    precision = precision_of(rows.dtype, arithmetic.float32) or lax.Precision.DEFAULT
    with jax.default_matmul_precision(precision.name.lower()):
        return tgmm(rows.T, gradient, group_sizes, preferred_element_type=arithmetic.accumulate, tiling=tiles)


def _by_platform(
    cpu: Callable[..., Array], accelerator: Callable[..., Array], **others: Callable[..., Array]
) -> Callable[..., Array]:
    """The function for the platform that a program is lowered for; a vmap calls it once for each element."""
    return sequential_vmap(lambda *operands: lax.platform_dependent(*operands, cpu=cpu, default=accelerator, **others))


def blocked(
    rows: Shaped[Array, "N K"], group_sizes: Int[Array, "E"], product: Callable[[Array, Array], Array]
) -> Shaped[Array, "N M"]:
    """Applies product(block [T, K], expert int32 []) -> [T, M] to each group's rows, cut into blocks of T.

    Only as many blocks are computed as the groups' sizes need, at most N / T + E. A group's last block also reads rows
    after it, so the result of a row must not depend on other rows.
    """
    size = _block_size(len(rows), len(group_sizes))
    padded = _append_rows(rows, size)
    of_block = jax.eval_shape(product, padded[:size], jnp.int32(0))

    def write(out, expert, start, used):
        computed = product(lax.dynamic_slice_in_dim(padded, start, size), expert).astype(out.dtype)
        # rows written after the end of the group are overwritten by the next group's blocks, which start there
        return lax.dynamic_update_slice_in_dim(out, computed, start, axis=0)

    out = jnp.zeros((len(padded), of_block.shape[1]), _carry_dtype(of_block.dtype))
    return _over_blocks(group_sizes, size, write, out)[: len(rows)].astype(of_block.dtype)


def _over_blocks(group_sizes: Array, size: int, step: Callable[[Array, Array, Array, Array], Array], init: Array):
    """Folds step(carry, expert, start, used) over the blocks in order: rows start to start + used are the expert's."""
    blocks = -(-group_sizes // size)
    block_ends, row_ends = jnp.cumsum(blocks), jnp.cumsum(group_sizes)
    first_block, first_row = block_ends - blocks, row_ends - group_sizes

    def turn(index, carry):
        expert = jnp.sum(block_ends <= index)
        start = first_row[expert] + (index - first_block[expert]) * size
        return step(carry, expert, start, row_ends[expert] - start)

    return lax.fori_loop(0, block_ends[-1], turn, init)


def _block_size(rows: int, groups: int) -> int:
    """About half a mean group, as a power of 2: larger blocks waste more work, smaller ones take more iterations."""
    half = rows // (2 * groups)
    return min(max(1 << max(half - 1, 0).bit_length(), 8), 128)


def _append_rows(rows: Array, size: int) -> Array:
    """The rows, followed by `size` rows of zeros."""
    return jnp.pad(rows, ((0, size), (0, 0)))


def _carry_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of a loop's carry: on CPU a whole bfloat16 buffer would be widened in every iteration."""
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def _dot(x: Array, y: Array, contracted: tuple[int, int], arithmetic: Arithmetic) -> Array:
    dims = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(x, y, dims, **arithmetic.of(x.dtype))
