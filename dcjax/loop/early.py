"""What refuses a run before anything slow is done; importing this is quick too, without engines and tokenizers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ParamSpec, TypeVar, cast

import jax
from jax.sharding import Mesh

from dcjax.errors import RunError
from dcjax.loop.recipe_copy import recipe_for
from dcjax.loop.reward_collector import open_rewards
from dcjax.loop.run_directory import check_processes_agree, check_shared, recorded_model
from dcjax.models.parallel.forward import check_model
from dcjax.recipe.architecture import with_architecture, with_pretrained_model
from dcjax.recipe.config import Config
from dcjax.recipe.rollout import IN_PROCESS
from dcjax.rewards.in_process import Rewards
from dcjax.sharding.hosts import check_divides, join, of_all_processes
from dcjax.sharding.mesh import make_mesh, set_aside
from dcjax.user_code import CodeFile, refusals_of

P = ParamSpec("P")
T = TypeVar("T")


class Checks:
    """Checks that are all made, by all processes, before those that failed refuse a run in one line."""

    def __init__(self):
        self._refusals: list[str] = []

    def run(self, check: Callable[P, T], *arguments: P.args, **settings: P.kwargs) -> T:
        """What the check returns; what is returned for one that fails must not be used before `finish`."""
        try:
            with refusals_of():
                return check(*arguments, **settings)
        except RunError as error:
            if error.status != RunError.status:
                raise
            self._refusals.append(str(error))
        except OSError as error:
            self._refusals.append(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return cast(T, None)

    def finish(self) -> None:
        """Raises RunError if a check has failed in any process, with what all of them say; all must call it."""
        told = [theirs["refusals"] for theirs in of_all_processes({"refusals": self._refusals})]
        refusals = dict.fromkeys(itertools.chain.from_iterable(told))
        if refusals:
            raise RunError(". Also: ".join(f"{_where(refusal, told)}{refusal}" for refusal in refusals))


def _where(refusal: str, told: list[list[str]]) -> str:
    """Which processes a refusal is of, unless it is of all."""
    numbers = [str(number) for number, theirs in enumerate(told) if refusal in theirs]
    return "" if len(numbers) == len(told) else f"process {', '.join(numbers)}: "


def refuse_early(config: Config, recipe: CodeFile | None) -> None:
    """Makes the checks of a run that need no engine and no tokenizer; raises as `join_others` and `check_early`."""
    join_others(config, recipe)
    check_early(config)


def join_others(config: Config, recipe: CodeFile | None) -> CodeFile | None:
    """Waits for the other processes, which must run the same; returns the file that the run has to keep.

    Raises:
      RunError: as `join`, `recipe_for` and `check_processes_agree`.
    """
    join(config.distributed)
    recipe = recipe_for(config, recipe)
    check_processes_agree(config, recipe)
    return recipe


def check_early(config: Config) -> tuple[Config, AbstractContextManager[Rewards], Mesh]:
    """Checks the model's folder, the mesh, files without reading them, and the run's directory.

    Returns:
      The config with the architecture of the run, its reward, of which nothing is started, and its mesh.

    Raises:
      RunError: one or more of them cannot be used; all of these are said.
    """
    checks = Checks()
    known = checks.run(_with_model, config)
    rewards = checks.run(open_rewards, config)
    checks.run(_check_files, config)
    checks.run(_check_rollouts, config)
    checks.run(check_shared, config.directory)
    if known is not None:
        checks.run(check_model, known.model, dataclasses.asdict(config.mesh))
        checks.run(known.training_forward)
    mesh = checks.run(checked_mesh, config)
    checks.finish()
    return known, rewards, mesh


def _with_model(config: Config) -> Config:
    """The config with the architecture that the run began with, or begins with: its folder may be gone later."""
    if config.pretrained is not None and (recorded := recorded_model(config)) is not None:
        return with_architecture(config, recorded)
    return with_pretrained_model(config)


def _check_files(config: Config) -> None:
    with refusals_of(config.task):
        config.task.check_files()


def _check_rollouts(config: Config) -> None:
    if (engine := config.rollout.engine) != IN_PROCESS and (count := jax.process_count()) > 1:
        raise ValueError(
            f"rollout.engine is {engine}, and the run has {count} processes; a run of several samples {IN_PROCESS}"
        )


def checked_mesh(config: Config) -> Mesh:
    """The run's mesh, of which all processes have enough; raises as `training_mesh` and `check_divides`."""
    mesh = training_mesh(config)
    check_divides(
        mesh, serving=config.serving.devices, prompts=config.rollout.prompts, heldout=config.evaluation.prompts
    )
    return mesh


def training_mesh(config: Config) -> Mesh:
    """The run's mesh, on devices that do not only serve.

    Raises:
      ValueError: too few devices, or serving ones that hosts cannot give equally many of.
    """
    count, size = config.serving.devices, math.prod(dataclasses.asdict(config.mesh).values())
    if count and size + count > jax.device_count():
        raise ValueError(
            f"serving.devices is {count}, behind {size} of the mesh; {jax.device_count()} were found, "
            "so the sum must be at most that"
        )
    return make_mesh(config.mesh, set_aside(jax.devices(), count)[0])
