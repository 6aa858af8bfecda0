"""The command line: parsing only."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dcjax.errors import RunError

RECIPES = Path("experiments")
OVERRIDE = re.compile(r"([a-z_][\w.-]*)=(.*)", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 2 for an error that the user can mend, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal without Greek shows a question mark
            stream.reconfigure(errors="replace")
    try:
        if arguments[:1] == ["train"]:
            _train(arguments[1:])
        else:
            options = _parser().parse_args(arguments)
            options.run(options)
    except RunError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("dcjax: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _fail(message: str) -> int:
    print(f"dcjax: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _import_quietly() -> None:
    """Imports the chatty libraries with their start-up messages kept off the terminal; an error still shows.

    TensorFlow, which JetStream brings along, logs from C++ before anything can be set, so the descriptor is turned.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # what Orbax logs of a failed save is raised too, and told in one line
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.stderr.flush()
    terminal = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        importlib.import_module("jetstream.engine.engine_api")
        importlib.import_module("transformers")
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RunError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dcjax", description="RL of language models whose sampling policy is not the training policy."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)

    commands.add_parser(
        "train", help="run a recipe, or resume it: dcjax train [RECIPE] [--section.field VALUE ...]", add_help=False
    )

    evaluate = commands.add_parser("evaluate", help="accuracy of both policies on held-out prompts")
    evaluate.add_argument("source", type=Path, help="a run directory, or one checkpoint in it (RUN/checkpoints/STEP)")
    evaluate.add_argument("--prompts", type=int, help="held-out prompts, one sample each (default: the run's)")
    evaluate.add_argument("--temperature", type=float, help="0 is greedy (default: the run's)")
    evaluate.add_argument("--format", help="serving format of the deployed policy (default: the run's)")
    evaluate.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    evaluate.set_defaults(run=_evaluate)

    report = commands.add_parser("report", help="draw report.png and report.html from a run's metrics")
    report.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory")
    report.set_defaults(run=_report)
    return parser


def _train(arguments: list[str]) -> None:
    recipe = "quickstart"
    if arguments and not arguments[0].startswith("-") and not OVERRIDE.fullmatch(arguments[0]):
        recipe, *arguments = arguments
    config = _override(_load_recipe(recipe), recipe, arguments)
    _import_quietly()
    from dcjax.train import train

    picture, page = train(config)
    print(f"plot:   {picture}\nreport: {page}")


def _load_recipe(recipe: str):
    """The Config of a recipe, given as a file or by the name of one in experiments/."""
    path = Path(recipe) if recipe.endswith(".py") else RECIPES / f"{recipe}.py"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.py"))) or "none here"
        raise RunError(f"no recipe {path}; give a Python file, or the name of one in {RECIPES}/: {known}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by its name
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
        config = module.config()
    except (Exception, SystemExit) as error:  # whatever the recipe's own code raises
        raise RunError(f"recipe {path}: {type(error).__name__}: {error}") from error
    from dcjax.config import Config

    if not isinstance(config, Config):
        raise RunError(
            f"recipe {path}: config() returned {type(config).__name__}; it must return a dcjax.config.Config"
        )
    return config


def _override(config, recipe: str, arguments: list[str]):
    """The recipe's Config with fields from the command line: `--section.field value` or `section.field=value`."""
    import tyro

    spelled = []
    for argument in arguments:
        match = OVERRIDE.fullmatch(argument.removeprefix("--"))
        is_value = bool(spelled) and spelled[-1].startswith("--") and not argument.startswith("--")
        spelled += [f"--{match[1]}", match[2]] if match and not is_value else [argument]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                type(config), default=config, args=spelled, use_underscores=True, prog=f"dcjax train {recipe}"
            )
    except SystemExit as stop:
        if stop.code == 0:
            raise
        raise RunError(_one_line(errors.getvalue(), recipe)) from None


def _one_line(message: str, recipe: str) -> str:
    """tyro's boxed error as one sentence: what is wrong, and the nearest field or the kind of value expected."""
    lines = [line.strip(" │|") for line in message.splitlines()]
    lines = [line for line in lines if line.strip("─-╭╮╰╯ ")]
    starts = ("Perhaps you meant", "Argument helptext", "For full helptext", "Are you sure", "Similar")
    hint = next((i for i, line in enumerate(lines) if line.startswith(starts)), len(lines))
    what = re.sub(r"^Error parsing (\S+: )?(?!--)", "", " ".join(lines[1:hint])).rstrip(".")
    fields = [line for line in lines[hint:] if line.startswith("--")]
    if fields:
        what += f"; {'perhaps you meant' if lines[hint].startswith('Perhaps') else 'expected'} {fields[0]}"
    return f"{what}; see dcjax train {recipe} --help"


def _evaluate(options: argparse.Namespace) -> None:
    _import_quietly()
    from dcjax.evaluate import evaluate_source

    results = evaluate_source(
        options.source, prompts=options.prompts, temperature=options.temperature, format=options.format
    )
    if options.json:
        print(json.dumps({"step": results.step, "policies": [dataclasses.asdict(row) for row in results.rows]}))
        return
    print(f"step {results.step}, temperature {results.temperature:g}")
    print(f"{'policy':<10}{'format':<10}{'correct':<12}{'accuracy':<10}95% interval")
    for row in results.rows:
        interval = f"{row.interval[0]:.3f} to {row.interval[1]:.3f}"
        print(f"{row.policy:<10}{row.format:<10}{f'{row.correct}/{row.total}':<12}{row.accuracy:<10.3f}{interval}")


def _report(options: argparse.Namespace) -> None:
    from dcjax.report import write_report

    try:
        picture, page = write_report(options.run_dir)
    except ValueError as error:
        raise RunError(str(error)) from error
    print(f"plot:   {picture}\nreport: {page}")
