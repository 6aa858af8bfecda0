"""What the benchmarks share: programs timed in turns within one process, ratios with intervals, a table.

CPU time is of all the process's threads. Each round runs every program once, in an order that turns from round to
round, and ratios are medians over rounds with a 95% interval.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dcjax.reporting.progress import Progress


@dataclass(frozen=True)
class Timed:
    """CPU-seconds and wall seconds of one program, and what it returned, one each a round."""

    cpu: np.ndarray
    wall: np.ndarray
    results: list


@dataclass(frozen=True)
class Elsewhere:
    """What a call in another process took (seconds)."""

    cpu: float
    wall: float


def measure(title: str, programs: Mapping[str, Callable[[int], Any]], rounds: int) -> dict[str, Timed]:
    """Calls every program with -2 and -1, which compiles it, and then once a round with the round's number."""
    names = list(programs)
    rows = {name: [] for name in names}
    with Progress(len(names) + rounds, initial=0, description=title) as progress:
        for count, name in enumerate(names, 1):
            jax.block_until_ready((programs[name](-2), programs[name](-1)))
            progress.update(count)
        for number in range(rounds):
            shift = number // 2 % len(names)
            for name in (names[shift:] + names[:shift])[:: -1 if number % 2 else 1]:
                rows[name].append(_call(programs[name], number))
            progress.update(len(names) + number + 1)
    columns = {name: list(zip(*measured, strict=True)) for name, measured in rows.items()}
    return {name: Timed(np.array(cpu), np.array(wall), list(results)) for name, (cpu, wall, results) in columns.items()}


def _call(program: Callable[[int], Any], number: int) -> tuple[float, float, Any]:
    """CPU-seconds, seconds and result of one call; what ran in another process says its own times."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = jax.block_until_ready(program(number))
    if isinstance(result, Elsewhere):
        return result.cpu, result.wall, None
    return time.process_time() - cpu, time.perf_counter() - wall, result


def ratio(ours: np.ndarray, theirs: np.ndarray, over: str, goal: str = "") -> dict[str, Any]:
    """The median over rounds of ours / theirs, with a 95% bootstrap interval."""
    ratios = ours / theirs
    resampled = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"over": over, "median": float(np.median(ratios)), "low": float(low), "high": float(high), "goal": goal}


def row(program: str, values: np.ndarray, best: Callable, *ratios: dict[str, Any]) -> dict[str, Any]:
    """A line of the table: median and best of a program over rounds, and its ratios to others."""
    return {"program": program, "median": float(np.median(values)), "best": float(best(values)), "ratios": ratios}


def table(comparisons: list[dict[str, Any]]) -> str:
    """The comparisons as lines of text."""
    lines = []
    for comparison in comparisons:
        lines.append(f"{comparison['title']}  ({comparison['unit']}: median, best)")
        for entry in comparison["rows"]:
            first, *rest = [_shown(value) for value in entry["ratios"]] or [""]
            lines.append(f"  {entry['program']:36s} {entry['median']:9.1f} {entry['best']:9.1f}   {first}".rstrip())
            lines += [f"{'':60s}{line}" for line in rest]
        lines += [f"  {note}" for note in comparison["notes"]]
    return "\n".join(lines)


def _shown(value: Mapping[str, Any]) -> str:
    goal = f"  goal {value['goal']}" if value["goal"] else ""
    return f"{value['median']:5.3f} [{value['low']:.3f}, {value['high']:.3f}] x {value['over']}{goal}"


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Versions and processor, for the JSON."""
    names = ("dcjax", "jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "versions": {name: importlib.metadata.version(name) for name in names} | {"python": platform.python_version()},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "cores_used": args.cores or os.cpu_count(),
        "rounds": args.rounds,
    }


def pin(cores: int) -> None:
    """Keeps threads that start from now on to so many cores, where the system can; 0 changes nothing."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
