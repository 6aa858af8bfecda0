"""The nearest change of a run that makes it fit, compiled to prove it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from dcjax.recipe.config import Config
from dcjax.tools.plan.plan import Place, Plan
from dcjax.tools.plan.programs import for_tpu

MOST = 6
"""Changes that are tried, each of which is compiled."""


def nearest_that_fits(config: Config, topology: str, plan: Plan, told: Callable[[str], None]) -> list[str]:
    """Overrides by which the run fits, none where what was tried does not.

    Args:
      config: of the run that does not fit.
      topology: the slice.
      plan: of that run.
      told: called with what is being tried.
    """
    too_big = {one.planned.name for one in plan.programs if not one.fits}
    for number, changes in enumerate(_changes(config, trains="train_step" in too_big)):
        if number == MOST:
            break
        overrides = [f"{name}={value}" for name, value in changes.items()]
        told(f"does it fit with {' '.join(overrides)}?")
        changed = config
        for name, value in changes.items():
            section, field = name.split(".")
            changed = replace(changed, **{section: replace(getattr(changed, section), **{field: value})})
        if all(one.fits for one in Place.of(changed, topology).plan(plan.mean_response, told, too_big)):
            return overrides
    return []


def _changes(config: Config, *, trains: bool) -> Iterator[dict[str, object]]:
    """Changes to try, the least costly first, each with those before it."""
    made: dict[str, object] = {}
    if trains:
        if config.model.remat != "full":
            made["model.remat"] = "full"
            yield dict(made)
        longest = config.rollout.max_prompt_length + config.rollout.max_response_length
        columns = for_tpu(config).packing("tpu").bins.columns
        while (columns := columns // 2) >= longest:
            made["optimizer.tokens_per_microbatch"] = columns
            yield dict(made)
        return
    slots = config.serving.slots
    while slots > 1:
        slots //= 2
        made["serving.slots"] = slots
        yield dict(made)
