"""What a run is set up with before its first step, all of it checked before anything slow: files, mesh, engines."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime

import jax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from dcjax.data.chat import dated
from dcjax.data.task import Problems
from dcjax.data.tokenizers import load_tokenizer
from dcjax.errors import RunError
from dcjax.keys import make_key
from dcjax.loop.checkpoint import Cursor
from dcjax.loop.compile_ahead import compiled_beside
from dcjax.loop.early import Checks, check_early
from dcjax.loop.end_tokens import starting_end_tokens
from dcjax.loop.reward_collector import check_golds
from dcjax.loop.run_directory import check_end_tokens_agree, goes_on, start_of
from dcjax.loop.warm_start import warm_start
from dcjax.recipe.build import (
    PastParams,
    PolicyName,
    build_optimizer,
    initial_state,
    make_engines,
    open_problems,
)
from dcjax.recipe.config import Config
from dcjax.rewards.in_process import Rewards
from dcjax.serving.engine import Qwen3Engine
from dcjax.types import TrainState
from dcjax.user_code import CodeFile, refusals_of


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
    # as of `Setup`
    started: datetime


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
    # when the run was started first, which is the date that chat templates tell
    started: datetime | None = None


def check(config: Config) -> Checked:
    """Makes every check of a run that needs no sample and no step: first those that need no file to be read.

    Raises:
      RunError: as `check_early`. Otherwise the problems cannot be read, the vocabulary does not fit the
        model or the ids that end a response are not in it; all of these are said. Otherwise the model cannot be served.
    """
    config, rewards, mesh = check_early(config)
    late, started = Checks(), start_of(config)
    tokenizer = late.run(_tokenizer, config)
    late.finish()
    problems = late.run(_checked_problems, config, dated(tokenizer, started))
    late.run(_check_vocabulary, config, tokenizer)
    end_tokens = late.run(starting_end_tokens, config, tokenizer)
    late.finish()
    check_end_tokens_agree(end_tokens)
    engines = make_engines(config, mesh, end_tokens)
    return Checked(config, rewards, tokenizer, problems, mesh, end_tokens, engines, started)


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
        checked.started,
    )


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


def _tokenizer(config: Config) -> PreTrainedTokenizerFast:
    """The task's; that of a run which began from a folder is its own, since the folder may be gone."""
    if config.pretrained is not None and goes_on(config):
        return load_tokenizer(config.directory / "tokenizer")
    with refusals_of(config.task):
        return config.task.build_tokenizer(config.pretrained)


def begin(setup: Setup) -> tuple[TrainState, Cursor]:
    """The state before RL, fresh parameters warmed up, and the cursor at the first prompt."""
    config = setup.config
    with compiled_beside(config, setup.mesh, setup.engines):
        params = warm_start(config, setup.mesh, setup.tokenizer, setup.problems)
    key = jax.random.fold_in(make_key(config.seed), 1)
    cursor = Cursor(step=0, data_cursor=0, rollout_key=jax.random.key_data(key).tolist())
    past = PastParams.needed_by(config)
    return initial_state(config, setup.mesh, build_optimizer(config), params, past), cursor
