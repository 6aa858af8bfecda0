"""Where the time of profiled iterations went, by part."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dcjax.reporting.record import read_object

PROFILE = "profile"
"""The folder of a run directory that a profile is written into."""

TIMES = "times.json"
"""A file of that folder: `iterations`, of each its `step`, its `seconds`, the `parts` that add up to these, and what
other threads did `beside`, in seconds."""


class Part(NamedTuple):
    """A part of the work: seconds an iteration, the mean of all, and their share of the whole iteration."""

    name: str
    seconds: float
    share: float


class Times(NamedTuple):
    """The mean of some iterations, the largest part first."""

    first_step: int
    last_step: int
    # of a whole iteration
    seconds: float
    # of the thread that trains; they add up to the whole
    parts: list[Part]
    # of threads that sample meanwhile; they overlap with the parts
    beside: list[Part]


def read_times(folder: Path) -> Times:
    """The means of a `TIMES` file.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged.
    """
    path = folder / TIMES
    try:
        iterations = read_object(path)["iterations"]
        seconds = sum(iteration["seconds"] for iteration in iterations) / len(iterations)
        return Times(
            first_step=iterations[0]["step"],
            last_step=iterations[-1]["step"],
            seconds=seconds,
            parts=_means([iteration["parts"] for iteration in iterations], seconds),
            beside=_means([iteration["beside"] for iteration in iterations], seconds),
        )
    except (KeyError, TypeError, AttributeError, ZeroDivisionError, IndexError):
        raise ValueError(f"{path} holds no times of iterations") from None


def _means(iterations: list[Mapping[str, Any]], whole: float) -> list[Part]:
    seconds: dict[str, float] = defaultdict(float)
    for parts in iterations:
        for name, of_part in parts.items():
            seconds[name] += of_part / len(iterations)
    parts = [Part(name, of_part, of_part / whole) for name, of_part in seconds.items()]
    return sorted(parts, key=lambda part: -part.seconds)


def times_title(times: Times) -> str:
    """What the parts are of, in one line."""
    steps = f"step {times.first_step}"
    if times.last_step > times.first_step:
        steps = f"steps {times.first_step} to {times.last_step}, in the mean"
    return f"{times.seconds:.3f} s an iteration ({steps})"


def times_table(times: Times) -> str:
    """The table for a terminal."""
    lines = [f"where the time went: {times_title(times)}"]
    lines += [f"  {part.name:<12}{part.seconds:>10.3f} s{part.share:>8.1%}" for part in times.parts]
    if times.beside:
        lines.append("meanwhile in the thread that samples, which overlaps with these:")
        lines += [f"  {part.name:<12}{part.seconds:>10.3f} s{part.share:>8.1%}" for part in times.beside]
    return "\n".join(lines)
