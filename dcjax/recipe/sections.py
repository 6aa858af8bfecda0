"""What the sections of a recipe must have that a reader may replace: `objective`, `optimizer`, `reward` and `task`.

Each may be any frozen dataclass of plain fields with the members of its protocol; the built-in sections are nothing
else. `dcjax.data.task.Task` is the protocol of `task`.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dcjax.data.task import Task
from dcjax.recipe.checks import is_frozen_dataclass
from dcjax.recipe.optimizer import Optimizer
from dcjax.rewards.in_process import Rewards
from dcjax.rewards.processes import Reward
from dcjax.rl.objective import Objective
from dcjax.user_code import reference_to


class ObjectiveSection(Protocol):
    """The `objective` section. `ObjectiveConfig` is the built-in one; docs/objectives.md has one of a reader's own."""

    def build(self, *, updates: int, max_response_length: int) -> Objective:
        """The objective.

        Args:
          updates: optimiser updates per iteration.
          max_response_length: of rollouts, in tokens.
        """
        ...


class OptimizerSection(Protocol):
    """The `optimizer` section. `OptimizerConfig` is the built-in one; docs/schedules.md has some of a reader's own."""

    @property
    def updates(self) -> int:
        """Optimiser updates per iteration."""
        ...

    @property
    def tokens_per_microbatch(self) -> int | None:
        """Tokens of a share of the devices per forward and backward pass, at most; None for a default."""
        ...

    def build(self, objective: Objective, *, steps: int) -> Optimizer:
        """The optimiser.

        Args:
          objective: what it minimises.
          steps: RL iterations of the run.
        """
        ...


class RewardSection(Protocol):
    """The `reward` section. `RewardConfig` is the built-in one; docs/tasks.md has one of a reader's own."""

    def check(self, task: Task, *, max_response_length: int) -> None:
        """Raises ValueError where it does not fit the task or the longest response, in tokens."""
        ...

    def verifier(self, task: Task) -> Reward:
        """The function that scores a response.

        Raises:
          ValueError: there is none.
        """
        ...

    def open(self, verifier: Reward) -> AbstractContextManager[Rewards]:
        """Where the function runs.

        Raises:
          ValueError: it cannot run there.
        """
        ...

    def length_rewards(self, lengths: np.ndarray, *, max_response_length: int) -> np.ndarray:
        """What is added to rewards for the responses' lengths in tokens, [N] each; not part of accuracies."""
        ...


PROTOCOLS: dict[str, type] = {
    "task": Task,
    "objective": ObjectiveSection,
    "optimizer": OptimizerSection,
    "reward": RewardSection,
}
"""What the sections are that may be of any class."""


@cache
def build_objective(section: ObjectiveSection, *, updates: int, max_response_length: int) -> Objective:
    """The objective of a section, the same object for equal arguments.

    Raises:
      ValueError: the section builds something else.
    """
    objective = section.build(updates=updates, max_response_length=max_response_length)
    if not isinstance(objective, Objective):
        raise ValueError(f"objective.build returned a {type(objective).__name__}; it must return a dcjax.rl.Objective")
    return objective


@cache
def build_optimizer(section: OptimizerSection, objective: Objective, *, steps: int) -> Optimizer:
    """The optimizer of a section, the same object for equal arguments.

    Raises:
      ValueError: the section does not fit the objective, or builds something else.
    """
    optimizer = section.build(objective, steps=steps)
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"optimizer.build returned a {type(optimizer).__name__}; it must return a dcjax.recipe.optimizer.Optimizer"
        )
    return optimizer


def check_sections(config: Any) -> None:
    """Refuses a section that a run could not be recorded with, or that lacks a member.

    Raises:
      ValueError: one that is no frozen dataclass, or whose class cannot be imported by its name; a field that is no
        plain value; or a missing member.
    """
    _check_plain("serving.format", config.serving.format)
    for name, protocol in PROTOCOLS.items():
        section = getattr(config, name)
        _check_frozen(name, section)
        _check_plain(name, section)
        fields = {field.name for field in dataclasses.fields(section)}
        for member in vars(protocol):
            if not (member.startswith("_") or member in fields or hasattr(type(section), member)):
                raise ValueError(
                    f"{name} is a {type(section).__name__}, which has no {member!r}; see {protocol.__module__}."
                    f"{protocol.__name__}"
                )


def _check_plain(name: str, value: Any) -> None:
    """Raises ValueError unless a value can be written to config.json and read back equal."""
    if isinstance(value, tuple):
        for number, item in enumerate(value):
            _check_plain(f"{name}[{number}]", item)
    elif dataclasses.is_dataclass(value):
        _check_frozen(name, value)
        for field in dataclasses.fields(value):
            _check_plain(f"{name}.{field.name}", getattr(value, field.name))
    elif not (value is None or isinstance(value, str | int | float | Path)):
        hint = ", which has no hash; make it a tuple" if isinstance(value, list | set | dict) else ""
        raise ValueError(
            f"{name} is {value!r}, a {type(value).__name__}{hint}; a field is a number, a text, a path, None, a tuple "
            "or a frozen dataclass"
        )
    elif value != value:
        raise ValueError(f"{name} is {value}; it must be a number")


def _check_frozen(name: str, value: Any) -> None:
    """Raises ValueError for what is no frozen dataclass, or one whose class config.json cannot name."""
    if not is_frozen_dataclass(type(value)):
        raise ValueError(f"{name} is a {type(value).__name__}; its class must be a @dataclass(frozen=True)")
    try:
        reference_to(type(value))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
