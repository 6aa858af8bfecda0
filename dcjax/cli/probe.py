"""`dcjax probe`: where the gap between the training policy and the deployed policy comes from."""

from __future__ import annotations

import argparse
from pathlib import Path

from dcjax.cli.arguments import add_recipe_code_option
from dcjax.cli.session import jax_session


def add_parser(commands) -> None:
    """Adds the command's options."""
    parser = commands.add_parser(
        "probe",
        help="find where the gap between the two policies comes from",
        description="Samples responses from the deployed policy once, and scores the same tokens under a series of "
        "policies that leads from the trainer's to the deployed one. docs/probe.md explains the results.",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a run directory, one of its checkpoints (RUN/checkpoints/STEP), or a Hugging Face folder",
    )
    parser.add_argument(
        "--format", help="serving format of the deployed policy (default: the run's, or int8 for a Hugging Face folder)"
    )
    parser.add_argument("--kv-cache", help="storage format of the deployed policy's KV cache (default: the run's)")
    parser.add_argument(
        "--prompts", type=int, metavar="N", help="number of prompts, with one response each (default: 128)"
    )
    parser.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help='prompts for a Hugging Face folder: one per line, plain text or JSON like {"prompt": "..."}',
    )
    parser.add_argument(
        "--max-response-length",
        type=int,
        metavar="N",
        help="longest response, in tokens, the end token included (default: the run's; 48 for a Hugging Face folder)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed for sampling (default: 0)")
    parser.add_argument("--stale", type=int, metavar="STEP", help="serve the weights of the run's checkpoint at STEP")
    parser.add_argument("--out", type=Path, metavar="DIR", help="output directory (default: RUN/probe or ./probe)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    add_recipe_code_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Probes the source, writes the result and prints it."""
    with jax_session():
        from dcjax.tools.probe.probe import probe
        from dcjax.tools.probe.source import load_source
        from dcjax.tools.probe.tables import to_json, to_text, write_probe

        source = load_source(
            options.source,
            format=options.format,
            kv_cache=options.kv_cache,
            prompts=options.prompts,
            prompts_file=options.prompts_file,
            max_response_length=options.max_response_length,
            stale_step=options.stale,
            out=options.out,
            recipe_code=options.recipe_code,
        )
        result = probe(source, seed=options.seed)
    data, picture = write_probe(result, source.out)
    print(to_json(result) if options.json else f"{to_text(result)}\njson: {data}\nplot: {picture}")
