"""What public functions are given as masks and whole numbers: however it is written, one meaning or one error."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Integer, Shaped

from dcjax.types import Array, Batch, Rollout

P = ParamSpec("P")
R = TypeVar("R")
Rows = TypeVar("Rows", Batch, Rollout)


def as_mask(name: str, mask: Any) -> Bool[Array, "..."]:
    """A mask of booleans, or of 0 and 1 in any dtype, such as Hugging Face's tokenizers give, as booleans.

    What is traced cannot be looked at: of it, all but 0 counts as True.

    Raises:
      ValueError: anything but 0 and 1.
    """
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    if mask.dtype == bool:
        return mask
    if (values := _readable(mask)) is not None:
        numbers = jnp.issubdtype(values.dtype, jnp.number)
        other = values[(values != 0) & (values != 1)] if numbers else values.reshape(-1)
        if other.size:
            raise ValueError(f"{name} holds {other[0]}; a mask holds False and True, or 0 and 1")
    return mask != 0


def as_integers(
    name: str, values: Any, low: int | None = None, high: int | None = None, where: Array | None = None
) -> Integer[Array, "..."]:
    """Whole numbers of any integer dtype, as they are; bounds, both included, are looked at where nothing is traced.

    Args:
      name: for the error.
      values: ids, lengths or counts.
      low: the least.
      high: the largest.
      where: the entries that are looked at; all of them where absent.

    Raises:
      ValueError: booleans or floats, or a value out of bounds.
    """
    values = values if isinstance(values, jax.Array) else np.asarray(values)
    if values.size and values.dtype.kind not in "iu":
        raise ValueError(f"{name} is of {values.dtype}; it must be of whole numbers, such as int32")
    if low is None or high is None or (seen := _readable(values)) is None:
        return values
    if where is not None:
        if (shown := _readable(where)) is None:
            return values
        seen = seen[shown]
    outside = seen[(seen < low) | (seen > high)]
    if outside.size:
        raise ValueError(f"{name} holds {outside[0]}; it must be from {low} to {high}")
    return values


def as_sequences(rows: Rows) -> Rows:
    """A batch or a rollout, its masks through `as_mask` and its tokens through `as_integers`."""
    return dataclasses.replace(
        rows,
        tokens=as_integers("tokens", rows.tokens),
        attention_mask=as_mask("attention_mask", rows.attention_mask),
        response_mask=as_mask("response_mask", rows.response_mask),
    )


def masks(*names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function: arguments of these names that are not None come in through `as_mask`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        places = {name: place for place, name in enumerate(inspect.signature(function).parameters) if name in names}

        @functools.wraps(function)
        def taking(*args: P.args, **kwargs: P.kwargs) -> R:
            given = list(args)
            for name, place in places.items():
                if place < len(given):
                    given[place] = None if given[place] is None else as_mask(name, given[place])
                elif kwargs.get(name) is not None:
                    kwargs[name] = as_mask(name, kwargs[name])
            return function(*given, **kwargs)  # pyrefly: ignore[invalid-param-spec]

        return taking

    return decorate


def _readable(values: Shaped[Array, "..."]) -> np.ndarray | None:
    """The values on the host; None where they are traced, or of other hosts too."""
    if isinstance(values, jax.core.Tracer) or not getattr(values, "is_fully_addressable", True):
        return None
    return np.asarray(values)
