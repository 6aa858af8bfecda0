"""A config as plain values, as in config.json: written, read, compared."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from dcjax.recipe.config import Config

FREE_TO_CHANGE_ON_RESUME = (
    "run_dir",
    "checkpoint",
    "mesh",
    "serving.tensor",
    "serving.devices",
    "distributed",
    "task.data_dir",
    "reward.workers",
)
"""Fields that do not change what a run computes: it may be resumed under others."""

RENAMED = {"ahead": "async_level"}
"""Fields of earlier versions, and what they are called now."""


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values, as in config.json."""

    def plain(value):
        if isinstance(value, Path):
            return str(value)
        # JSON has no tuples
        return list(value) if isinstance(value, tuple) else value

    def convert(items):
        return {name: plain(value) for name, value in items}

    return dataclasses.asdict(config, dict_factory=convert)


def from_dict(nested: dict[str, Any], kind: type = Config) -> Any:
    """The Config that `to_dict` wrote.

    Raises:
      ValueError: an unknown field, or a value out of range.
    """
    kinds = typing.get_type_hints(kind)
    if unknown := set(nested) - set(kinds):
        name = sorted(unknown)[0]
        now = f"; it is called {RENAMED[name]!r} now" if name in RENAMED else ""
        raise ValueError(f"{kind.__name__} has no field {name!r}{now}")

    def convert(name: str, value: Any) -> Any:
        choices = typing.get_args(kinds[name]) or (kinds[name],)
        if dataclasses.is_dataclass(choices[0]):
            # of several sections the one that has all these fields; the first where none has
            fits = [choice for choice in choices if set(value) <= set(typing.get_type_hints(choice))]
            return from_dict(value, (fits or choices)[0])
        return tuple(value) if isinstance(value, list) else value

    return kind(**{name: convert(name, value) for name, value in nested.items()})


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for name, value in nested.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields in which two `to_dict`s describe different runs: name -> (ours, theirs)."""
    ours, theirs = flatten(ours), flatten(theirs)
    names = [name for name in ours | theirs if not {name, name.split(".")[0]} & set(FREE_TO_CHANGE_ON_RESUME)]
    pairs = {name: (ours.get(name), theirs.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
