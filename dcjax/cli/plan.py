"""`dcjax plan`: a run on chips that one does not have: whether it fits, what bounds it, what it costs."""

from __future__ import annotations

import argparse
import os
import sys

from dcjax.cli.session import jax_session
from dcjax.cli.train import config_of
from dcjax.errors import RunError


class DoesNotFit(RunError):
    """A plan that does not fit in memory."""

    status = 3


def add_parser(commands) -> None:
    """Adds the command's options; what it does not know are the recipe's fields."""
    parser = commands.add_parser(
        "plan",
        help="compile a run for a TPU slice that is not there, or estimate it for GPUs: does it fit, what bounds it",
        usage="dcjax plan RECIPE --topology v5p:4x4x4 [options] [section.field=value ...]",
        description="Compiles the programs of a run for a slice, on any x86-64 Linux machine with libtpu, and reckons "
        "from them what each holds, what bounds it, and what an iteration takes at least. For GPUs all is "
        "estimated by hand, and nothing compiled. docs/plan.md explains the figures. The exit status is 3 if the run "
        "does not fit.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe or a run, as dcjax train takes it")
    parser.add_argument(
        "--topology",
        required=True,
        metavar="KIND:SHAPE",
        help="a slice: v5e:4x4, v5p:4x4x4, v6e:8x8, tpu7x:4x4x4; or GPUs, in nodes of 8: a100:16, h100:16, h200:16, "
        "b200:16",
    )
    parser.add_argument(
        "--mean-response-length", type=float, metavar="TOKENS", help="of a response (default: half of the longest)"
    )
    parser.add_argument("--price", type=float, metavar="MONEY", help="of a chip-hour, for what the run costs at least")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of tables")
    parser.set_defaults(run=run, takes_fields=True)


def run(options: argparse.Namespace) -> None:
    """Plans the recipe, and prints the plan."""
    # nothing is computed, so that no accelerator need be taken
    os.environ["JAX_PLATFORMS"] = "cpu"
    config, _ = config_of([options.recipe, *options.fields])
    mean, longest = options.mean_response_length, config.rollout.max_response_length
    if mean is not None and not 1 <= mean <= longest:
        raise RunError(f"--mean-response-length is {mean:g}; it must lie within [1, {longest}]")
    with jax_session():
        from dcjax.tools.plan.plan import make_plan
        from dcjax.tools.plan.search import nearest_that_fits
        from dcjax.tools.plan.tables import to_json, to_text

        def told(line: str) -> None:
            print(f"planning: {line}", file=sys.stderr, flush=True)

        plan = make_plan(config, options.topology, mean_response=mean, told=told)
        print(to_json(plan, options.price) if options.json else to_text(plan, options.price))
        if not plan.fits:
            changes = nearest_that_fits(config, options.topology, plan, told)
            advice = f"this fits: {' '.join(changes)}" if changes else "no smaller setting that was tried fits either"
            raise DoesNotFit(f"{options.recipe} does not fit on {options.topology}; {advice}")
