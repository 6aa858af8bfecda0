"""`dcjax train`: runs a recipe, its fields overridden by the command line, or resumes its run."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dcjax.cli.arguments import NO_CACHE_HELP
from dcjax.cli.session import jax_session, leave_on_failure
from dcjax.errors import RunError
from dcjax.paths import local_path

if TYPE_CHECKING:
    from dcjax.recipe.config import Config

RECIPES = Path("experiments")
DEFAULT_RECIPE = "quickstart"
ASSIGNMENT = re.compile(r"([a-z_][\w.-]*)=(.*)", re.DOTALL)
"""An override spelled `section.field=value`."""


def add_parser(commands) -> None:
    """Lists the command in `dcjax --help`; `run` parses its arguments."""
    commands.add_parser(
        "train", help="run or resume a recipe: dcjax train [RECIPE] [--section.field VALUE ...]", add_help=False
    )


def run(arguments: list[str]) -> None:
    """Trains by the recipe that the arguments name, if any, with the fields that the others override."""
    recipe = DEFAULT_RECIPE
    if arguments and not arguments[0].startswith("-") and not ASSIGNMENT.fullmatch(arguments[0]):
        recipe, *arguments = arguments
    config = _override_fields(_load_recipe(recipe), recipe, arguments)
    with jax_session(), _log_to_stderr(), leave_on_failure("train"):
        from dcjax.loop.train import train

        report_paths = train(config)
    # Only the first process of several writes the report.
    if report_paths is not None:
        picture, page = report_paths
        print(f"plot:   {picture}\nreport: {page}")


def _load_recipe(recipe: str) -> Config:
    """Calls the `config()` of a recipe, given as a Python file or as the name of one in `RECIPES`."""
    try:
        given = local_path(recipe)
    except ValueError as error:
        raise RunError(f"the recipe {error}") from None
    path = given if recipe.endswith(".py") else RECIPES / f"{recipe}.py"
    if not path.is_file():
        # The other experiments are scripts, which define no config().
        recipes = (file.stem for file in RECIPES.glob("*.py") if "def config(" in file.read_text())
        known = ", ".join(sorted(recipes)) or "there are none here"
        raise RunError(f"no recipe {path}; give a Python file, or the name of one in {RECIPES}/: {known}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass that the recipe defines looks up its module by name.
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
        config = module.config()
    except (Exception, SystemExit) as error:  # The recipe's own code may raise anything.
        raise RunError(f"recipe {path}: {type(error).__name__}: {error}") from error
    from dcjax.recipe.config import Config

    if not isinstance(config, Config):
        raise RunError(
            f"recipe {path}: config() returned {type(config).__name__}; it must return a dcjax.recipe.config.Config"
        )
    return config


def _override_fields(config: Config, recipe: str, arguments: list[str]) -> Config:
    """Sets fields of a recipe's Config that are given as `--section.field value` or as `section.field=value`."""
    import tyro

    flags: list[str] = []
    for argument in arguments:
        assignment = ASSIGNMENT.fullmatch(argument.removeprefix("--"))
        is_value = bool(flags) and flags[-1].startswith("--") and not argument.startswith("--")
        flags += [f"--{assignment[1]}", assignment[2]] if assignment and not is_value else [argument]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), _unparsed_paths():
            return tyro.cli(
                type(config),
                default=config,
                # A section that has several kinds, such as the task, keeps the recipe's kind.
                config=(tyro.conf.AvoidSubcommands,),
                args=flags,
                use_underscores=True,
                prog=f"dcjax train {recipe}",
                description=f"{type(config).__doc__} {NO_CACHE_HELP}",
            )
    except BrokenPipeError:
        # Only the help is printed here, and its reader, `head` for example, has closed the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except SystemExit as exit:
        if exit.code == 0:
            raise
        raise RunError(f"{_summarize_tyro_error(errors.getvalue())}; see dcjax train {recipe} --help") from None


def _unparsed_paths():
    """A context in which tyro leaves a field of type Path the text it was given: it would turn "" into Path(".")."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def path_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[str | Path] | None:
        if info.type is not Path:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda given: given[0],
            is_instance=lambda value: isinstance(value, str | Path),
            str_from_instance=lambda path: [str(path)],
        )

    return registry


def _summarize_tyro_error(message: str) -> str:
    """tyro's boxed error as one clause: what is wrong, and the nearest field or the kind of value expected."""
    lines = [line.strip(" │|") for line in message.splitlines()]
    lines = [line for line in lines if line.strip("─-╭╮╰╯ ")]
    hint_starts = ("Perhaps you meant", "Argument helptext", "For full helptext", "Are you sure", "Similar")
    hint_at = next((i for i, line in enumerate(lines) if line.startswith(hint_starts)), len(lines))
    problem = re.sub(r"^Error parsing (\S+: )?(?!--)", "", " ".join(lines[1:hint_at])).rstrip(".")
    fields = [line for line in lines[hint_at:] if line.startswith("--")]
    if not fields:
        return problem
    return f"{problem}; {'perhaps you meant' if lines[hint_at].startswith('Perhaps') else 'expected'} {fields[0]}"


@contextlib.contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Prints the package's log records on standard error, in the first process only."""
    from dcjax.sharding.hosts import is_main

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("dcjax: %(message)s"))
    handler.addFilter(lambda record: is_main())
    logger = logging.getLogger("dcjax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # If a library gave the root logger a handler, every record would be printed twice.
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
