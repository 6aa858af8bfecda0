r"""Rewards for mathematical answers in LaTeX, in the last box or on an answer line, judged by math-verify.

An answer that SymPy computes with may take any time and memory: run these functions in a `RewardPool`.
"""

from __future__ import annotations

import re

from dcjax.rewards.boxed import INTEGER, boxed_answer
from dcjax.rewards.verify import equal

ANSWER_LINE_WINDOW = 300  # characters at a response's end in which an answer line counts, as in verl

_ANSWER_LINE = re.compile(r"(?i)answer[ \t]*:([^\n]+)")
_MATH_MODE = ((r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"), ("$", "$"))
# Powers and factorials that take SymPy seconds at least: three exponents deep, six digits, a factorial's factorial.
_EXPLODES = re.compile(r"\^\{[^{}]*\^\{[^{}]*\^|\^\s*\{?\s*[+-]?[0-9]{6,}|[0-9]{6,}\s*!|![\s)}]*!")
_MAX_DEPTH = 20  # brackets open at one point; the parser's time grows exponentially with them


def math_reward(text: str, gold: str, *, finished: bool) -> float:
    r"""1.0 for a finished response whose last `\boxed{}` holds an answer equal to `gold`, else 0.0.

    Equality is that of integers where both are literals, else math-verify's, which evaluates what it is given:
    `12-4` equals 8. Its known deviations from a mathematician's verdict are listed in docs/rewards.md.

    Args:
      text: the response, decoded without special tokens.
      gold: the right answer in LaTeX, without its box.
      finished: whether the end token was generated; a response cut off earns nothing.

    Raises:
      ValueError: math-verify cannot read `gold` (only noticed where an answer is compared with it).
    """
    if not finished:
        return 0.0
    return _judge(boxed_answer(text), gold)


def answer_line_reward(text: str, gold: str, *, finished: bool) -> float:
    r"""1.0 for a finished response whose last line `Answer: X` holds an answer equal to `gold`, else 0.0.

    X is what `answer_line` finds. Otherwise as `math_reward`.

    Raises:
      ValueError: math-verify cannot read `gold` (only noticed where an answer is compared with it).
    """
    return _judge(answer_line(text), gold) if finished else 0.0


def answer_line(text: str) -> str | None:
    """The X of the last line `Answer: X` in the last `ANSWER_LINE_WINDOW` characters; None where there is none.

    As in verl's DAPO recipe, whose template asks for it. X may be in math mode or in a box, and may end in a full stop.
    """
    lines = _ANSWER_LINE.findall(text[-ANSWER_LINE_WINDOW:])
    if not lines:
        return None
    return boxed_answer(lines[-1]) if r"\boxed" in lines[-1] else _bare(lines[-1])


def _bare(line: str) -> str:
    """The line without emphasis, a final full stop and the delimiters of math mode."""
    answer = line.strip(" \t\r*").removesuffix(".").strip(" \t*")
    for opening, closing in _MATH_MODE:
        if answer.startswith(opening) and answer.endswith(closing) and len(answer) > len(opening) + len(closing):
            return answer[len(opening) : -len(closing)].removesuffix(".")
    return answer


def _judge(answer: str | None, gold: str) -> float:
    """Whether there is an answer, and it equals gold."""
    if answer is None:
        return 0.0
    answer, gold = answer.strip(), gold.strip()
    if INTEGER.fullmatch(answer) and INTEGER.fullmatch(gold):
        return float(int(answer) == int(gold))
    if not answer or (answer != gold and _is_hostile(answer)):
        return 0.0
    return float(equal(answer, gold))


def _is_hostile(answer: str) -> bool:
    """Whether an answer is not worth SymPy's time; only what is cheap to see, since nothing can tell them all."""
    depth = deepest = 0
    for character in answer:
        if not (character.isprintable() or character.isspace()):
            return True
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    return deepest > _MAX_DEPTH or _EXPLODES.search(answer) is not None
