"""`dcjax doctor`: what is installed, what is found, what is missing, and whether numbers are right."""

from __future__ import annotations

import argparse
import dataclasses
import json

from dcjax.cli.session import jax_session
from dcjax.errors import RunError


def add_parser(commands) -> None:
    """Adds the command's options."""
    parser = commands.add_parser(
        "doctor",
        help="say what is installed, found and missing here, and check the numerics",
        description="Prints versions, devices, memory, environment variables that matter and what is missing for which "
        "feature, and checks in some seconds that products, samples and log-probs are right on the first device. The "
        "exit status is 2 where they are not. Values of variables that may be secret are not shown.",
    )
    parser.add_argument("--json", action="store_true", help="print all of it as one object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Examines and checks, and prints what came of it."""
    with jax_session():
        from dcjax.sharding.mesh import start_devices
        from dcjax.tools.doctor import check_numerics, examine, lines_of

        start_devices()
        found, checks = examine(), check_numerics()
        if options.json:
            told = [dataclasses.asdict(check) | {"passed": check.passed} for check in checks]
            print(json.dumps(found | {"numerics": told}, indent=2, ensure_ascii=False))
        else:
            print("\n".join(lines_of(found, checks)))
        if wrong := [check.name for check in checks if not check.passed]:
            raise RunError(f"numbers are wrong on this machine: {'; '.join(wrong)}")
