"""Paths as users give them, on the command line and in configs: local ones, with "~" for a home directory."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from pathlib import Path
from typing import Any

# a Path has one slash where the text it was made of had two
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(/|$)")


def local_path(given: str | os.PathLike[str]) -> Path:
    """A path, "~" and "~USER" at its start being home directories.

    Raises:
      ValueError: an empty one, an address (SCHEME://...), or a home that nobody has; the message begins with "is".
    """
    text = os.fspath(given)
    if not text.strip():
        raise ValueError(f"is {text!r}; it must be a path: . is the current directory")
    if _ADDRESS.match(text):
        raise ValueError(
            f"is {text!r}; it must be a local path: mount what lies elsewhere (docs/launching.md says how), or copy it"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"is {text!r}; no such home directory is known, so it must be spelled out") from None


def localize(config: Any, section: str = "") -> None:
    """Puts `local_path` of it into each field of a frozen dataclass that holds a path, and of those within it.

    Args:
      config: an instance whose class declares these fields with Path, as in tuple[Path, ...] | None.
      section: stands before the field's name in an error.

    Raises:
      ValueError: as `local_path`, the field named.
    """
    for name, kind in typing.get_type_hints(type(config)).items():
        given = getattr(config, name)
        for part in given if isinstance(given, tuple) else (given,):
            if dataclasses.is_dataclass(part):
                localize(part, f"{section}{name}.")
        if holds_paths(kind):
            object.__setattr__(config, name, _localized(given, f"{section}{name}"))


def holds_paths(declared: Any) -> bool:
    """Whether the declaration of a field says Path, as tuple[Path, ...] | None does."""
    return declared is Path or any(map(holds_paths, typing.get_args(declared)))


def _localized(given: Any, name: str) -> Any:
    if isinstance(given, tuple):
        return tuple(_localized(item, name) for item in given)
    if not isinstance(given, str | os.PathLike):
        return given
    try:
        return local_path(given)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
