import pytest

from dcjax.rewards.spelling import spell


@pytest.mark.parametrize(
    "text, spelt",
    [
        *[
            ("3e8", "300000000"),
            ("x=3E+8", "x=300000000"),
            ("4.5e3", "4500.0"),
            ("1.2345e2", "123.45"),
            (".5e1", "5.0"),
        ],
        *[
            ("3e-05", "0.00003"),
            ("1.6e-3x", r"0.0016x\quad "),
            ("123e-2", "1.23"),
            ("12.5e-1", "1.25"),
            ("(1e3,2)", "(1000,2)"),
            (r"\sqrt{2} 3e-2", r"\sqrt{2} (0.03)"),
        ],
        *[
            ("24e", r"24e\quad "),
            ("e5", "e5"),
            ("3e", r"3e\quad "),
            (r"\beta3e8", r"\beta3e8"),
            ("x2e5", "x2e5"),
            ("1e100", "1e100"),
            ("3e8.5", "3e8.5"),
        ],
        *[
            ("5.", "5"),
            ("-1./3", "-1/3"),
            ("(1.,2.)", "(1,2)"),
            ("0.333...", "0.333..."),
            ("1. 5", "1. 5"),
            (r"0.\overline{3}", r"0.\overline{3}"),
            (r"1.\dots", r"1.\dots"),
        ],
        *[("3+4i", r"3+4 i\quad "), ("3+i", "3+i"), ("2in", r"2in\quad "), (r"2\pi", r"2\pi")],
        *[
            (r"\frac{1}{m} t", r"\frac{1}{m} t\quad "),
            ("3t", r"3t\quad "),
            ("3ab", r"3ab\quad "),
            ("x^2 m ", r"x^2 m\quad  "),
            (r"3t \text{ s}", r"3t\quad  \text{ s}"),
        ],
        *[
            ("5 cm", "5 cm"),
            ("5 hours", "5 hours"),
            ("1st", "1st"),
            ("5th", "5th"),
            ("3x", r"3x\quad "),
            (r"5\text{ m}", r"5\text{ m}"),
            ("11 pm", "11 pm"),
            ("m g h", r"m g h\quad "),
            ("( a + b )", r"( a + b )\quad "),
            ("2t + 1", "2t + 1"),
            (r"\omega", r"\omega"),
            (r"\text{Sunday}", r"\text{Sunday}"),
            ("Sunday", "Sunday"),
        ],
    ],
)
def test_golds_as_math_verify_reads_them_rightly(text, spelt):
    assert spell("1", text)[1] == spelt


def test_a_letter_after_a_number_is_a_unit_only_of_an_answer_whose_gold_has_none():
    assert spell("5 m", "5") == ("5 m", "5")
    assert spell("5 m", r"5\text{ cm}")[0] == "5 m"
    assert spell("5 m", "5x")[0] == r"5 m\quad "
    assert spell("5 t", "5")[0] == r"5 t\quad "
    assert spell("x^2 5 m", "5")[0] == "x^2 5 m"


def test_beside_eulers_number_a_signed_exponent_is_a_sum():
    assert spell("2e-3", "-3+2e") == ("2e-3", r"-3+2e\quad ")
    assert spell("-3+2e", "2e-3") == (r"-3+2e\quad ", "2e-3")
    assert spell("24e", "3e8") == (r"24e\quad ", "300000000")
    assert spell("e", "3e-05")[1] == "0.00003"
    assert spell("2e-3", r"\text{e}")[0] == "0.002"
