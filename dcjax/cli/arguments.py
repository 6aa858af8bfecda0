"""What the parsers of all commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dcjax.errors import RunError
from dcjax.paths import local_path

NO_CACHE_FLAG = "--no-compilation-cache"
NO_CACHE_HELP = f"With {NO_CACHE_FLAG}, any command compiles its programs again and does not store them."


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `RunError` for a wrong command line, and reads each `Path` by `local_path`."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.register("type", Path, _parse_path)

    def error(self, message: str) -> NoReturn:
        raise RunError(f"{message}; see {self.prog} --help")


def _parse_path(text: str) -> Path:
    try:
        return local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"it {error}") from None


NO_RECIPE_CODE_FLAG = "--no-recipe-code"
NO_RECIPE_CODE_HELP = "refuse a run whose sections are defined outside dcjax, rather than execute their code"


def add_recipe_code_option(parser: argparse.ArgumentParser) -> None:
    """Adds --no-recipe-code, for a command that opens runs; the option's value is called `recipe_code`."""
    parser.add_argument(NO_RECIPE_CODE_FLAG, dest="recipe_code", action="store_false", help=NO_RECIPE_CODE_HELP)


def given_options(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the named options that the user gave, by name."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def reject_options(options: argparse.Namespace, names: Sequence[str], reason: str) -> None:
    """Raises RunError if the user gave any of the named options; `reason` follows "it" in the message."""
    for name, value in given_options(options, *names).items():
        raise RunError(f"--{name.replace('_', '-')} is {value}; it {reason}")
