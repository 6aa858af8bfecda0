"""Errors that end a run with one line."""


class RunError(Exception):
    """A run that cannot start or go on, and what would be right; the command line prints it and exits with `status`."""

    status = 2


class Interrupted(RunError):
    """A run that was stopped from outside, and goes on when the same command is started again.

    Its status is EX_TEMPFAIL of sysexits.h: launchers that restart on some statuses only should restart on 75.
    """

    status = 75
