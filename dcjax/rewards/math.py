r"""Rewards for mathematical answers in LaTeX, in the last box or on an answer line, verified by math-verify.

SymPy may need any amount of time and memory for an answer: run these functions in a `RewardPool`.
"""

from __future__ import annotations

import functools
import re

from dcjax.rewards import verify
from dcjax.rewards.boxed import last_box
from dcjax.rewards.numbers import read_number, same_number

ANSWER_LINE_WINDOW = 300  # characters at a response's end in which an answer line counts, as in verl

_ANSWER = re.compile(r"(?i)answer[ \t]*:")
_MATH_MODE = ((r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"), ("$", "$"))
_MARKS = " \t\r*`"  # Markdown's emphasis and code
# A million or more, however it is written: digits, 3e8, 10^{8}.
_DIGITS = r"(?:[0-9]{6,}+|[0-9]*+\.?+[0-9]*+[eE]\+?0*(?:[6-9]|[1-9][0-9]))"
_TEN_TO_THE = r"10\s*\^[\s{]*0*(?:[6-9]|[1-9][0-9])"
# Powers and factorials that take SymPy at least seconds: exponents three deep or of a million, nested factorials.
_EXPLODES = re.compile(
    rf"\^\{{[^{{}}]*\^\{{[^{{}}]*\^|\^[\s{{(]*[+-]?{_DIGITS}|\^\s*\{{[^{{}}^]*{_TEN_TO_THE}"
    rf"|(?:{_DIGITS}|{_TEN_TO_THE})[\s)}}]*!|![\s)}}]*!"
)
_MAX_DEPTH = 20  # most brackets open at one point; the parser's time grows exponentially with them
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[0-9]+|\S", re.DOTALL)


def math_reward(text: str, gold: str, *, finished: bool) -> float:
    r"""1.0 for a finished response whose last box holds an answer equal to `gold`, else 0.0.

    The box is what `last_box` finds. Text identical to the gold answer is equal to it. Two numbers are compared as
    `same_number` says, everything else by math-verify, which evaluates what it is given: `12-4` equals 8. Numbers are
    equal exactly where both are exact, and within 1e-6 of the larger where one is a rounded decimal. Known deviations
    from a mathematician's verdict are listed in docs/rewards.md. Of a gold answer that is not `readable` only the
    same text is right, whatever its spaces.

    Args:
      text: the response, decoded without special tokens.
      gold: the right answer in LaTeX, without its box.
      finished: whether the end token was generated; a response that was cut off scores 0.
    """
    return _score(last_box(text) if finished else None, gold)


def answer_line_reward(text: str, gold: str, *, finished: bool) -> float:
    r"""1.0 for a finished response whose last line `Answer: X` holds an answer equal to `gold`, else 0.0.

    X is what `answer_line` finds. In all else it is `math_reward`.
    """
    return _score(answer_line(text) if finished else None, gold)


def answer_line(text: str) -> str | None:
    """The X of the last line `Answer: X` in the last `ANSWER_LINE_WINDOW` characters; None if there is none.

    This is the rule of verl's DAPO recipe, whose template asks for such a line; X may also stand on a line of its own
    after `Answer:`. It may be in math mode, in code or in a box, and may end in a full stop.
    """
    window = text[-ANSWER_LINE_WINDOW:]
    for found in reversed(list(_ANSWER.finditer(window))):
        if after := window[found.end() :].lstrip(f"{_MARKS}\n"):
            line = _displayed(after) or after.partition("\n")[0]
            return last_box(line) if r"\boxed" in line or r"\fbox" in line else _bare(line)
    return None


def _displayed(text: str) -> str | None:
    """The content of the display math that a text begins with; None unless a line ends with it."""
    for opening, closing in _MATH_MODE[1:3]:
        if text.startswith(opening):
            content, _, after = text[len(opening) :].partition(closing)
            if not after.partition("\n")[0].strip(f"{_MARKS}."):
                return content
    return None


def _bare(line: str) -> str:
    """The line without emphasis, a final full stop and the delimiters of math mode."""
    answer = line.strip(_MARKS).removesuffix(".").strip(_MARKS)
    for opening, closing in _MATH_MODE:
        if answer.startswith(opening) and answer.endswith(closing) and len(answer) > len(opening) + len(closing):
            return answer[len(opening) : -len(closing)].removesuffix(".")
    return answer


@functools.lru_cache(maxsize=4096)
def readable(gold: str) -> bool:
    """Whether other spellings of a gold answer can be verified; if not, only its own text is right.

    It takes as long as verifying an answer, so run it in a process that may be stopped, as `dcjax.rewards.golds` does.
    """
    return read_number(gold) is not None or (not _is_hostile(gold) and verify.readable(gold))


def same_answer(answer: str, gold: str) -> bool:
    """Whether an answer equals `gold`, both in LaTeX: the comparison of `math_reward`."""
    answer, gold = answer.strip(), gold.strip()
    if not answer:
        return False
    if answer == gold:
        return True
    given, expected = read_number(answer), read_number(gold)
    if given is not None and expected is not None:
        return same_number(given, expected)
    if _is_hostile(answer):
        return False
    if not readable(gold):
        return _TOKEN.findall(answer) == _TOKEN.findall(gold)
    return verify.equal(answer, gold)


def _score(answer: str | None, gold: str) -> float:
    return float(answer is not None and same_answer(answer, gold))


def _is_hostile(answer: str) -> bool:
    """Whether an answer is clearly too costly for SymPy; the others that are meet the limits of the pool."""
    depth = deepest = 0
    for character in answer:
        if not (character.isprintable() or character.isspace()):
            return True
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    return deepest > _MAX_DEPTH or _EXPLODES.search(answer) is not None
