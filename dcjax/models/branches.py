"""One of several functions that are differentiated, of which those that are not called keep nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax import lax

from dcjax.types import Array


def one_of(functions: Sequence[Callable[..., Array]], number: Array, fixed: Any, *operands: Array) -> Array:
    """`functions[number](fixed, *operands)`, all of which give an array of the same shape and dtype.

    Its backward pass computes the function again. JAX would keep, for each of the functions, what its backward pass
    needs, and zeros for all that were not called.

    Args:
      functions: of a tree and operands.
      number: int32 [], of the one that is called.
      fixed: a tree of arrays that are not differentiated.
      operands: arrays that are.
    """

    @jax.custom_vjp
    def call(number, fixed, *operands):
        return lax.switch(number, functions, fixed, *operands)

    def forward(*args):
        return call(*args), args

    def pull(function, gradient, fixed, *operands):
        return jax.vjp(partial(function, fixed), *operands)[1](gradient)

    def backward(args, gradient):
        number, fixed, *operands = args
        pulls = [partial(pull, function) for function in functions]
        return None, None, *lax.switch(number, pulls, gradient, fixed, *operands)

    call.defvjp(forward, backward)
    return call(number, fixed, *operands)
