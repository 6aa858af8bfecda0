"""Errors that a user can mend: one line that says what would be right."""


class RunError(Exception):
    """A run that cannot start or go on; the command line prints its message and exits with status 2."""
