"""The nearest change of a run that makes it fit, compiled to prove it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from dcjax.recipe.config import Config
from dcjax.tools.plan.plan import Plan, place_of

MOST = 6
"""Changes of each kind that are tried, each of which is compiled."""


def nearest_that_fits(config: Config, topology: str, plan: Plan, told: Callable[[str], None]) -> list[str]:
    """Overrides by which the run fits, none where what was tried does not.

    Args:
      config: of the run that does not fit.
      topology: the slice.
      plan: of that run.
      told: called with what is being tried.
    """
    too_big = {one.planned.name for one in plan.programs if not one.fits}
    made: list[str] = []
    for programs, changes in (
        (too_big & {"train_step"}, _of_training(config)),
        (too_big - {"train_step"}, _of_serving(config)),
    ):
        if not programs:
            continue
        for changed, overrides in itertools.islice(changes, MOST):
            told(f"does it fit with {' '.join(overrides)}?")
            if all(one.fits for one in place_of(changed, topology).plan(plan.mean_response, told, programs)):
                made += overrides
                break
        else:
            return []
    return made


def _of_training(config: Config) -> Iterator[tuple[Config, list[str]]]:
    """What makes an update smaller, the least costly first, each with those before it."""
    overrides: list[str] = []
    if config.model.remat != "full":
        config, overrides = replace(config, model=replace(config.model, remat="full")), ["model.remat=full"]
        yield config, overrides
    longest = config.rollout.max_prompt_length + config.rollout.max_response_length
    optimizer: Any = config.optimizer
    # the default of TPUs is that of GPUs
    columns = optimizer.tokens_per_microbatch or config.packing("tpu").bins.columns
    while (columns := columns // 2) >= longest:
        changed = replace(config, optimizer=replace(optimizer, tokens_per_microbatch=columns))
        yield changed, [*overrides, f"optimizer.tokens_per_microbatch={columns}"]


def _of_serving(config: Config) -> Iterator[tuple[Config, list[str]]]:
    """What makes the engine smaller."""
    slots = config.serving.slots
    while (slots := slots // 2) >= 1:
        yield replace(config, serving=replace(config.serving, slots=slots)), [f"serving.slots={slots}"]
