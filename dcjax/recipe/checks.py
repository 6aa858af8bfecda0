"""Checks that the sections of a recipe make of their fields when they are built."""

from __future__ import annotations

import math
import typing
from typing import Any


def is_frozen_dataclass(kind: Any) -> bool:
    """Whether a class is a dataclass whose instances are frozen, and equal where their fields are."""
    parameters = getattr(kind, "__dataclass_params__", None)
    return isinstance(kind, type) and parameters is not None and parameters.frozen and parameters.eq


def require(section: str, config: Any, at_least: dict[str, float]) -> None:
    """Raises ValueError for the first field below its bound, or not a finite number."""
    for name, bound in at_least.items():
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= bound):
            raise ValueError(f"{section}{name} is {value}; it must be at least {bound}")


def require_choice(section: str, config: Any, name: str) -> None:
    """Raises ValueError for a word that is not one of the field's Literal, in the nearest class that has one."""
    hints = (typing.get_type_hints(kind).get(name) for kind in type(config).__mro__)
    choices = next(args for hint in hints if (args := typing.get_args(hint)))
    if (value := getattr(config, name)) not in choices:
        raise ValueError(f"{section}{name} is {value!r}; it must be one of {', '.join(choices)}")
