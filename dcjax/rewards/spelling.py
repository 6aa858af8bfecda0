r"""Respells what math-verify would misread: `3e8`, `5.`, `3+4i`, `\frac{1}{m} t`."""

from __future__ import annotations

import re

MAX_EXPONENT = 99
"""Largest exponent, positive or negative, of a number in scientific notation inside an expression; a number beyond it
would be written out with too many digits."""

_SCIENTIFIC = re.compile(r"(?<![A-Za-z0-9_.\\])([0-9]++\.?[0-9]*+|\.[0-9]++)[eE]([-+]?)([0-9]++)(?!_|\.[0-9])")
# not the dots of 0.333..., nor a point before marks that continue a decimal
_FINAL_POINT = re.compile(r"(?<=[0-9])\.(?![0-9.]|\s+[0-9]|\s*\\(?:overline|dot|bar|[lc]?dots)(?![a-zA-Z]))")
_IMAGINARY = re.compile(r"(?<=[0-9])i(?![A-Za-z])")
_WORDS = re.compile(r"\\(?:text|mbox|math[a-z]+)\s*\{[^{}]*\}|\\[A-Za-z]+")
_EULER = re.compile(r"(?<![A-Za-z])e(?![A-Za-z])")
# what math-verify may take for a unit at the end, or before a unit in \text: its "g ." is any character after "g "
_TAIL = re.compile(
    r"(?<=[0-9}\s])([a-z]+|[a-hqs] .)(\s*(?:\\(?:text|mbox|math[a-z]+)\s*\{[^{}]*\}(?:\^\{?[0-9]\}?)?\s*)?)$"
)
# short words that are more likely units than products of symbols
_UNITS = re.compile(r"(?:[cmkd]m|kg|gm|lb|ft|hr|yr|mph|kmh|mtr|sec|min|deg|gal|ohm|day|m[ea]n|pie|toy)s?")
_ORDINAL_OR_HOUR = re.compile(r"(?:1st|3rd|[0-9]th|[0-9]\s+[ap]m)$")
_UNIT = re.compile(r"[0-9]\s*[mghls]\s*$")


def spell(answer: str, gold: str) -> tuple[str, str]:
    """Both texts spelt so that math-verify reads them correctly: (answer, gold).

    A number in scientific notation is written out as a decimal, unless its exponent exceeds `MAX_EXPONENT`. `2e-3` is
    one, but not beside a text that holds Euler's number e itself: there it is 2e − 3. Letters at the end are symbols,
    except for words and short units such as cm. A single letter is a unit only if the answer ends with a number and m,
    g, h, l or s, and the gold answer has no letter.
    """
    sums = any(_EULER.search(_bare(_SCIENTIFIC.sub(" ", text))) for text in (answer, gold))
    return (
        _spell(answer, sums=sums, unit=_UNIT.search(answer) is not None and not re.search("[A-Za-z]", _bare(gold))),
        _spell(gold, sums=sums, unit=False),
    )


def _bare(text: str) -> str:
    """The text without its commands and words."""
    return _WORDS.sub(" ", text)


def _spell(text: str, *, sums: bool, unit: bool) -> str:
    text = _SCIENTIFIC.sub(lambda matched: _written_out(matched, sums=sums), text)
    text = _IMAGINARY.sub(" i", _FINAL_POINT.sub("", text))
    return text if unit else _TAIL.sub(_kept, text)


def _kept(tail: re.Match[str]) -> str:
    r"""What math-verify would drop at the end of a text; if it is not a unit, a `\quad` after it prevents that."""
    word = tail[1]
    if len(word) >= 4 or _UNITS.fullmatch(word) or _ORDINAL_OR_HOUR.search(tail.string[: tail.end(1)]):
        return tail[0]
    return rf"{word}\quad {tail[2]}"


def _written_out(matched: re.Match[str], *, sums: bool) -> str:
    """A number in scientific notation as a decimal, or as an integer if its digits have no point; or unchanged."""
    digits, sign, exponent = matched.groups()
    if len(exponent) > 4 or int(exponent) > MAX_EXPONENT:
        return matched[0]
    if sums and sign and digits.isdigit() and not exponent.startswith("0"):
        return matched[0]
    number = _moved(digits, int(f"{sign}{exponent}"))
    # math-verify may split a number that follows a brace
    return f"({number})" if matched.string[: matched.start()].rstrip().endswith("}") else number


def _moved(digits: str, places: int) -> str:
    """Digits with their decimal point moved to the right, or to the left where `places` is negative."""
    whole, _, part = digits.partition(".")
    if places >= 0:
        moved, rest = whole + part[:places].ljust(places, "0"), part[places:]
        return f"{moved}.{rest or '0'}" if part else moved
    padded = whole.rjust(1 - places, "0")
    return f"{padded[:places]}.{padded[places:]}{part}"
