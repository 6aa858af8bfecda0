r"""Where a response's answer stands, and when it is the right one: two choices, of which each goes with each.

`judge` is a reward function of both. Responses are hostile text: what is searched is bounded, and what may still take
any time (SymPy, a regular expression of a user's) is for a `RewardPool`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from dcjax.rewards.boxed import last_box
from dcjax.rewards.math import answer_line, same_answer

Place = Literal["boxed", "dapo", "tags", "last_line", "bare"]
"""Where an answer stands, by the names of `dcjax.data.templates`."""
Comparison = Literal["math", "exact", "integer", "choice", "regex"]
"""When it is right."""

LONGEST = 20_000
"""The most characters of an answer; a longer one is none."""

_TAGS = ("<answer>", "</answer>")
_GROUPED = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,300})")
_CHOICE = re.compile(r"(?:\\text)?[\s({\[*]*([A-Za-z])(?:[\s)}\].:*].*)?", re.DOTALL)
_MATH_MARKS = " \t\r\n$*`"


def tagged(text: str) -> str | None:
    """What stands between the last `<answer>` and the `</answer>` behind it; None without both."""
    start = text.rfind(_TAGS[0])
    end = text.find(_TAGS[1], start)
    return None if start < 0 or end < 0 else _short(text[start + len(_TAGS[0]) : end])


def last_line(text: str) -> str | None:
    """The last line that is not blank; None if all are."""
    return _short(text.rstrip().rpartition("\n")[2])


def bare(text: str) -> str | None:
    """The whole text; None if it is blank."""
    return _short(text)


PLACES: dict[Place, Callable[[str], str | None]] = {
    "boxed": last_box,
    "dapo": answer_line,
    "tags": tagged,
    "last_line": last_line,
    "bare": bare,
}
"""Functions that find the answer in a response, as it is written there, or None."""


def exact(answer: str, gold: str) -> bool:
    """Whether both are the same text, whatever their spaces."""
    return answer.split() == gold.split()


def integer(answer: str, gold: str) -> bool:
    """Whether the answer is an integer and nothing else, in digits, and equals `gold`.

    A sign, thousands grouped by commas, dollar signs and emphasis around it are accepted: `**$1,234$**` is 1234.
    """
    given, right = _integer(answer), _integer(gold)
    return given is not None and given == right


def choice(answer: str, gold: str) -> bool:
    """Whether the answer begins with the letter of the right option: `b`, `(B)`, `B.` and `B: 12 km` are `B`."""
    given, right = _CHOICE.fullmatch(answer.strip()), _CHOICE.fullmatch(gold.strip())
    return given is not None and right is not None and given[1].upper() == right[1].upper()


def matches(answer: str, gold: str) -> bool:
    """Whether the whole answer matches the regular expression `gold`, which may take any time."""
    return re.fullmatch(gold, answer.strip(), re.DOTALL) is not None


COMPARISONS: dict[Comparison, Callable[[str, str], bool]] = {
    "math": same_answer,
    "exact": exact,
    "integer": integer,
    "choice": choice,
    "regex": matches,
}
"""Functions (answer, gold) -> whether it is right."""


def judge(text: str, gold: str, *, finished: bool, place: Place, comparison: Comparison) -> float:
    """1.0 for a finished response whose answer is right, else 0.0.

    Args:
      text: the response, decoded without special tokens.
      gold: the right answer; for `regex`, what it must match.
      finished: whether the end token was generated; a response that was cut off scores 0.
      place: where the answer stands.
      comparison: when it is right.
    """
    answer = PLACES[place](text) if finished else None
    return float(answer is not None and COMPARISONS[comparison](answer, gold))


def check_gold(gold: str, comparison: Comparison) -> None:
    """Refuses a right answer that no response could give.

    Raises:
      ValueError: it is not what the comparison reads; the message quotes it.
    """
    wants = {
        "integer": (_integer(gold) is not None, "an integer in digits"),
        "choice": (_CHOICE.fullmatch(gold.strip()) is not None, "the letter of an option, such as B"),
        "regex": (_compiles(gold), "a regular expression"),
    }
    right, what = wants.get(comparison, (True, ""))
    if not right:
        raise ValueError(f"the answer is {gold[:80]!r}; for comparison {comparison!r} it must be {what}")


def _integer(text: str) -> int | None:
    found = _GROUPED.fullmatch(text.strip(_MATH_MARKS).removesuffix(".").strip(_MATH_MARKS))
    return None if found is None else int(found[0].replace(",", ""))


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _short(answer: str) -> str | None:
    answer = answer.strip()
    return answer if 0 < len(answer) <= LONGEST else None
