"""math-verify behind one function, without its own timeouts: they are alarms, which only the main thread may set."""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

from dcjax.rewards.numbers import TOLERANCE
from dcjax.rewards.spelling import spell

WARM_UP = (
    *(r"\frac{1}{2}", "-0.5", r"\sqrt{3}\pi", "x^{2}+1", "1,234", r"2\cdot 10^{3}"),
    *(r"50\%", r"12\text{ cm}", r"30^\circ", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    *(r"\{1,2\}", "[0,1)", "(1,2,3)", "x=7", r"2\leq x<3"),
)
"""Examples of everything that answers usually consist of."""

DECIMALS, DIGITS = 6, 15
"""math-verify's own defaults: the decimals that it rounds to, and the digits to which it evaluates."""

MAX_PLACES = 350
"""The most zeros after the point of a small number that are taken into account; doubles have up to 324."""


@functools.lru_cache(maxsize=4096)
def equal(answer: str, gold: str) -> bool:
    """Whether math-verify finds the LaTeX `answer` equal to `gold`; cached, because a policy's answers repeat.

    Three things differ from math-verify alone. Both texts are spelt first as `spell` says. Two numbers of which one
    comes from decimals are equal within `TOLERANCE`, relative to the larger. And if numbers are part of something
    larger, or both are exact, its absolute precision is raised by the zeros with which the smallest number in `gold`
    begins.

    It takes about a millisecond for an honest answer, but for a hostile one time and memory have no bound.

    Raises:
      ValueError: math-verify cannot read `gold`.
    """
    import math_verify
    from sympy.core import random

    random.seed(0)  # SymPy tries equations at random points; results must not depend on those drawn before
    spelt, spelt_gold = spell(answer, gold)
    expected, given = _read(spelt_gold), _read(spelt)
    if not expected:
        raise ValueError(
            f"gold is {gold!r}, which math-verify cannot read; give a number or LaTeX: '7', '\\frac{{1}}{{2}}'"
        )
    try:
        if len(expected) == len(given) == 1 and _is_inexact_number(expected[0], given[0]):
            return _is_near(given[0], expected[0])
        places = _places(expected)
    except MemoryError:
        raise
    except Exception:  # SymPy cannot compute everything that can be written; math-verify also takes that as unequal
        return False
    # The comparison is asymmetric: the gold answer comes first.
    precision = {"float_rounding": DECIMALS + places, "numeric_precision": DIGITS + places}
    return math_verify.verify(expected, given, timeout_seconds=None, **precision)


def readable(gold: str) -> bool:
    """Whether math-verify reads `gold`, and finds it equal to itself; it takes as much time and memory as `equal`."""
    try:
        return equal(gold, gold)
    except ValueError:
        return False


def warm_up() -> None:
    """Imports math-verify, and runs its parser on typical answers: two seconds that answers then do not take."""
    for answer in WARM_UP:
        equal(answer, answer)
    equal("x^{2}-1", "(x-1)(x+1)")


def _is_inexact_number(one: Any, other: Any) -> bool:
    """Whether both are numbers, and one of them comes from decimals."""
    from sympy import Expr, Float

    if not all(isinstance(each, Expr) and each.is_number for each in (one, other)):
        return False
    return one.has(Float) or other.has(Float)


def _is_near(given: Any, expected: Any) -> bool:
    """Whether two numbers are as near each other as `TOLERANCE` says; neither need be real."""
    from sympy import Rational

    error, *sizes = map(_size, (given - expected, given, expected))
    if not all(number.is_Number and number.is_finite for number in (error, *sizes)):
        return False  # one of them divides by zero, or cannot be computed
    return bool(error <= Rational(TOLERANCE.numerator, TOLERANCE.denominator) * max(sizes))


def _size(number: Any) -> Any:
    """The absolute value of a number as a SymPy Float, if it can be computed."""
    return abs(number.doit()).evalf(2 * DIGITS)


def _places(expressions: list) -> int:
    """The zeros after the point with which the smallest number in the expressions begins; 0 if all are above 0.1.

    A number is the largest part of an expression that has no symbol; those that are 0 do not count.
    """
    from mpmath import log10, mpf
    from sympy import Basic, Expr, MatrixBase

    places, parts = 0, list(expressions)
    while parts:
        part = parts.pop()
        if isinstance(part, MatrixBase):
            parts += part.flat()
        elif not (isinstance(part, Expr) and part.is_number):
            parts += part.args if isinstance(part, Basic) else ()
        elif (size := _size(part)).is_Float and size > 0:
            places = max(places, -math.floor(log10(mpf(size))) - 1)
    return min(places, MAX_PLACES)


@functools.lru_cache(maxsize=4096)
def _read(content: str) -> list:
    """The SymPy expressions math-verify reads in a box around `content`; empty if it cannot."""
    import math_verify

    # Without its timeouts math-verify warns that nothing limits the time. The caller does.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    boxes_only = math_verify.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    return math_verify.parse(
        rf"\boxed{{{content}}}",
        extraction_config=[boxes_only],
        fallback_mode="no_fallback",
        parsing_timeout=None,  # pyrefly: ignore[bad-argument-type]  (its annotation forgets that None is allowed)
    )
