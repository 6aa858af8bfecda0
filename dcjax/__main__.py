"""The process of a command: `dcjax` and `python -m dcjax`."""

import sys

from dcjax.signals import INTERRUPTED, RESUMABLE, leave, listen


def run() -> None:
    """Runs the command that the process was started with, and ends the process with its exit status."""
    listen(next((argument for argument in sys.argv[1:] if not argument.startswith("-")), ""))
    try:
        # These imports take a second in which a signal may arrive.
        from dcjax.cli import main

        status = main()
    except KeyboardInterrupt:
        print("dcjax: interrupted", file=sys.stderr)
        status = INTERRUPTED
    if status in (INTERRUPTED, RESUMABLE):
        leave(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
