"""math-verify behind one function, without its own timeouts: they are alarms, which only the main thread may set."""

from __future__ import annotations

import functools
import logging

WARM_UP = (
    *(r"\frac{1}{2}", "-0.5", r"\sqrt{3}\pi", "x^{2}+1", "1,234", r"2\cdot 10^{3}"),
    *(r"50\%", r"12\text{ cm}", r"30^\circ", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    *(r"\{1,2\}", "[0,1)", "(1,2,3)", "x=7", r"2\leq x<3"),
)
"""What answers are made of."""


@functools.lru_cache(maxsize=4096)
def equal(answer: str, gold: str) -> bool:
    """Whether math-verify judges the LaTeX `answer` equal to `gold`; remembered, because a policy's answers are few.

    Takes about a millisecond for an honest answer and no bounded time or memory for a hostile one.

    Raises:
      ValueError: math-verify cannot read `gold`.
    """
    import math_verify
    from sympy.core import random

    random.seed(0)  # SymPy tries equations at random points; verdicts must not depend on those drawn before
    expected = _read(gold)
    if not expected:
        raise ValueError(
            f"gold is {gold!r}, which math-verify cannot read; give a number or LaTeX: '7', '\\frac{{1}}{{2}}'"
        )
    # The comparison is asymmetric: the gold answer comes first.
    return math_verify.verify(expected, _read(answer), timeout_seconds=None)


def warm_up() -> None:
    """Imports math-verify, and lets its parser meet what answers are made of: two seconds, spent beforehand."""
    for answer in WARM_UP:
        equal(answer, answer)
    equal("x^{2}-1", "(x-1)(x+1)")


@functools.lru_cache(maxsize=4096)
def _read(content: str) -> list:
    """The SymPy expressions math-verify reads in a box around `content`; empty if it cannot."""
    import math_verify

    # Without its timeouts math-verify warns that nobody keeps time. Whoever calls this does.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    boxes_only = math_verify.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    return math_verify.parse(
        rf"\boxed{{{content}}}",
        extraction_config=[boxes_only],
        fallback_mode="no_fallback",
        parsing_timeout=None,  # pyrefly: ignore[bad-argument-type]  (its annotation forgets that None is allowed)
    )
