"""`dcjax report`: draws the report of a run again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dcjax.errors import RunError


def add_parser(commands) -> None:
    """Adds the command's options."""
    parser = commands.add_parser(
        "report",
        help="draw a run's report.png and report.html again",
        description="Draws report.png and report.html in a run directory from the metrics and samples logged there.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Writes the report, and prints where it is."""
    from dcjax.loop.recipe_copy import changed_recipe
    from dcjax.reporting.run_report import write_report

    if (changed := changed_recipe(options.run_dir)) is not None:
        print(f"dcjax: {changed}", file=sys.stderr)
    try:
        picture, page = write_report(options.run_dir)
    except ValueError as error:
        raise RunError(str(error)) from error
    print(f"plot:   {picture}\nreport: {page}")
