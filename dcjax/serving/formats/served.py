"""Which of a model's parameters a serving format quantises, whether it can, and a layer's products in it."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import jax.numpy as jnp

from dcjax.models import ModelConfig
from dcjax.models.attention import choose_cached
from dcjax.models.block import Products
from dcjax.models.layers import EXACT, Arithmetic
from dcjax.models.parameters import parameters
from dcjax.models.ragged_gpu import check_width
from dcjax.serving.formats.base import Format
from dcjax.serving.formats.face import Matrix
from dcjax.types import Array


def contracted_widths(config: ModelConfig) -> dict[str, int]:
    """The length of the axis that products sum over, for each kernel and table of the model."""
    axes = {parameter: parameter.contracted_axis for parameter in parameters(config)}
    return {parameter.name: parameter.shape[axis] for parameter, axis in axes.items() if axis is not None}


def kept_wide(config: ModelConfig, keep: Sequence[str]) -> set[str]:
    """The kernels and tables whose names match one of these patterns (in the syntax of `fnmatch`).

    Raises:
      ValueError: a pattern matches none of the model's kernels and tables.
    """
    names = contracted_widths(config)
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"keep has {pattern!r}, which matches no kernel or table of this model: {', '.join(names)}"
            )
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in keep)}


def check_served(
    config: ModelConfig, format: Format, kv_cache: jnp.dtype, platform: str, keep: Sequence[str] = ()
) -> None:
    """Checks that this model can be served in a format on a platform ("cpu", "gpu", "tpu").

    Raises:
      ValueError: float16 is asked for on a TPU, which has none; ragged attention is asked for where it does not run; a
        contracted width does not suit the format; or a pattern of `keep` matches nothing.
    """
    if platform == "tpu" and jnp.float16 in (format.activations, kv_cache):
        what = f"format {format.name!r}" if format.activations == jnp.float16 else "kv_cache 'fp16'"
        raise ValueError(f"{what} is float16, which TPUs do not have; bf16 has the same size")
    if choose_cached(config.attention, platform, format.activations) == "ragged_gpu":
        check_width(config.head_dim)
    kept = kept_wide(config, keep)
    for name, width in contracted_widths(config).items():
        if name not in kept:
            format.check_width(name, width)


def arithmetic(config: ModelConfig) -> Arithmetic:
    """An engine's arithmetic: sums are float32, whatever dtype the model is trained in."""
    return EXACT._replace(float32=config.precision.float32)


def products(config: ModelConfig) -> Products:
    """The products of a layer whose kernels are stored in any format."""
    how = arithmetic(config)

    def dot(x: Array, kernel: Matrix) -> Array:
        return kernel.dot(x, how)

    def grouped_dot(rows: Array, kernels: Matrix, group_sizes: Array) -> Array:
        return kernels.grouped_dot(rows, group_sizes, how)

    return Products(dot, grouped_dot)
