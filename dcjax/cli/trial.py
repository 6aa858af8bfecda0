"""What `dcjax train --trial` has to know of the machine and of files, and what it says of the change."""

from __future__ import annotations

import os
import sys

import jax

from dcjax.recipe.architecture import with_pretrained_model
from dcjax.recipe.config import Config
from dcjax.recipe.trial import Available, changes, check_fits
from dcjax.sharding.hosts import is_main, join
from dcjax.sharding.mesh import memory_of
from dcjax.user_code import refusals_of

REASONS = {
    "pretrained": "there is no such folder, so weights are random",
    "task.data_dir": "there are no data, so these are hand-written samples in their schemas, no benchmark",
}
"""Why fields are changed that do not only become smaller."""


def look(config: Config) -> Available:
    """What there is for a trial of a recipe; waits for the other processes.

    Raises:
      RunError: as `join`, or a task of the reader's own fails.
    """
    join(config.distributed)
    devices = jax.devices()
    pretrained = config.pretrained is not None and config.pretrained.is_dir()
    with refusals_of(config.task):
        tokens = 0 if pretrained else len(config.task.build_tokenizer(None))
    return Available(
        devices=len(devices),
        memory=memory_of(devices[0]),
        cores=len(os.sched_getaffinity(0)),
        processes=jax.process_count(),
        data=_has_data(config),
        pretrained=pretrained,
        tokens=tokens,
    )


def _has_data(config: Config) -> bool:
    with refusals_of(config.task):
        try:
            config.task.check_files()
        except FileNotFoundError:
            return False
    return True


def announce(recipe: Config, shrunk: Config, config: Config, available: Available) -> None:
    """Says what the trial changed and where it goes, on standard error, once it is seen to fit in memory.

    Args:
      recipe, shrunk, config: as `changes` takes them.
      available: what there is.

    Raises:
      RunError: the folder that it starts from holds no model, or one that does not fit.
    """
    check_fits(with_pretrained_model(config), available)
    if not is_main():
        return
    for change in changes(recipe, shrunk, config):
        reason = REASONS.get(change.split()[0])
        print(f"trial: {change}" + (f" ({reason})" if reason else ""), file=sys.stderr)
    print(f"trial: everything is written to {config.directory}", file=sys.stderr)
