"""Paths as users give them, on the command line and in configs: local ones, with "~" for a home directory."""

from __future__ import annotations

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
        raise ValueError(f"is {text!r}; it must be a local path: mount what lies elsewhere, or copy it")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"is {text!r}; no such home directory is known, so it must be spelled out") from None


def localize(config: Any, section: str = "") -> None:
    """Puts `local_path` of it into each field of a frozen dataclass that holds a path; for its `__post_init__`.

    Args:
      config: an instance whose class declares these fields as Path, or Path | None.
      section: stands before the field's name in an error.

    Raises:
      ValueError: as `local_path`, the field named.
    """
    for name, kind in typing.get_type_hints(type(config)).items():
        if Path in (kind, *typing.get_args(kind)) and (given := getattr(config, name)) is not None:
            try:
                object.__setattr__(config, name, local_path(given))
            except ValueError as error:
                raise ValueError(f"{section}{name} {error}") from None
