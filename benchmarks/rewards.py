"""Answers judged a CPU-second, and what the worker processes cost.

    python benchmarks/rewards.py [--workers 2] [--answers 400] [--rounds 5] [--timeout 2.0] [--json PATH]

Each round judges answers that no round before it has judged: integers, which need no math-verify (ten times as many);
easy mathematics (fractions, radicals, polynomials, sets, intervals, tuples), half of it right; and the same with one
hostile answer in fifty. CPU time is of this process and of the pool's. "here" is in this process, without a pool.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.append(str(Path(__file__).parent.parent / "tests" / "rewards"))
from hostile_answers import hostile  # pyrefly: ignore[missing-import]
from timing import Elsewhere, environment, measure, ratio, row, table  # pyrefly: ignore[missing-import]

from dcjax.rewards.math import math_reward
from dcjax.rewards.pool import RewardPool
from dcjax.rewards.verify import warm_up

Answers = list[tuple[str, str]]

EASY = (
    (r"\frac{{{n}}}{{7}}", r"\dfrac{{{n}}}{{7}}"),
    (r"{n}\sqrt{{3}}", r"\sqrt{{3}}\cdot {n}"),
    ("x^2+{n}", "{n}+x^2"),
    (r"\{{1,{n}\}}", r"\{{{n},1\}}"),
    ("[0,{n})", "[0, {n})"),
    ("({n},1,2)", r"\left({n},1,2\right)"),
    ("{n}.5", r"\frac{{2\cdot {n}+1}}{{2}}"),
    (r"{n}\pi", r"\pi\cdot {n}"),
)
"""Answers and golds."""
ONE_HOSTILE_IN = 50


def integers(count: int, number: int) -> Answers:
    """Half of them right."""
    count *= 10
    first = (number + 3) * count
    return [(rf"so it is $\boxed{{{first + n}}}$.", str(first + n + n % 2)) for n in range(count)]


def easy(count: int, number: int) -> Answers:
    """Half of them right."""
    first = (number + 3) * count
    rows = []
    for n in range(first, first + count):
        answer, gold = EASY[n % len(EASY)]
        rows.append((rf"so it is $\boxed{{{answer.format(n=n)}}}$.", gold.format(n=n + n // len(EASY) % 2)))
    return rows


def mixed(count: int, number: int) -> Answers:
    """Easy ones, and a hostile one after so many."""
    rows = easy(count, number)
    harmful = hostile(count // ONE_HOSTILE_IN, seed=number)
    rows[ONE_HOSTILE_IN - 1 :: ONE_HOSTILE_IN] = [(text, gold) for _, text, gold in harmful]
    return rows


def in_pool(pool: RewardPool, answers: Callable[[int], Answers], number: int) -> Elsewhere:
    """Judges a round's answers there."""
    texts, golds = zip(*answers(number), strict=True)
    cpu, wall = cpu_seconds(), time.perf_counter()
    pool.score(texts, golds, [True] * len(texts))
    return Elsewhere(cpu=cpu_seconds() - cpu, wall=time.perf_counter() - wall)


def cpu_seconds() -> float:
    """Of this process, and of those that it started and they started, the dead included."""
    this = psutil.Process()
    return sum(sum(process.cpu_times()[:4]) for process in (this, *this.children(recursive=True)))


def in_process(answers: Callable[[int], Answers], number: int) -> None:
    """Judges a round's answers here."""
    for text, gold in answers(number):
        math_reward(text, gold, finished=True)


def started(args: argparse.Namespace) -> float:
    """Seconds until a new pool has judged its first answer."""
    began = time.perf_counter()
    with RewardPool(math_reward, workers=args.workers) as pool:
        pool.score([r"\boxed{\frac12}"], ["0.5"], [True])
        return time.perf_counter() - began


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Answers a CPU-second of each kind, in a pool and here."""
    kinds = {"integers": integers, "easy": easy, f"easy, 1 hostile in {ONE_HOSTILE_IN}": mixed}
    answers = {name: partial(kind, args.answers) for name, kind in kinds.items()}
    counts = {name: len(make(0)) for name, make in answers.items()}
    start = started(args)
    warm_up()
    with RewardPool(math_reward, workers=args.workers, timeout=args.timeout) as pool:
        programs = {f"{name}, pool": partial(in_pool, pool, make) for name, make in answers.items()}
        programs |= {f"{name}, here": partial(in_process, answers[name]) for name in ("integers", "easy")}
        timed = measure("rewards", programs, args.rounds)
        counters = pool.counters
    rate = {name: counts[name.rpartition(",")[0]] / of.cpu for name, of in timed.items()}
    rows = []
    for name in programs:
        here = name.replace("pool", "here")
        against = [ratio(rate[name], rate[here], here)] if here in rate and here != name else []
        rows.append(row(name, rate[name], np.max, *against))
    notes = [f"first answer of a new pool: {start:.1f} s", f"in all rounds: {counters}"]
    title = f"{args.answers} answers, {args.workers} workers, at most {args.timeout} s an answer"
    return {"title": title, "unit": "answers a CPU-second", "rows": rows, "notes": notes}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--json", type=Path, metavar="PATH", help="write the figures there too")
    add("--workers", type=int, default=os.cpu_count(), help="worker processes (default: one a core)")
    add("--answers", type=int, default=400, help="answers of each kind a round (default: 400)")
    add("--rounds", type=int, default=5, help="runs of each kind (default: 5)")
    add("--timeout", type=float, default=2.0, help="seconds an answer may take (default: 2)")
    parser.set_defaults(cores=0)  # all of them
    return parser.parse_args()


def main() -> None:
    """Runs the comparison and prints it."""
    args = parse()
    comparison = compare(args)
    print(table([comparison]))
    if args.json:
        figures = {"environment": environment(args), "comparisons": [comparison]}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
