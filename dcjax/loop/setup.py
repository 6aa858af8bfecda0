"""What a run is set up with before its first step, all of it checked before anything slow: files, mesh, engines."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar, cast

import jax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from dcjax.data.task import Problems
from dcjax.errors import RunError
from dcjax.loop.checkpoint import Cursor
from dcjax.loop.compile_ahead import compiled_beside
from dcjax.loop.end_tokens import starting_end_tokens
from dcjax.loop.reward_collector import check_golds, open_rewards
from dcjax.loop.run_directory import check_end_tokens_agree
from dcjax.loop.warm_start import warm_start
from dcjax.recipe.build import (
    PastParams,
    PolicyName,
    build_optimizer,
    initial_state,
    make_engines,
    open_problems,
    training_mesh,
    with_pretrained_model,
)
from dcjax.recipe.config import Config
from dcjax.reporting.record import check_writable
from dcjax.rewards.in_process import Rewards
from dcjax.serving.engine import Qwen3Engine
from dcjax.sharding.hosts import check_divides, is_main
from dcjax.types import TrainState
from dcjax.user_code import CodeFile, refusals_of

P = ParamSpec("P")
T = TypeVar("T")


class Checks:
    """Checks that are all made before those that failed refuse a run, in one line."""

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
        """Raises RunError if a check has failed, with what all of them say."""
        if self._refusals:
            raise RunError(". Also: ".join(self._refusals))


@dataclass(frozen=True)
class Checked:
    """A run that nothing is known against, and that nothing has been started for."""

    config: Config
    # entered where rewards are needed; workers start then
    rewards: AbstractContextManager[Rewards]
    tokenizer: PreTrainedTokenizerFast
    problems: Problems
    mesh: Mesh
    end_tokens: list[int]
    engines: dict[PolicyName, Qwen3Engine]


@dataclass(frozen=True)
class Setup:
    """A run's machinery."""

    config: Config
    # where responses are rewarded
    rewards: Rewards
    tokenizer: PreTrainedTokenizerFast
    problems: Problems
    # of training
    mesh: Mesh
    # ids that end a response
    end_tokens: list[int]
    # of the policy that is deployed, and of the one that is trained
    engines: dict[PolicyName, Qwen3Engine]
    # the file that the run keeps a copy of
    recipe: CodeFile | None = None


def check(config: Config) -> Checked:
    """Makes every check of a run that needs no sample and no step: first those that need no file to be read.

    Raises:
      RunError: the folder of the model, the reward or files of the task cannot be used, or the mesh needs more devices
        than there are; all of these are said. Otherwise the problems cannot be read, the vocabulary does not fit the
        model or the ids that end a response are not in it; all of these are said. Otherwise the model cannot be served.
    """
    early = Checks()
    config = early.run(with_pretrained_model, config) or config
    rewards = early.run(open_rewards, config)
    early.run(_check_files, config)
    if is_main():
        early.run(check_writable, config.directory)
    mesh = early.run(_checked_mesh, config)
    early.finish()
    late = Checks()
    tokenizer = late.run(_tokenizer, config)
    late.finish()
    problems = late.run(_checked_problems, config, tokenizer)
    late.run(_check_vocabulary, config, tokenizer)
    end_tokens = late.run(starting_end_tokens, config, tokenizer)
    late.finish()
    check_end_tokens_agree(end_tokens)
    engines = make_engines(config, mesh, end_tokens)
    return Checked(config, rewards, tokenizer, problems, mesh, end_tokens, engines)


def set_up(checked: Checked, rewards: Rewards, recipe: CodeFile | None = None) -> Setup:
    """A run's machinery; nothing is sampled or trained yet. Golds that its reward cannot read are named.

    Raises:
      RunError: the processes that read golds could not be started.
    """
    check_golds(checked.config, checked.problems)
    return Setup(
        checked.config,
        rewards,
        checked.tokenizer,
        checked.problems,
        checked.mesh,
        checked.end_tokens,
        checked.engines,
        recipe,
    )


def _check_files(config: Config) -> None:
    with refusals_of(config.task):
        config.task.check_files()


def _checked_mesh(config: Config) -> Mesh:
    mesh = training_mesh(config)
    check_divides(
        mesh, serving=config.serving.devices, prompts=config.rollout.prompts, heldout=config.evaluation.prompts
    )
    return mesh


def _tokenizer(config: Config) -> PreTrainedTokenizerFast:
    with refusals_of(config.task):
        return config.task.build_tokenizer(config.pretrained)


def _checked_problems(config: Config, tokenizer: PreTrainedTokenizerFast) -> Problems:
    """The task's problems, of which both splits have one."""
    problems = open_problems(config, tokenizer)
    with refusals_of(config.task, problems):
        for split in ("train", "heldout"):
            problems.problems(split, config.seed, 0, 1)
    return problems


def _check_vocabulary(config: Config, tokenizer: PreTrainedTokenizerFast) -> None:
    if len(tokenizer) > config.model.vocab_size:
        raise RunError(f"model.vocab_size is {config.model.vocab_size}; the tokenizer needs {len(tokenizer)}")


def begin(setup: Setup) -> tuple[TrainState, Cursor]:
    """The state before RL, fresh parameters warmed up, and the cursor at the first prompt."""
    config = setup.config
    with compiled_beside(config, setup.mesh, setup.engines):
        params = warm_start(config, setup.mesh, setup.tokenizer)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    cursor = Cursor(step=0, data_cursor=0, rollout_key=jax.random.key_data(key).tolist())
    past = PastParams.needed_by(config)
    return initial_state(config, setup.mesh, build_optimizer(config), params, past), cursor
