r"""Numbers as answers write them, `4.5e33`, `4.5\times10^{33}`, `-1./3`, `\frac{1}{3}`: read and compared exactly."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

TOLERANCE = Fraction(1, 10**6)
"""How far apart two numbers may be if one of them is rounded, relative to the larger."""

MAX_LENGTH = 1000
"""The most characters of a number; a number's magnitude is then within so many decimal places of its exponent."""

_SPACE = r"(?:\s|\\[,;:! ]|~)*+"
_DECIMAL = r"(?:[0-9]++\.?[0-9]*+|\.[0-9]++)"
_POWER = rf"10{_SPACE}\^{_SPACE}(?:\{{{_SPACE}(?P<braced>[-+−]?[0-9]++){_SPACE}\}}|(?P<bare>[-+−]?[0-9]++))"
_SCIENTIFIC = re.compile(
    rf"(?P<decimal>{_DECIMAL})(?:[eE](?P<e>[-+]?[0-9]++)|{_SPACE}(?:\\times|\\cdot|[*×·]){_SPACE}{_POWER})?"
)
_LONE_POWER = re.compile(_POWER)
_RATIO = re.compile(
    rf"\\[dtc]?frac{_SPACE}\{{{_SPACE}(-?{_DECIMAL}){_SPACE}\}}{_SPACE}\{{{_SPACE}({_DECIMAL}){_SPACE}\}}"
    rf"|\\[dtc]?frac{_SPACE}([0-9]){_SPACE}([0-9])|({_DECIMAL}){_SPACE}/{_SPACE}({_DECIMAL})"
)


@dataclass(frozen=True)
class Number:
    """mantissa · 10^exponent; the power is never multiplied out, so that any exponent costs the same."""

    mantissa: Fraction
    exponent: int
    decimals: int = 0
    """Number of digits after the point of the mantissa as written; 0 for an exact number."""


def read_number(text: str) -> Number | None:
    """The number that a text consists of; None if it is not just a number, or divides by zero.

    Digits are ASCII. The time is linear in the length of the text, and the result None above `MAX_LENGTH` characters.
    """
    text = text.strip()
    if len(text) > MAX_LENGTH:
        return None
    sign = -1 if text[:1] in ("-", "−") else 1
    text = text[1:].lstrip() if text[:1] in ("-", "−", "+") else text
    if matched := _LONE_POWER.fullmatch(text):
        return Number(Fraction(sign), _exponent(matched))
    if matched := _SCIENTIFIC.fullmatch(text):
        decimals = len(matched["decimal"].partition(".")[2])
        return Number(sign * Fraction(matched["decimal"]), _exponent(matched), decimals)
    if matched := _RATIO.fullmatch(text):
        upper, lower = (Fraction(part) for part in matched.groups() if part is not None)
        return Number(sign * upper / lower, 0) if lower else None
    return None


def _exponent(matched: re.Match[str]) -> int:
    groups = matched.groupdict()
    written = groups.get("e") or groups["braced"] or groups["bare"] or "0"
    return int(written.replace("−", "-"))


def same_number(answer: Number, gold: Number) -> bool:
    """Whether an answer is the gold number.

    Numbers of equal value are the same. Beyond that, integers, fractions and powers of ten are exact, but decimals may
    be rounded: a decimal is also the same as a fraction without a finite decimal expansion, within `TOLERANCE`, and as
    another decimal, within `TOLERANCE` and less than a unit of the last digit of the one with fewer decimals.
    """
    if not (answer.mantissa and gold.mantissa):
        return answer.mantissa == gold.mantissa
    shift = answer.exponent - gold.exponent
    if abs(shift) > 2 * MAX_LENGTH:
        return False
    given = answer.mantissa * Fraction(10) ** shift
    if given == gold.mantissa:
        return True
    error = abs(given - gold.mantissa)
    if error > TOLERANCE * max(abs(given), abs(gold.mantissa)):
        return False
    if answer.decimals and gold.decimals:
        return error < max(Fraction(10) ** (shift - answer.decimals), Fraction(1, 10**gold.decimals))
    decimal, exact = (answer, gold) if answer.decimals else (gold, answer)
    return decimal.decimals > 0 and not _terminates(exact.mantissa)


def _terminates(number: Fraction) -> bool:
    """Whether the number has a finite decimal expansion."""
    rest = number.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1
