"""A config as plain values, as in config.json: written, read, compared."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from dcjax.paths import holds_paths, local_path
from dcjax.recipe.checks import is_frozen_dataclass
from dcjax.recipe.config import Config
from dcjax.user_code import CodeFile, find, reference_to

FREE_TO_CHANGE_ON_RESUME = (
    "run_dir",
    # read before the first step only
    "pretrained",
    "checkpoint",
    "tracking",
    "mesh",
    "rollout.engine",
    "rollout.patience",
    "self_checks",
    "serving.tensor",
    "serving.devices",
    "distributed",
    "task.data_dir",
    "reward.workers",
)
"""Fields that do not change what a run computes: it may be resumed under others."""

RENAMED = {"ahead": "async_level"}
"""Fields of earlier versions, and what they are called now."""

CLASS = "class"
"""The key beside a section's fields that names its class; no field of a dataclass can be called like this."""


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values, as in config.json; a section that may be of any class names its class."""
    return _encode(config, Config)


def _encode(value: Any, declared: Any) -> Any:
    """A plain value. A dataclass names its class where the declaration of the field does not."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):  # JSON has none
        return [_encode(item, None) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    kinds = typing.get_type_hints(type(value))
    fields = {field.name: _encode(getattr(value, field.name), kinds[field.name]) for field in dataclasses.fields(value)}
    return fields if declared is type(value) else {CLASS: reference_to(type(value))} | fields


def from_dict(nested: dict[str, Any], recipe: CodeFile | None = None, directory: Path | None = None) -> Config:
    """The Config that `to_dict` wrote.

    Args:
      nested: the plain values.
      recipe: the file in which classes of recipe:NAME are looked up; executed only if there is one.
      directory: what relative paths are relative to; None leaves them as they are.

    Raises:
      ValueError: a class that cannot be imported, an unknown field, or a value out of range.
    """
    return _Decoder(recipe, directory).dataclass(nested, Config, "")


@dataclasses.dataclass(frozen=True)
class _Decoder:
    recipe: CodeFile | None
    directory: Path | None

    def dataclass(self, nested: Any, declared: Any, name: str) -> Any:
        """An instance of the class that is named, or else of the declared one."""
        kind = self._class(nested[CLASS], name) if CLASS in nested else declared
        if not is_frozen_dataclass(kind):
            raise ValueError(f"{name} names no class")
        if is_frozen_dataclass(declared) and not issubclass(kind, declared):
            raise ValueError(f"{name} is a {kind.__name__}; it must be a {declared.__name__}")
        kinds = typing.get_type_hints(kind)
        values = {field: value for field, value in nested.items() if field != CLASS}
        if unknown := set(values) - {field.name for field in dataclasses.fields(kind)}:
            field = sorted(unknown)[0]
            now = f"; it is called {RENAMED[field]!r} now" if field in RENAMED else ""
            raise ValueError(f"{kind.__name__} has no field {field!r}{now}")
        prefix = f"{name}." if name else ""
        return kind(**{field: self.value(value, kinds[field], prefix + field) for field, value in values.items()})

    def _class(self, reference: str, name: str) -> type:
        try:
            kind = find(reference, self.recipe)
        except ValueError as error:
            raise ValueError(f"the class of {name}: {error}") from error
        if not is_frozen_dataclass(kind):
            raise ValueError(f"the class of {name}: {reference!r} is no frozen dataclass")
        return kind

    def value(self, value: Any, declared: Any, name: str) -> Any:
        """A field's value from JSON."""
        if isinstance(value, dict):
            return self.dataclass(value, declared, name)
        if isinstance(value, list):
            return tuple(self.value(item, declared, name) for item in value)
        if not (isinstance(value, str) and holds_paths(declared)):
            return value
        try:
            path = local_path(value)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        return path if self.directory is None else self.directory / path


def path_fields(value: Any, prefix: str = "") -> set[str]:
    """The names of a config's fields that hold a path, those of sections behind a dot."""
    fields = {f"{prefix}{field.name}": getattr(value, field.name) for field in dataclasses.fields(value)}
    below = (path_fields(item, f"{name}.") for name, item in fields.items() if dataclasses.is_dataclass(item))
    return {name for name, item in fields.items() if isinstance(item, Path)}.union(*below)


def classes_in(nested: Any) -> list[str]:
    """The references to classes in a config as plain values, in any order."""
    if isinstance(nested, list):
        return [reference for item in nested for reference in classes_in(item)]
    if not isinstance(nested, dict):
        return []
    own = [nested[CLASS]] if CLASS in nested else []
    return own + [reference for name, item in nested.items() if name != CLASS for reference in classes_in(item)]


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
