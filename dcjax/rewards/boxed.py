r"""Rewards for answers given in a LaTeX box: the last `\boxed{...}` of a response against a gold answer."""

import functools
import logging
import re
from collections.abc import Callable

# Any function (text, gold, *, finished) -> float; picklable, so that worker processes can run it too.
# text: the response, without special tokens; gold: the right answer; finished: the end token was generated.
Reward = Callable[..., float]

MAX_ANSWER_LENGTH = 300  # characters; the cost of an honest answer is bounded, and so is a hostile one's

_BOX = r"\boxed{"
_INTEGER = re.compile(r"[+-]?[0-9]+")  # [0-9] and not \d, which also matches the digits of other scripts


def boxed_answer(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` in `text`, exactly as written.

    The last box opened decides, so of two boxes the later counts and of nested ones the inner. Braces must
    balance; one escaped by a backslash is a character, not a brace. Linear in `len(text)`, whatever it holds.

    Args:
        text: any string.

    Returns:
        The content, which may be empty; None where no box is opened, or where the last one opened does not
        close after at most `MAX_ANSWER_LENGTH` characters.
    """
    box = text.rfind(_BOX)
    if box < 0:
        return None
    start = box + len(_BOX)
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
    be a right answer: it judges `\boxed{12-4}` equal to 8. Equality is math-verify's: `007` and `+7` are 7.

    A new pair of answer and gold costs about a millisecond, a remembered one a few microseconds, and the
    first call in a process a second or two, to import math-verify. It may be called from any thread.

    Args:
        text: the response, decoded without special tokens.
        gold: the right answer, a number as math-verify reads it in a box.
        finished: whether the end token was generated; a response cut off earns nothing.

    Raises:
        ValueError: math-verify cannot read `gold` (only noticed where the box holds an integer).
    """
    if not finished:
        return 0.0
    answer = boxed_answer(text)
    if answer is None or _INTEGER.fullmatch(answer) is None:
        return 0.0
    return float(_equal(answer, gold))


@functools.lru_cache(maxsize=4096)
def _equal(answer: str, gold: str) -> bool:
    """Whether math-verify judges the answer equal to gold; remembered, because a policy's answers are few."""
    import math_verify

    # Without its timeouts math-verify warns that nobody keeps time. The literal's length bounds the work.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    parsed_gold = _parse(gold)
    if not parsed_gold:
        raise ValueError(f"gold is {gold!r}, which math-verify cannot read; give a number such as '7' or '-12'")
    # The comparison is asymmetric: the gold answer comes first.
    return math_verify.verify(parsed_gold, _parse(answer), timeout_seconds=None)


def _parse(content: str) -> list:
    """The SymPy expressions math-verify reads in a box around `content`; empty if it cannot."""
    import math_verify

    boxes_only = math_verify.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    return math_verify.parse(
        _BOX + content + "}",
        extraction_config=[boxes_only],
        fallback_mode="no_fallback",
        # its own timeouts are SIGALRM, which only the main thread may set; its annotation forgets that None is allowed
        parsing_timeout=None,  # pyrefly: ignore[bad-argument-type]
    )
