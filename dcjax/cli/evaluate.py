"""`dcjax evaluate`: accuracies on a run's held-out prompts or, with --suite, on the papers' benchmarks."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from dcjax.cli.arguments import add_recipe_code_option, given_options, reject_options
from dcjax.cli.session import jax_session, leave_on_failure
from dcjax.errors import RunError

SAMPLING_OPTIONS = ("samples", "problems", "max_response_length", "template", "thinking", "answer_start", "seed")
HOST_OPTIONS = ("coordinator", "num_processes", "process_id")
SUITE_ONLY_OPTIONS = ("data_dir", *SAMPLING_OPTIONS, "slots", "devices", "against", "out", *HOST_OPTIONS)


def add_parser(commands) -> None:
    """Adds the command's options, those of a suite in a group of their own."""
    parser = commands.add_parser(
        "evaluate",
        help="measure both policies' accuracy on held-out prompts or on the papers' benchmarks",
        description="Samples one response to each of a run's held-out prompts. With --suite, samples many responses to "
        "each problem of several benchmarks, from a run or from a Hugging Face folder. docs/evaluation.md explains the "
        "results.",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a run directory, one of its checkpoints (RUN/checkpoints/STEP) or, with --suite, a Hugging Face folder",
    )
    parser.add_argument("--prompts", type=int, metavar="N", help="number of held-out prompts (default: the run's)")
    parser.add_argument(
        "--temperature", type=float, help="sampling temperature; 0 is greedy (default: the run's, or 0.7 with --suite)"
    )
    parser.add_argument(
        "--format", help="serving format of the deployed policy (default: the run's, or int8 for a Hugging Face folder)"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    add_recipe_code_option(parser)
    parser.set_defaults(run=run)

    suite = parser.add_argument_group(
        "suite", "An interrupted suite continues where it stopped when the same command is run again."
    )
    suite.add_argument(
        "--suite",
        metavar="NAME",
        help="the benchmarks: paper is AIME24, AIME25, AMC23, MATH-500, Minerva and OlympiadBench",
    )
    suite.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="directory with local copies of the benchmarks (default: data)"
    )
    suite.add_argument(
        "--samples", type=int, metavar="K", help="samples per problem (default: 32 or 4, as in the papers)"
    )
    suite.add_argument(
        "--problems", type=int, metavar="N", help="use the first N problems of each benchmark (default: all)"
    )
    suite.add_argument(
        "--max-response-length", type=int, metavar="TOKENS", help="longest response in tokens (default: 32768)"
    )
    suite.add_argument(
        "--template", help="prompt template, boxed or dapo (default: the one the run was trained with, otherwise boxed)"
    )
    suite.add_argument(
        "--thinking", help="tell the chat template enable_thinking: on, off or auto (default: as trained, or auto)"
    )
    suite.add_argument(
        "--answer-start", metavar="TEXT", help="text that each answer begins with (default: as trained, or none)"
    )
    suite.add_argument("--seed", type=int, help="random seed for sampling (default: 0)")
    suite.add_argument("--slots", type=int, metavar="N", help="samples decoded at once (default: the run's, or 32)")
    suite.add_argument(
        "--devices", type=int, metavar="N", help="devices that share the model and the samples (default: 1)"
    )
    suite.add_argument(
        "--against", type=Path, metavar="RESULT", help="an earlier result, or its directory, to compare with"
    )
    suite.add_argument(
        "--out", type=Path, metavar="DIR", help="output directory (default: RUN/suite/STEP or ./suite/NAME)"
    )
    suite.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of process 0, if the hosts cannot be detected"
    )
    suite.add_argument("--num-processes", type=int, metavar="N", help="number of processes")
    suite.add_argument("--process-id", type=int, metavar="N", help="number of this process, from 0")


def run(options: argparse.Namespace) -> None:
    """Evaluates what the options ask for, and prints the result."""
    if options.suite is None:
        reject_options(options, SUITE_ONLY_OPTIONS, "needs --suite")
        with jax_session():
            _evaluate_heldout_prompts(options)
    else:
        reject_options(
            options,
            ("prompts",),
            "counts held-out prompts, which a suite does not use; limit its problems by --problems",
        )
        with leave_on_failure("evaluate"), jax_session():
            _evaluate_suite(options)


def _evaluate_heldout_prompts(options: argparse.Namespace) -> None:
    from dcjax.tools.evaluate import evaluate_source

    results = evaluate_source(
        options.source,
        prompts=options.prompts,
        temperature=options.temperature,
        format=options.format,
        recipe_code=options.recipe_code,
    )
    if options.json:
        print(json.dumps({"step": results.step, "policies": [dataclasses.asdict(row) for row in results.rows]}))
        return
    print(f"step {results.step}, temperature {results.temperature:g}")
    print(f"{'policy':<14}{'format':<10}{'correct':<12}{'accuracy':<10}95% interval")
    for row in results.rows:
        interval = f"{row.interval[0]:.3f} to {row.interval[1]:.3f}"
        print(f"{row.policy:<14}{row.format:<10}{f'{row.correct}/{row.total}':<12}{row.accuracy:<10.3f}{interval}")


def _evaluate_suite(options: argparse.Namespace) -> None:
    from dcjax.sharding.hosts import DistributedConfig
    from dcjax.tools.suite.benchmarks import SuiteConfig
    from dcjax.tools.suite.result import read_result, to_json
    from dcjax.tools.suite.suite import evaluate_suite
    from dcjax.tools.suite.tables import to_markdown, write_result

    against = None if options.against is None else read_result(options.against)
    try:
        distributed = DistributedConfig(**given_options(options, *HOST_OPTIONS))
    except ValueError as error:
        raise RunError(str(error)) from None
    evaluated = evaluate_suite(
        options.source,
        SuiteConfig(**given_options(options, "suite", "temperature", *SAMPLING_OPTIONS)),
        data_dir=options.data_dir or Path("data"),
        distributed=distributed,
        recipe_code=options.recipe_code,
        **given_options(options, "out", "devices", "format", "slots"),
    )
    # Only the first process of several has the result.
    if evaluated is None:
        return
    result, directory = evaluated
    files = write_result(result, directory, against)
    if options.json:
        print(to_json(result))
        return
    print(to_markdown(result, against))
    print("\n".join(f"{kind + ':':<7}{path}" for kind, path in files.items()))
