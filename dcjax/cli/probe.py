"""`dcjax probe`: where the gap between the training policy and the deployed policy comes from."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dcjax.cli.arguments import add_recipe_code_option
from dcjax.cli.session import jax_session
from dcjax.reporting.progress import format_duration
from dcjax.signals import last_words

if TYPE_CHECKING:
    from dcjax.tools.probe.source import Source


def add_parser(commands) -> None:
    """Adds the command's options."""
    parser = commands.add_parser(
        "probe",
        help="find where the gap between the two policies comes from",
        description="Samples responses from the deployed policy once, and scores the same tokens under a series of "
        "policies that leads from the trainer's to the deployed one. Of several formats each samples its own, and what "
        "is finished is printed and written before the next one begins. docs/probe.md explains the results.",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a run directory, one of its checkpoints (RUN/checkpoints/STEP), or a Hugging Face folder",
    )
    parser.add_argument(
        "--formats",
        type=_names,
        default=(),
        metavar="NAME[,NAME...]",
        help="serving formats of the deployed policy, one after another (default: the run's, or int8 for a Hugging "
        "Face folder)",
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
        help="longest response, in tokens, the end token included (default: the run's; for a Hugging Face folder 256, "
        "or less where its generation_config.json has a smaller max_new_tokens or its positions leave less behind the "
        "longest prompt)",
    )
    parser.add_argument(
        "--slots", type=int, metavar="N", help="responses decoded at once, to save memory (default: the run's, or 32)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed for sampling (default: 0)")
    parser.add_argument("--stale", type=int, metavar="STEP", help="serve the weights of the run's checkpoint at STEP")
    parser.add_argument("--out", type=Path, metavar="DIR", help="output directory (default: RUN/probe or ./probe)")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each format instead of tables")
    add_recipe_code_option(parser)
    parser.set_defaults(run=run)


def _names(text: str) -> tuple[str, ...]:
    """The names of a list with commas."""
    return tuple(name.strip() for name in text.split(","))


def run(options: argparse.Namespace) -> None:
    """Probes the source in each format, and writes and prints each result as soon as it is there."""
    started = time.monotonic()
    with jax_session():
        from dcjax.tools.probe.source import load_sources

        sources = load_sources(
            options.source,
            formats=options.formats,
            kv_cache=options.kv_cache,
            slots=options.slots,
            prompts=options.prompts,
            prompts_file=options.prompts_file,
            max_response_length=options.max_response_length,
            stale_step=options.stale,
            out=options.out,
            recipe_code=options.recipe_code,
        )
        _probe_each(sources, options, started)


def _probe_each(sources: Sequence[Source], options: argparse.Namespace, started: float) -> None:
    from dcjax.serving.formats import serving_format
    from dcjax.tools.probe.probe import Probe, probe
    from dcjax.tools.probe.tables import to_json, to_summary, to_text, write_probe

    finished: list[Probe] = []

    def summarise() -> str:
        if finished and len(sources) > 1 and not options.json:
            print(to_summary(finished), flush=True)
        return f"formats finished: {len(finished)} of {len(sources)}"

    with last_words(summarise):
        for number, source in enumerate(sources, start=1):
            if len(sources) > 1:
                name = serving_format(source.model.config.serving.format).name
                after = format_duration(time.monotonic() - started)
                print(f"format {number}/{len(sources)}: {name}, after {after}", file=sys.stderr)
            result = probe(source, seed=options.seed)
            data, picture = write_probe(result, source.out)
            finished.append(result)
            text = to_json(result) if options.json else f"{to_text(result)}\njson: {data}\nplot: {picture}"
            print(text, flush=True)
    summarise()
