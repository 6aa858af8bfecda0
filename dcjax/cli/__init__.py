"""The command line: one file for each command, which adds its parser and runs it; the work is done elsewhere."""

from __future__ import annotations

import argparse
import io
import os
import select
import sys
from collections.abc import Sequence

from dcjax.cli import convert, data, doctor, evaluate, lab, plan, probe, report, serve, train
from dcjax.cli.arguments import NO_CACHE_FLAG, NO_CACHE_HELP, Parser
from dcjax.cli.session import report_error
from dcjax.errors import RunError

COMMANDS = (train, plan, serve, evaluate, probe, report, lab, convert, data, doctor)
"""The modules of the commands, in the order of `dcjax --help`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the command and its arguments; those of the process if None.

    Returns:
      The exit status: 0; 2 for an error that the user can fix; 75 if the run can be resumed with the same command; 130
      if it was interrupted from the keyboard.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if NO_CACHE_FLAG in arguments:
        import jax

        jax.config.update("jax_enable_compilation_cache", False)
        arguments = [argument for argument in arguments if argument != NO_CACHE_FLAG]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Characters that the terminal's encoding lacks, Greek ones for example, become question marks.
            stream.reconfigure(errors="replace")
    try:
        if arguments[:1] == ["train"]:
            # The options of `train` are the fields of a recipe's Config, which argparse does not know.
            train.run(arguments[1:])
        else:
            options, others = build_parser().parse_known_args(arguments)
            if getattr(options, "takes_fields", False):
                options.fields = others
            elif others:
                raise RunError(f"unrecognized arguments: {' '.join(others)}; see dcjax {arguments[0]} --help")
            options.run(options)
    except SystemExit as exit:  # argparse and tyro end so once they have printed their help
        if not _lost_reader():
            raise exit
    except (RunError, OSError, KeyboardInterrupt) as error:
        if not (isinstance(error, BrokenPipeError) and _lost_reader()):
            return report_error(error, command=arguments[0] if arguments else "")
    else:
        _lost_reader()
    return 0


def _lost_reader() -> bool:
    """Whether the reader of standard output, `head` for example, has closed the pipe; the rest then goes nowhere."""
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # a stream without a file
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command but `train`; it sets `run` to the function that takes the parsed options."""
    parser = Parser(
        prog="dcjax",
        description="Reinforcement learning of language models whose sampling policy differs from the training policy.",
        epilog=NO_CACHE_HELP,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
