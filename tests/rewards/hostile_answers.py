"""Responses that mean harm: to the verifier's time, memory, stack or process. None of them is right."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

GOLDS = (r"\frac{1}{7}", "34", r"\{1,2\}", "x+1", "[0,1)")


def box(content: str) -> str:
    return rf"So the answer is $\boxed{{{content}}}$."


def nested(opening: str, content: str, closing: str, depth: int) -> str:
    return opening * depth + content + closing * depth


def tower_of_powers(draw: random.Random) -> str:
    return box(nested(f"{draw.randint(2, 99)}^{{", "9", "}", draw.randint(2, 25)))


def factorials(draw: random.Random) -> str:
    number = draw.choice([5, 9, 20, 99, 3000, 99999, 10**8])
    return box(
        draw.choice([nested("(", f"{number}", "!)", draw.randint(1, 6)), f"{number}" + "!" * draw.randint(1, 9)])
    )


def megabytes(draw: random.Random) -> str:
    unit = draw.choice(["7", "x", "{", "}", "\\", r"\boxed{", r"\boxed{7", r"\boxed{7} and ", "$", "\n", "Answer: "])
    return unit * (draw.randint(1, 2) * 2**20 // len(unit)) + draw.choice(["", "}", box("8")])


def deep_nesting(draw: random.Random) -> str:
    paired = ["()", "{}", "[]", "||", (r"\{", r"\}"), (r"\left(", r"\right)"), ("-", "")]
    commands = [r"\sqrt{", r"\frac{1}{1+", r"\overline{", r"\text{", "x_{", "x^{-"]
    opening, closing = draw.choice([*paired, *((command, "}") for command in commands), (r"\sin(", ")")])
    return box(nested(opening, "8", closing, draw.randint(8, 280 // len(opening + closing))))


def code(draw: random.Random) -> str:
    command = draw.choice(["kill -9 -1", "touch /tmp/owned", ":(){ :|:& };:", "cat /etc/passwd"])
    return box(
        draw.choice(
            [
                f"__import__('os').system('{command}')",
                rf"\immediate\write18{{{command}}}",
                rf"\input{{/etc/passwd}}{draw.randint(2, 99)}",
                r"().__class__.__bases__[0].__subclasses__()",
                "exec('while True: pass')",
                "lambda x: x(x)",
                "{0.__class__}".replace("0", str(draw.randint(0, 9))),
                "'; DROP TABLE answers; --",
                "sys.exit(0)",
                "[0]*10**10",
            ]
        )
    )


def control_characters(draw: random.Random) -> str:
    content = "".join(draw.choice("\x00\x01\x07\x08\x1b\x7f\x9f8") for _ in range(draw.randint(1, 99)))
    return box(content + "5")


def surrogates(draw: random.Random) -> str:
    content = "".join(chr(draw.randint(0xD800, 0xDFFF)) for _ in range(draw.randint(1, 99)))
    return draw.choice([content + box("8"), box(content), box("5" + content)])


def strange_characters(draw: random.Random) -> str:
    signs = "\u202e\u200b\u2066\ufeff\u0301\U0001f600\U000e0041\u0660\uff17²Ⅷ½"
    return box("".join(draw.choice(signs) for _ in range(draw.randint(1, 150))))


def huge_matrices(draw: random.Random) -> str:
    size = draw.randint(3, 9)
    rows = r"\\".join("&".join(draw.choice(["x", "y", "7", "z^9"]) for _ in range(size)) for _ in range(size))
    after = draw.choice(["", f"^{{{draw.randint(2, 99999)}}}", "^{-1}", "^{x}", r"^{T}", r"^{\frac{1}{2}}"])
    return box(draw.choice(["", r"\det"]) + rf"\begin{{pmatrix}}{rows}\end{{pmatrix}}" + after)


def macro_bombs(draw: random.Random) -> str:
    name = draw.choice("abcxyz")
    return box(
        draw.choice(
            [
                rf"\def\{name}{{\{name}\{name}}}\{name}",
                rf"\newcommand{{\{name}}}{{\{name}}}\{name}",
                rf"\loop\iftrue\repeat{name}",
                rf"\let\{name}\undefined\{name}",
                rf"\csname {name}\endcsname" * draw.randint(1, 9),
            ]
        )
    )


def calculus(draw: random.Random) -> str:
    n = draw.randint(2, 10**9)
    return box(
        draw.choice(
            [
                rf"\int_0^{{{n}}} e^{{\sin(x^{{{draw.randint(2, 9)}}})}} \cos(e^x) dx",
                rf"\int \frac{{\sqrt{{x^{{{draw.randint(5, 50)}}}+1}}}}{{\ln x+\sin x}} dx",
                rf"\sum_{{k=1}}^{{{n}}} \frac{{1}}{{k^k}}",
                rf"\prod_{{k=1}}^{{{n}}} (1+\frac{{x}}{{k}})",
                rf"\lim_{{x\to\infty}} \frac{{x^{{{draw.randint(9, 99)}}}}}{{e^{{\sin x}}}}",
                rf"\frac{{d^{{{draw.randint(9, 99)}}}}}{{dx}} e^{{e^{{e^x}}}}",
            ]
        )
    )


def big_numbers(draw: random.Random) -> str:
    n = draw.randint(10**4, 10**7)
    return box(
        draw.choice(
            [
                rf"\binom{{{2 * n}}}{{{n}}}",
                rf"{n}^{{{n}}}",
                rf"\gcd({n}^{{{n}}},{n + 1}^{{{n}}})",
                rf"\log_{{{n}}} {n}^{{{n}^{{{n}}}}}",
                rf"e^{{e^{{{n}}}}}",
                rf"\sqrt[{n}]{{{n}}}^{{{n + 1}}}",
                rf"{n}^{{99999}}\cdot {n + 1}^{{99999}}",
                rf"\Gamma({n})",
                rf"{n} \mod 0",
                rf"\frac{{{n}}}{{0}}",
                "9" * draw.randint(100, 290) + "." + "9" * 5,
                rf"\sin({n}^{{{n}}})",
            ]
        )
    )


def expansions(draw: random.Random) -> str:
    n = draw.randint(50, 99999)
    roots = "+".join(rf"\sqrt{{{draw.randint(2, 9999)}}}" for _ in range(draw.randint(3, 20)))
    sines = "".join(rf"\sin({k}x)\cos({k + 1}x)" for k in range(1, draw.randint(3, 12)))
    powers = [f"(x+y+z)^{{{n}}}", f"(x+1)^{{{n}}}-(x-1)^{{{n}}}", f"({roots})^{{{n}}}", rf"\frac{{x^{{{n}}}-1}}{{x-1}}"]
    relations = [f"x^{{{n}}}+x+1=0", rf"\sin(x)^{{{n}}}=\cos(x)", f"x^5-x-{n}>0"]
    return box(draw.choice([*powers, *relations, rf"\frac{{1}}{{{roots}}}", sines]))


def long_lists(draw: random.Random) -> str:
    separator = draw.choice(
        [",", ";", " and ", " or ", "$ and $", "=", "<", r"\cup", r"\\", "&", "!", "'", "^", "_", "+-", "|"]
    )
    items = separator.join(draw.choice(["1", "x", "[0,1]", "{2}"]) for _ in range(200))
    return box(items[: draw.randint(50, 290)])


FAMILIES: tuple[Callable[[random.Random], str], ...] = (
    tower_of_powers,
    factorials,
    megabytes,
    deep_nesting,
    code,
    control_characters,
    surrogates,
    strange_characters,
    huge_matrices,
    macro_bombs,
    calculus,
    big_numbers,
    expansions,
    long_lists,
)


def hostile(count: int, seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """(family, response, gold), each family in turn."""
    draw = random.Random(seed)
    for number in range(count):
        family = FAMILIES[number % len(FAMILIES)]
        yield family.__name__, family(draw), draw.choice(GOLDS)
