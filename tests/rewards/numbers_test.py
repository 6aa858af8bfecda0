from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcjax.rewards.numbers import MAX_LENGTH, TOLERANCE, read_number, same_number

DIGITS, POWERS = st.integers(-(10**9), 10**9), st.integers(-30, 30)


def value(text):
    number = read_number(text)
    return number.mantissa * Fraction(10) ** number.exponent


def same(answer, gold):
    return same_number(read_number(answer), read_number(gold))


@pytest.mark.parametrize(
    "text, expected",
    [
        *[
            ("7", 7),
            ("+007", 7),
            ("-7", -7),
            ("−7", -7),
            ("- 7", -7),
            (" 7 ", 7),
            ("5.", 5),
            (".5", Fraction(1, 2)),
            ("2.50", Fraction(5, 2)),
        ],
        *[
            ("1/3", Fraction(1, 3)),
            ("-1./3", Fraction(-1, 3)),
            ("-3. / 2", Fraction(-3, 2)),
            (r"\frac{-1}{3}", Fraction(-1, 3)),
        ],
        *[(r"-\dfrac{ 1 }{ 2.5 }", Fraction(-2, 5)), (r"\frac12", Fraction(1, 2)), (r"\tfrac 1 2", Fraction(1, 2))],
        *[("3e8", 3 * 10**8), ("3E+08", 3 * 10**8), ("-1.5e-3", Fraction(-3, 2000)), ("3e-05", Fraction(3, 10**5))],
        *[
            (r"3\times10^{8}", 3 * 10**8),
            (r"3 \cdot 10^8", 3 * 10**8),
            ("3*10^-2", Fraction(3, 100)),
            ("3×10^{−2}", Fraction(3, 100)),
        ],
        *[(r"3\,\times\,10^{8}", 3 * 10**8), ("10^{-19}", Fraction(1, 10**19)), ("-10^3", -1000)],
    ],
)
def test_numbers(text, expected):
    assert value(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *[
            "",
            "-",
            ".",
            "x",
            "3x",
            "24e",
            "e5",
            "3e",
            "3e8.5",
            "1,234",
            "3 4",
            "1 1/2",
            "50%",
            r"34\%",
            "34_8",
            "5!",
            "--5",
            "(5)",
        ],
        *[
            "1/0",
            r"\frac{1}{0}",
            "1/2/3",
            "1/-2",
            r"\frac{1}{x}",
            "11^{2}",
            r"2\times 11^{2}",
            "10^{x}",
            "10^{1.5}",
            "５",
            "0x7",
            "1_0",
        ],
        *["inf", "nan", "1e8e", "1" * (MAX_LENGTH + 1)],
    ],
)
def test_what_is_no_number(text):
    assert read_number(text) is None


@given(DIGITS, POWERS)
def test_spellings_of_one_number_are_the_same(digits, power):
    exact = Fraction(digits) * Fraction(10) ** power
    ratio = f"{exact.numerator}/{exact.denominator}" if exact >= 0 else f"-{-exact.numerator}/{exact.denominator}"
    spellings = [f"{digits}e{power}", rf"{digits}\times10^{{{power}}}", rf"{digits}0\cdot 10^{{{power - 1}}}", ratio]
    for one in spellings:
        assert value(one) == exact
        for other in spellings:
            assert same(one, other)


@given(DIGITS, DIGITS, POWERS, POWERS)
def test_exact_numbers_are_the_same_when_their_values_are(one, other, up, down):
    equal = Fraction(one) * Fraction(10) ** up == Fraction(other) * Fraction(10) ** down
    assert same(f"{one}e{up}", rf"{other}\times10^{{{down}}}") == equal


@given(st.floats(1e-300, 1e300), st.floats(1e-300, 1e300))
def test_floats_are_the_same_when_they_are_near_in_proportion(one, other):
    assert same(repr(one), repr(one))
    if abs(Fraction(one) - Fraction(other)) > 2 * TOLERANCE * Fraction(other):
        assert not same(repr(one), repr(other))


@pytest.mark.parametrize(
    "answer, gold, right",
    [
        # a rounded decimal and a fraction that no decimal equals
        *[
            ("0.333333", "1/3", 1),
            ("1/3", "0.333333", 1),
            ("0.33333", "1/3", 0),
            ("0.083333", "1/12", 0),
            ("0.0833333", "1/12", 1),
        ],
        # and exact numbers, which are equal or not
        *[
            ("1.0000001", "1", 0),
            ("0.9999999999", "1", 0),
            ("0.5000001", "1/2", 0),
            ("0.5", "1/2", 1),
            ("1.5e-19", "2e-19", 0),
        ],
        *[("602000000000000000000000", r"6.02\times10^{23}", 1), ("602000000000000000000001", r"6.02\times10^{23}", 0)],
        # two decimals
        *[("0.3", "0.30000000000000004", 1), ("2.71828183", "2.718281828", 1), ("1234567.50", "1234567.89", 0)],
        *[
            ("1.5000001", "1.5", 1),
            ("1234567.1", "1234567.2", 0),
            ("4.5e33", "4.6e33", 0),
            ("0.10000000149011612", "0.1", 1),
        ],
        # zero
        *[("0", "0.0", 1), ("-0", "0e9", 1), ("1e-400", "0", 0), ("0", "1e-400", 0)],
        # powers that nobody multiplies out
        *[
            ("1e999999999999", "10e999999999998", 1),
            ("1e999999999999", "2e999999999999", 0),
            ("1e-999999999999", "1e999999999999", 0),
        ],
    ],
)
def test_the_same_and_not_the_same(answer, gold, right):
    assert same(answer, gold) == right
