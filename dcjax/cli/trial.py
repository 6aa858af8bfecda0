"""What `dcjax train --trial` has to know of the machine and of files, and what it says of the change."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from pathlib import Path

import jax

from dcjax.errors import RunError
from dcjax.loop.recipe_copy import kept_recipe
from dcjax.loop.run_directory import goes_on
from dcjax.models import ModelConfig, read_config
from dcjax.recipe.config import Config
from dcjax.recipe.trial import Available, changes
from dcjax.sharding.hosts import is_main, join
from dcjax.sharding.mesh import memory_of
from dcjax.user_code import CodeFile, refusals_of

REASONS = {
    "pretrained": "there is no such folder, so weights are random",
    "task.data_dir": "there are no data, so these are hand-written samples in their schemas, no benchmark",
}
"""Why fields are changed that do not only become smaller."""


def look(config: Config) -> Available:
    """What there is for a trial of a recipe; waits for the other processes.

    Raises:
      RunError: as `join`, the folder of weights holds no model that is supported, or a task of the reader's own fails.
    """
    join(config.distributed)
    devices = jax.devices()
    folder = config.pretrained
    is_there = folder is not None and folder.is_dir()
    with refusals_of(config.task):
        tokens = 0 if is_there else len(config.task.build_tokenizer(None))
    return Available(
        devices=len(devices),
        memory=memory_of(devices[0]),
        cores=len(os.sched_getaffinity(0)),
        processes=jax.process_count(),
        data=_has_data(config),
        pretrained=_architecture(folder) if is_there else None,
        tokens=tokens,
    )


def _architecture(folder: Path) -> ModelConfig:
    try:
        return read_config(folder)
    except ValueError as error:
        raise RunError(str(error)) from None


def _has_data(config: Config) -> bool:
    with refusals_of(config.task):
        try:
            config.task.check_files()
        except FileNotFoundError:
            return False
    return True


def in_own_directory(config: Config, recipe: CodeFile) -> Config:
    """The config under NAME-trial, or NAME-trial-2 and so on: the first run directory that is not there yet, or that
    the same trial was begun in, which goes on."""
    ends = itertools.chain(["-trial"], (f"-trial-{number}" for number in itertools.count(2)))
    run_dir = config.run_dir
    trials = (
        dataclasses.replace(
            config, name=f"{config.name}{end}", run_dir=None if run_dir is None else Path(f"{run_dir}{end}")
        )
        for end in ends
    )
    return next(trial for trial in trials if not trial.directory.exists() or _is_begun(trial, recipe))


def _is_begun(config: Config, recipe: CodeFile) -> bool:
    try:
        kept = kept_recipe(config.directory)
        return kept is not None and kept.sha256 == recipe.sha256 and goes_on(config)
    except RunError:
        return False


def announce(recipe: Config, shrunk: Config, config: Config) -> None:
    """Says what the trial changed and where it goes, on standard error; the arguments are those of `changes`."""
    if not is_main():
        return
    for change in changes(recipe, shrunk, config):
        reason = REASONS.get(change.split()[0])
        print(f"trial: {change}" + (f" ({reason})" if reason else ""), file=sys.stderr)
    print(f"trial: everything is written to {config.directory}", file=sys.stderr)
