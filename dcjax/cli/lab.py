"""`dcjax lab`: makes the runs of a study that are missing, and tells what follows from them."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import dcjax
from dcjax.errors import RunError
from dcjax.user_code import CodeFile, failure

if TYPE_CHECKING:
    from dcjax.tools.lab.results import Results
    from dcjax.tools.lab.runner import Runner
    from dcjax.tools.lab.study import Study

STUDY = Path("experiments/lab/study.py")
"""The study that is run where none is named."""


def add_parser(commands) -> None:
    """Adds the command's options."""
    parser = commands.add_parser(
        "lab",
        help="run a study: arms, tasks, formats and seeds, with tuned rates, twins without mismatch, and verdicts",
        description="Makes the runs of a study that are missing, several at a time, and prints the effect of each arm "
        "with its interval and verdict. A study that was stopped or killed goes on where it was by the same command. "
        "The study file is executed as Python.",
    )
    parser.add_argument(
        "study", nargs="?", type=Path, default=STUDY, metavar="STUDY", help=f"file with study() (default: {STUDY})"
    )
    parser.add_argument("--claims", nargs="+", metavar="KEY", help="of these claims alone (default: all)")
    parser.add_argument("--quick", action="store_true", help="few seeds, the middle rate, the last format, no verdicts")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="runs at a time (default: one a core)"
    )
    parser.add_argument("--results", type=Path, metavar="FILE", help="lines of JSON (default: results.jsonl beside it)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="warm starts and unfinished runs (default: runs/lab/NAME)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="say how many runs are missing, and print what there is")
    what.add_argument(
        "--check", type=int, metavar="N", help="make N finished runs again, picked at random, and compare every bit"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Runs the study, and prints the table of its effects."""
    for name in ("workers", "check"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise RunError(f"--{name} is {value}; it must be at least 1")
    study = _load(options.study)
    from dcjax.cli import main
    from dcjax.tools.lab.page import write_page
    from dcjax.tools.lab.results import Results
    from dcjax.tools.lab.runner import Runner, run_study
    from dcjax.tools.lab.schedule import count_made, total
    from dcjax.tools.lab.table import render
    from dcjax.tools.lab.verdicts import effects_of

    try:
        study = study.only(tuple(options.claims)) if options.claims else study
        results = Results(options.results or options.study.parent / "results.jsonl")
    except ValueError as error:
        raise RunError(str(error)) from None
    study = study.quick() if options.quick else study
    folder = options.out or Path("runs/lab") / study.name
    with Runner(study, folder, main, commit=_commit(), workers=options.workers) as runner:
        if options.check is not None:
            _check(study, results, runner, options.check)
            return
        if not options.dry_run:
            run_study(study, results, runner, workers=options.workers, stop=runner.stop)
    done = results.of(study)
    print(f"{count_made(study, done)} runs are made; the study has {total(study)}", file=sys.stderr)
    print(render(effects_of(study, done)))
    if not options.dry_run:
        page = write_page(folder, study, results.whole(study), command=f"dcjax lab {options.study}")
        print(f"page: {page}")


def _load(path: Path) -> Study:
    """The study of a file.

    Raises:
      RunError: the file cannot be executed, or has no study.
    """
    from dcjax.tools.lab.study import Study

    file = CodeFile.read(path)
    try:
        study = file.load().study()
    except Exception as error:
        raise RunError(failure(error, file.module_name)) from None
    if not isinstance(study, Study):
        raise RunError(f"study() of {path} returned {type(study).__name__}; it must return a Study of dcjax.tools.lab")
    return study


def _check(study: Study, results: Results, runner: Runner, count: int) -> None:
    """Makes some finished runs again.

    Raises:
      RunError: one came out otherwise, or there is none.
    """
    if not (made := results.whole(study)):
        raise RunError("there are no finished runs to check; dcjax lab without --check makes them")
    for cell in random.Random(0).sample(sorted(made), min(count, len(made))):
        again, before = runner(cell), made[cell]
        if (ours := again.made_by["start"]) != (theirs := before.made_by.get("start")):
            raise RunError(
                f"{cell.name}: its warm start is {ours}; it was {theirs}. Only the same machine makes the same bits"
            )
        for kind in ("figures", "curves"):
            ours, theirs = getattr(again, kind), getattr(before, kind)
            if differs := [name for name in theirs if ours.get(name) != theirs[name]]:
                name = differs[0]
                raise RunError(f"{cell.name}: {name} is {ours.get(name)}; it was {theirs[name]}")
        print(f"{cell.name}: the same to the bit")


def _commit() -> str:
    """Of the checkout that the code lies in, with + where its files differ from it; "" where there is none."""
    if shutil.which("git") is None:
        return ""
    git = ("git", "-C", str(Path(dcjax.__file__).parent))
    head, changed = (
        subprocess.run([*git, *arguments], capture_output=True, text=True, check=False).stdout.strip()
        for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no", "."))
    )
    return head + ("+" if changed else "")
