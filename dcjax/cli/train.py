"""`dcjax train`: runs a recipe, its fields overridden by the command line, or resumes its run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import logging
import operator
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dcjax
from dcjax.cli.arguments import NO_CACHE_HELP, NO_RECIPE_CODE_FLAG, NO_RECIPE_CODE_HELP
from dcjax.cli.session import jax_session, leave_on_failure
from dcjax.errors import RunError
from dcjax.paths import local_path
from dcjax.user_code import CodeFile, failure, failures_of_files

if TYPE_CHECKING:
    from dcjax.recipe.config import Config

RECIPES = Path("experiments")
"""Where recipes are found by name in the working directory, before those of the package, `dcjax.recipes`."""
DEFAULT_RECIPE = "quickstart"
TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
"""What a field that is on or off may be set to."""
ASSIGNMENT = re.compile(r"([a-z_][\w.-]*)=(.*)", re.DOTALL)
"""An override spelled `section.field=value`."""
PROFILE_FLAG = "--profile"
PROFILE_HELP = (
    f"{PROFILE_FLAG} STEPS: trace the first STEPS iterations into RUN/profile, and tell where their time went"
)
TRIAL_FLAG = "--trial"
TRIAL_HELP = (
    f"{TRIAL_FLAG}: shrink what is not given to minutes on this machine, say what changed, and write to NAME-trial"
)
BEFORE_TRIAL = ("pretrained", "task.data_dir", "task.dataset", "task.heldout", "distributed.")
"""How overrides begin that say what there is for a trial to use; the others are of what it makes of the recipe."""


def add_parser(commands) -> None:
    """Lists the command in `dcjax --help`; `run` parses its arguments."""
    commands.add_parser(
        "train",
        help="run a recipe or resume a run: dcjax train [RECIPE or RUN] [--section.field VALUE ...]",
        add_help=False,
    )


def run(arguments: list[str]) -> None:
    """Trains by the recipe or resumes the run that the arguments name, with the fields that the others override."""
    profile, arguments = _without_profile(arguments)
    others = [argument for argument in arguments if argument != TRIAL_FLAG]
    # a trial counts devices, for which JAX is set up first
    found = config_of(others) if others == arguments else None
    with leave_on_failure("train"), jax_session(), _log_to_stderr():
        config, recipe = found or _trial_of(others)
        # before the rest is imported, which takes seconds
        from dcjax.loop.early import refuse_early

        refuse_early(config, recipe)
        from dcjax.loop.train import train

        report_paths = train(config, recipe, profile=profile)
    # Only the first process of several writes the report.
    if report_paths is not None:
        picture, page = report_paths
        print(f"plot:   {picture}\nreport: {page}")


def config_of(arguments: list[str]) -> tuple[Config, CodeFile | None]:
    """The config of the recipe or run that arguments name, with the fields that the others override, and its file.

    Raises:
      RunError: there is none, or an override does not fit.
    """
    source, path, arguments, recipe_code = _source_of(arguments)
    if (path / "config.json").is_file():
        return _resumed(path, source, arguments, recipe_code)
    return _begun(_find_recipe(path, source, recipe_code), source, arguments)


def _source_of(arguments: list[str]) -> tuple[str, Path, list[str], bool]:
    """The recipe or run that is named, its path if it is one, the overrides, and whether its code may be executed.

    Raises:
      RunError: it is a path that cannot be used.
    """
    recipe_code = NO_RECIPE_CODE_FLAG not in arguments
    arguments = [argument for argument in arguments if argument != NO_RECIPE_CODE_FLAG]
    source = DEFAULT_RECIPE
    if arguments and not arguments[0].startswith("-") and not ASSIGNMENT.fullmatch(arguments[0]):
        source, *arguments = arguments
    try:
        return source, local_path(source), arguments, recipe_code
    except ValueError as error:
        raise RunError(f"the recipe {error}") from None


def _trial_of(arguments: list[str]) -> tuple[Config, CodeFile]:
    """The config of a trial of a recipe, and its file; says what is smaller than in the recipe.

    Raises:
      RunError: as `config_of`; it is a run; or its model is given, and does not fit.
    """
    source, path, arguments, recipe_code = _source_of(arguments)
    if (path / "config.json").is_file():
        raise RunError(f"{TRIAL_FLAG} is given, and {source} is a run; give the recipe that it was started from")
    recipe = _find_recipe(path, source, recipe_code)
    # before the rest is imported, which takes seconds
    given = _call_recipe(recipe)
    from dcjax.cli.trial import announce, in_own_directory, look
    from dcjax.recipe.architecture import with_pretrained_model
    from dcjax.recipe.trial import check_fits, shrink

    if first := _before_trial(_as_flags(arguments)):
        given = _override_fields(given, source, first)
    available = look(given)
    shrunk = shrink(given, available)
    config = with_pretrained_model(_override_fields(shrunk, source, arguments))
    check_fits(config, available)
    config = in_own_directory(config, recipe)
    announce(given, shrunk, config)
    return config, recipe


def _before_trial(flags: list[str]) -> list[str]:
    """The overrides of `BEFORE_TRIAL` among flags, each of which has one value."""
    names = tuple(f"__{name}" for name in BEFORE_TRIAL)
    pairs = (pair for pair in itertools.pairwise(flags) if pair[0].replace("-", "_").startswith(names))
    return list(itertools.chain.from_iterable(pairs))


def _without_profile(arguments: list[str]) -> tuple[int | None, list[str]]:
    """How many iterations are to be profiled, None where the option is not given; and the other arguments.

    Raises:
      RunError: it is no whole number from 1.
    """
    others, steps = [], None
    given = iter(arguments)
    for argument in given:
        flag, is_joined, value = argument.partition("=")
        if flag != PROFILE_FLAG:
            others.append(argument)
            continue
        value = value if is_joined else next(given, "")
        if not (value.isdecimal() and int(value) >= 1):
            raise RunError(f"{PROFILE_FLAG} is {value!r}; it must be a number of iterations, at least 1")
        steps = int(value)
    return steps, others


def _begun(recipe: CodeFile, source: str, arguments: list[str]) -> tuple[Config, CodeFile | None]:
    """The config of a recipe, and its file; of a run that it began and that it has changed since, the run's own."""
    config = _override_fields(_call_recipe(recipe), source, arguments)
    from dcjax.loop.recipe_copy import changed_recipe, kept_recipe

    directory = config.directory
    kept = kept_recipe(directory)
    if kept is None or kept.sha256 == recipe.sha256 or changed_recipe(directory) is None:
        return config, recipe
    return _resumed(directory, source, arguments, recipe_code=True)


def _resumed(directory: Path, source: str, arguments: list[str], recipe_code: bool) -> tuple[Config, CodeFile | None]:
    """The config of a run that was begun, and the file that it keeps."""
    from dcjax.loop.recipe_copy import kept_recipe
    from dcjax.loop.run_directory import load_config

    config = dataclasses.replace(load_config(directory, recipe_code=recipe_code), run_dir=directory)
    return _override_fields(config, source, arguments), kept_recipe(directory)


def _find_recipe(path: Path, source: str, recipe_code: bool) -> CodeFile:
    """The recipe that is given as a Python file, or as the name of one in `RECIPES`.

    Raises:
      RunError: there is none, or its code must not be executed.
    """
    if not recipe_code:
        raise RunError(f"{NO_RECIPE_CODE_FLAG} is given; {source} is a recipe, which is code: give a run directory")
    folders = (RECIPES, Path(dcjax.__file__).parent / "recipes")
    paths = [path] if source.endswith(".py") else [folder / f"{source}.py" for folder in folders]
    if found := next((path for path in paths if path.is_file()), None):
        return CodeFile.read(found)
    # other files there are scripts, which define no config()
    files = (file for folder in folders for file in folder.glob("*.py"))
    recipes = {file.stem for file in files if "def config(" in file.read_text()}
    known = ", ".join(sorted(recipes)) or "there are none here"
    raise RunError(f"no recipe {paths[0]}; give a Python file, a run directory, or a name: {known}")


def _call_recipe(recipe: CodeFile) -> Config:
    """What the `config()` of a recipe returns."""
    try:
        config = recipe.load().config()
    except (Exception, SystemExit) as error:  # The recipe's own code may raise anything.
        raise RunError(f"recipe {recipe.path}: {failure(error, recipe.module_name)}") from error
    from dcjax.recipe.config import Config

    if not isinstance(config, Config):
        raise RunError(
            f"recipe {recipe.path}: config() returned {type(config).__name__}; it must return a "
            "dcjax.recipe.config.Config"
        )
    return config


def _override_fields(config: Config, source: str, arguments: list[str]) -> Config:
    """Sets fields of a Config that are given as `--section.field value` or as `section.field=value`."""
    import tyro

    flags = _without_truth_values(_as_flags(arguments), config)
    errors = io.StringIO()
    originals: dict[type, type] = {}
    restated = _restated(config, originals)
    try:
        with contextlib.redirect_stderr(errors), _unparsed_paths(), failures_of_files():
            overridden = tyro.cli(
                type(restated),
                default=restated,
                args=flags,
                use_underscores=True,
                prog=f"dcjax train {source}",
                description=f"{type(config).__doc__} {NO_CACHE_HELP} {NO_RECIPE_CODE_FLAG}: {NO_RECIPE_CODE_HELP}. "
                f"{PROFILE_HELP}. {TRIAL_HELP}.",
            )
            return _original(overridden, originals)
    except SystemExit as exit:
        if exit.code == 0:
            raise
        raise RunError(f"{_summarize_tyro_error(errors.getvalue())}; see dcjax train {source} --help") from None
    except (BrokenPipeError, RunError):
        raise
    except Exception as error:  # A section of an installed package may raise anything.
        raise RunError(f"{source}: {type(error).__name__}: {error}") from error


def _as_flags(arguments: list[str]) -> list[str]:
    """The arguments with `section.field=value` in its other spelling, `--section.field value`."""
    flags: list[str] = []
    for argument in arguments:
        assignment = ASSIGNMENT.fullmatch(argument.removeprefix("--"))
        is_value = bool(flags) and flags[-1].startswith("--") and not argument.startswith("--")
        flags += [f"--{assignment[1]}", assignment[2]] if assignment and not is_value else [argument]
    return flags


def _without_truth_values(flags: list[str], config: Config) -> list[str]:
    """The flags with `--section.field true` as `--section.field`, and with false as `--section.no_field`, for tyro.

    Raises:
      RunError: the value of such a field is neither true nor false.
    """
    spelled: list[str] = []
    values = iter(flags)
    for flag, following in itertools.zip_longest(values, flags[1:]):
        *sections, name = flag.removeprefix("--").replace("-", "_").split(".")
        field = functools.reduce(lambda section, part: getattr(section, part, None), [*sections, name], config)
        if not (flag.startswith("--") and isinstance(field, bool)) or following is None or following.startswith("--"):
            spelled.append(flag)
            continue
        next(values)
        if following.lower() not in TRUTH:
            raise RunError(f"{'.'.join([*sections, name])} is {following!r}; it must be true or false")
        spelled.append(f"--{'.'.join([*sections, name if TRUTH[following.lower()] else f'no_{name}'])}")
    return spelled


def _restated(value: Any, originals: dict[type, type]) -> Any:
    """A section whose class declares each field with the class that its value has, so that all fields can be set.

    Args:
      value: the section; it is returned itself where its own class says so already.
      originals: takes the section's class, by the class that restates it.
    """
    declared = typing.get_type_hints(type(value))
    items = {
        name: _restated(item, originals) if dataclasses.is_dataclass(item) else item
        for name, item in _fields_of(value).items()
    }
    kinds = {name: _kind_of(item, declared[name]) for name, item in items.items()}
    if all(kinds[name] == declared[name] for name in items):
        return value
    fields = [(name, kind, dataclasses.field(default=items[name])) for name, kind in kinds.items()]
    restated = dataclasses.make_dataclass(type(value).__name__, fields, bases=(type(value),), frozen=True)
    originals[restated] = type(value)
    return restated(**items)


def _original(value: Any, originals: dict[type, type]) -> Any:
    """A section of the class that `_restated` restated, and what it holds likewise."""
    if not dataclasses.is_dataclass(value):
        return value
    fields = {name: _original(item, originals) for name, item in _fields_of(value).items()}
    return originals.get(type(value), type(value))(**fields)


def _kind_of(value: Any, declared: Any) -> Any:
    """What a field is declared as: its value's class, if that is a dataclass; else without such alternatives."""
    if dataclasses.is_dataclass(value):
        return type(value)
    plain = tuple(kind for kind in typing.get_args(declared) if not dataclasses.is_dataclass(kind))
    is_union = typing.get_origin(declared) in (typing.Union, types.UnionType)
    return functools.reduce(operator.or_, plain) if is_union else declared


def _fields_of(section: Any) -> dict[str, Any]:
    return {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}


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
