"""The nearest change of a run that makes it fit, compiled to prove it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from dcjax.errors import RunError
from dcjax.recipe.config import Config
from dcjax.tools.plan.plan import Gpus, Place, Plan, place_of

Changes = dict[str, Any]
"""The fields that are changed, by their names, and their values."""

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
    made: Changes = {}
    for programs, smaller in ((too_big & {"train_step"}, _of_training), (too_big - {"train_step"}, _of_serving)):
        if not programs:
            continue
        for changed, changes, place in itertools.islice(_possible(smaller(config), topology), MOST):
            told(f"does it fit with {' '.join(_overrides(made | changes))}?")
            if all(one.fits for one in place.plan(plan.mean_response, told, programs)):
                config, made = changed, made | changes
                break
        else:
            return []
    return _overrides(made)


def _overrides(changes: Changes) -> list[str]:
    return [f"{name}={value}" for name, value in changes.items()]


def _possible(found: Iterable[tuple[Config, Changes]], topology: str) -> Iterator[tuple[Config, Changes, Place | Gpus]]:
    """Those by whose meshes the model's sizes divide, with where they would run."""
    for config, changes in found:
        with contextlib.suppress(RunError):
            yield config, changes, place_of(config, topology)


def _of_training(config: Config) -> Iterator[tuple[Config, Changes]]:
    """What makes an update smaller, the least costly first, each with those before it: parameters split over what kept
    copies; activations computed again; fewer columns; layers split over more devices."""
    made: Changes = {}
    if config.mesh.data > 1:
        config = _merged(config, made)
        yield config, made
    if config.model.remat != "full":
        config = replace(config, model=replace(config.model, remat="full"))
        made["model.remat"] = "full"
        yield config, made
    longest = config.rollout.max_prompt_length + config.rollout.max_response_length
    optimizer: Any = config.optimizer
    # the default of TPUs is that of GPUs
    columns = optimizer.tokens_per_microbatch or config.packing("tpu").bins.columns
    while (columns := columns // 2) >= longest:
        config = replace(config, optimizer=replace(optimizer, tokens_per_microbatch=columns))
        made["optimizer.tokens_per_microbatch"] = columns
        yield config, made
    while config.mesh.fsdp % 2 == 0:
        config = _with_mesh(config, made, tensor=config.mesh.tensor * 2, fsdp=config.mesh.fsdp // 2)
        yield config, made


def _of_serving(config: Config) -> Iterator[tuple[Config, Changes]]:
    """What makes the engine, or the state beside it, smaller: parameters split over what kept copies, and then half the
    slots, or copies of the served model on twice the devices, once or more."""
    made: Changes = {}
    if config.mesh.data > 1:
        config = _merged(config, made)
        yield config, made
    serving = config.serving
    for times in range(1, serving.slots.bit_length()):
        for halvings in range(times, -1, -1):
            changes = {"slots": serving.slots >> halvings, "tensor": serving.tensor << (times - halvings)}
            named = {f"serving.{name}": value for name, value in changes.items() if value != getattr(serving, name)}
            yield replace(config, serving=replace(serving, **changes)), made | named


def _merged(config: Config, made: Changes) -> Config:
    return _with_mesh(config, made, data=1, fsdp=config.mesh.fsdp * config.mesh.data)


def _with_mesh(config: Config, made: Changes, **sizes: int) -> Config:
    """The config with these axes of the mesh, which are noted among the changes."""
    made |= {f"mesh.{name}": size for name, size in sizes.items()}
    return replace(config, mesh=replace(config.mesh, **sizes))
