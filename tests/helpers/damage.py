"""Damage to a checkpoint, as a failing disk leaves it."""

import os


def largest_array_file(checkpoint):
    """The largest of the files that a checkpoint keeps its arrays in.

    A restore that knows the shardings does without some of the others, and they can be larger: how many files the
    arrays are spread over depends on how fast they are written.
    """
    stored = (path for path in checkpoint.glob("state/**/d/*") if path.is_file())
    return max(stored, key=lambda path: path.stat().st_size)


def halve(path):
    os.truncate(path, path.stat().st_size // 2)
