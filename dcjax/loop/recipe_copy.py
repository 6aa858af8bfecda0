"""The recipe that a run keeps: a copy of the file that its sections' classes come from, with its SHA-256."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dcjax.errors import RunError
from dcjax.user_code import CodeFile, file_of

COPY = "recipe.py"
"""The name of the copy in a run's directory; config.json has its SHA-256 and the path of the original."""


def recipe_for(config: Any, given: CodeFile | None) -> CodeFile | None:
    """The file that a run of this config has to keep.

    Args:
      config: of the run.
      given: the recipe, if the config was made by one.

    Raises:
      RunError: a section's class is neither in that file, nor in dcjax or an installed package.
    """
    recipe = given
    for name, section in _dataclasses("", config):
        try:
            file = file_of(type(section).__module__)
        except ValueError as error:
            raise RunError(f"{name} is a {type(section).__name__}: {error}") from None
        if file is not None and recipe is not None and file.sha256 != recipe.sha256:
            raise RunError(
                f"{name} is a {type(section).__name__} of {file.path}, which is neither the recipe, {recipe.path}, "
                "nor in an installed package; a run keeps one file, so move the class into it"
            )
        recipe = recipe or file
    return recipe


def _dataclasses(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The instances of dataclasses in a value, with their fields' names."""
    if isinstance(value, tuple):
        for item in value:
            yield from _dataclasses(name, item)
    elif dataclasses.is_dataclass(value):
        yield name, value
        for field in dataclasses.fields(value):
            yield from _dataclasses(f"{name}.{field.name}".lstrip("."), getattr(value, field.name))


def describe(recipe: CodeFile | None) -> dict[str, str] | None:
    """What config.json says of a recipe."""
    return None if recipe is None else {"path": str(recipe.path), "sha256": recipe.sha256}


def kept_recipe(directory: Path) -> CodeFile | None:
    """The copy in a run's directory; None for a run that was begun without a recipe. Nothing is executed.

    Raises:
      RunError: it is gone, or not the file that the run began with.
    """
    if (described := _described(directory)) is None:
        return None
    path = directory / COPY
    try:
        recipe = CodeFile.read(path)
    except FileNotFoundError:
        raise RunError(f"{path} is gone, which config.json names; put it back from {described['path']}") from None
    if recipe.sha256 != described["sha256"]:
        raise RunError(
            f"{path} is not the recipe that the run began with: its SHA-256 is {recipe.sha256}, and config.json has "
            f"{described['sha256']}"
        )
    return recipe


def changed_recipe(directory: Path) -> str | None:
    """One line on the file that a run's recipe was copied from, if that file has changed since; None otherwise.

    Raises:
      RunError: as `kept_recipe`.
    """
    described = _described(directory)
    try:
        now = None if described is None else CodeFile.read(Path(described["path"]))
    except OSError:
        return None
    if described is None or now is None or now.sha256 == described["sha256"]:
        return None
    return f"{now.path} has changed since this run began; the run's own settings and copy, {directory / COPY}, are used"


def _described(directory: Path) -> dict[str, str] | None:
    try:
        described = json.loads((directory / "config.json").read_text()).get("recipe")
    except (OSError, ValueError, AttributeError):
        return None
    if described is None:
        return None
    if not (isinstance(described, dict) and all(isinstance(described.get(name), str) for name in ("path", "sha256"))):
        raise RunError(f"{directory / 'config.json'} is damaged: its recipe is {described!r}")
    return described
