r"""Rewards for answers given in a LaTeX box: the last `\boxed{...}` of a response against a gold answer."""

import re
from collections import deque

from dcjax.rewards.verify import equal

MAX_ANSWER_LENGTH = 300  # characters; it bounds the cost of every answer, honest or hostile

_BOX = r"\boxed{"
# the opening of a box, or a box around a number without braces: `\boxed 42`
_ANY_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*+\{|\s++([-+]?\.?[0-9][0-9.,/]*+)(?=[\s$}]|\\[\])]|$))")
INTEGER = re.compile(r"[+-]?[0-9]+")  # [0-9] and not \d, which also matches the digits of other scripts


def boxed_answer(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` in `text`, exactly as written.

    The last box opened counts: the later of two boxes, and the inner of nested ones. Braces must
    balance; one escaped by a backslash is a character, not a brace. Linear in `len(text)`, whatever it holds.

    Args:
        text: any string.

    Returns:
        The content, which may be empty; None if no box is opened, or if the last one opened does not close after
        at most `MAX_ANSWER_LENGTH` characters.
    """
    box = text.rfind(_BOX)
    return None if box < 0 else _to_closing_brace(text, box + len(_BOX))


def last_box(text: str) -> str | None:
    r"""The content of the last box in `text`, however it is written, exactly as written.

    A box is `\boxed{...}` or `\fbox{...}`, spaces and newlines before the brace or not, or a number without braces
    between spaces or at an end, `\boxed 42`; `\boxed` followed by anything else opens none. In all else it
    is `boxed_answer`.
    """
    found = deque(_ANY_BOX.finditer(text), maxlen=1)
    if not found:
        return None
    (last,) = found
    if last[1] is not None:
        return last[1] if len(last[1]) <= MAX_ANSWER_LENGTH else None
    return _to_closing_brace(text, last.end())


def _to_closing_brace(text: str, start: int) -> str | None:
    """The text from `start` to the closing brace; None if that is further than `MAX_ANSWER_LENGTH` characters."""
    candidate = text[start : start + MAX_ANSWER_LENGTH + 1]
    depth, escaped = 1, False
    for position, character in enumerate(candidate):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return candidate[:position]
    return None


def integer_reward(text: str, gold: str, *, finished: bool) -> float:
    r"""1.0 for a finished response whose last box holds an integer equal to `gold`, else 0.0.

    The box must hold an integer literal and nothing else: an optional sign and ASCII digits, no spaces.
    math-verify evaluates what it is given, so without this condition the question copied into the box would
    be a right answer: it verifies `\boxed{12-4}` as equal to 8. Equality is math-verify's: `007` and `+7` are 7.

    A new pair of answer and gold costs about a millisecond, a remembered one a few microseconds, and the
    first call in a process a second or two, to import math-verify. It may be called from any thread.

    Args:
        text: the response, decoded without special tokens.
        gold: the right answer, a number as math-verify reads it in a box.
        finished: whether the end token was generated; a response that was cut off scores 0.

    Raises:
        ValueError: math-verify cannot read `gold` (noticed only if the box holds an integer).
    """
    if not finished:
        return 0.0
    answer = boxed_answer(text)
    if answer is None or INTEGER.fullmatch(answer) is None:
        return 0.0
    return float(equal(answer, gold))
