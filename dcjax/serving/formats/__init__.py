"""Serving formats: how weights and activations are stored, and the products that read them; a file a kind."""

from typing import Literal

import jax.numpy as jnp

from dcjax.serving.formats.base import CodedMatrix, Format, cache_dtype
from dcjax.serving.formats.face import KVCacheName, Matrix, stored_axes
from dcjax.serving.formats.grouped import Grouped
from dcjax.serving.formats.scaled import Scaled
from dcjax.serving.formats.wide import Wide

FormatName = Literal[
    "float32",
    "bf16",
    "fp16",
    "int8",
    "int8_channel",
    "w8a8_rotated",
    "w8a8",
    "fp8_weight_only",
    "fp8",
    "int4",
]

formats: dict[str, Format] = {
    format.name: format
    for format in (
        Wide("float32"),
        Wide("bf16"),
        Wide("fp16"),
        Grouped(8),
        Scaled("int8", quantizes_activations=False),
        Scaled("int8", rotates=True),
        Scaled("int8"),
        Scaled("fp8", quantizes_activations=False),
        Scaled("fp8"),
        Grouped(4),
    )
}
"""The formats that have a name on the command line."""


def wide_format(activations: jnp.dtype) -> Format:
    """The format of these activations that quantises nothing."""
    return next(format for format in formats.values() if format.weights is None and format.activations == activations)


def serving_format(format: str | Format) -> Format:
    """The format of this name; one that is given itself is returned.

    Raises:
      ValueError: an unknown name.
    """
    if not isinstance(format, str):
        return format
    if format not in formats:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(formats)}")
    return formats[format]


__all__ = [
    "CodedMatrix",
    "Format",
    "FormatName",
    "KVCacheName",
    "Matrix",
    "cache_dtype",
    "formats",
    "serving_format",
    "stored_axes",
    "wide_format",
]
