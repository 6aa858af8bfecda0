"""Functions of which it shows at run time which is called, or how often; their backward pass computes them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
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


def sum_of(function: Callable[..., Array], count: Array, fixed: Any, *operands: Array) -> Array:
    """Σ over n below `count` of `function(fixed, n, *operands)`, of the first operand's shape and dtype.

    JAX does not differentiate a loop whose length shows at run time. Here the backward pass is another such loop, in
    which each term is computed again.

    Args:
      function: of a tree, an int32 [] and operands.
      count: int32 [], of terms.
      fixed: a tree of arrays that are not differentiated.
      operands: arrays that are; gradients are summed in their dtypes.
    """

    @jax.custom_vjp
    def call(count, fixed, *operands):
        return _summed(count, lambda n: function(fixed, n, *operands), jnp.zeros_like(operands[0]))

    def forward(*args):
        return call(*args), args

    def backward(args, gradient):
        count, fixed, *operands = args

        def pull(n):
            return jax.vjp(partial(function, fixed, n), *operands)[1](gradient)

        return None, None, *_summed(count, pull, tuple(map(jnp.zeros_like, operands)))

    call.defvjp(forward, backward)
    return call(count, fixed, *operands)


def _summed(count: Array, term: Callable[[Array], Any], zeros: Any) -> Any:
    return lax.fori_loop(0, count, lambda n, total: jax.tree.map(jnp.add, total, term(n)), zeros)
