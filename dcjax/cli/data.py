"""`dcjax data`: prepares local copies of the data sets, and reports what is in them."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from dcjax.cli.arguments import given_options
from dcjax.errors import RunError


def add_parser(commands) -> None:
    """Adds the command's options."""
    parser = commands.add_parser(
        "data",
        help="prepare and check local copies of DAPO-Math-17K and the benchmarks",
        description="Prepares the data sets that have a local copy in DATA_DIR. Prints how many rows were kept and "
        "dropped, which evaluation questions also occur in the training set, and which reference answers do not verify "
        "against themselves.",
    )
    parser.add_argument(
        "data_dir", type=Path, metavar="DATA_DIR", help="directory with the local copies; docs/data.md describes it"
    )
    parser.add_argument("--names", nargs="+", metavar="NAME", help="data sets to prepare (default: all)")
    parser.add_argument(
        "--download", action="store_true", help="download data sets that have no local copy from the Hugging Face Hub"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prepares the data sets, and prints the report."""
    from dcjax.data.prepare import prepare_data

    try:
        report = prepare_data(options.data_dir, **given_options(options, "names"), download=options.download)
    except ValueError as error:
        raise RunError(str(error)) from None
    print(json.dumps(dataclasses.asdict(report)) if options.json else report)
