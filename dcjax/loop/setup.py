"""What a run is set up with before its first step: tokenizer, problems, mesh, engines."""

from __future__ import annotations

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
    training_mesh,
)
from dcjax.recipe.config import Config
from dcjax.rewards.in_process import Rewards
from dcjax.serving.engine import Qwen3Engine
from dcjax.sharding.hosts import check_divides
from dcjax.types import TrainState
from dcjax.user_code import CodeFile


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


def set_up(config: Config, rewards: Rewards, recipe: CodeFile | None = None) -> Setup:
    """Builds a run's machinery; nothing is sampled or trained yet.

    Raises:
      RunError: the mesh needs more devices than there are, the vocabulary does not fit the model, the ids that end a
        response are not in it, or the model cannot be served.
    """
    try:
        tokenizer = _tokenizer(config)
        started = start_of(config)
        problems = open_problems(config, dated(tokenizer, started))
        for split in ("train", "heldout"):
            problems.problems(split, config.seed, 0, 1)
        check_golds(config, problems)
        mesh = training_mesh(config)
    except ValueError as error:
        raise RunError(str(error)) from None
    if len(tokenizer) > config.model.vocab_size:
        raise RunError(f"model.vocab_size is {config.model.vocab_size}; the tokenizer needs {len(tokenizer)}")
    check_divides(
        mesh, serving=config.serving.devices, prompts=config.rollout.prompts, heldout=config.evaluation.prompts
    )
    end_tokens = starting_end_tokens(config, tokenizer)
    check_end_tokens_agree(end_tokens)
    engines = make_engines(config, mesh, end_tokens)
    return Setup(config, rewards, tokenizer, problems, mesh, end_tokens, engines, recipe, started)


def _tokenizer(config: Config) -> PreTrainedTokenizerFast:
    """The task's; that of a run which began from a folder is its own, since the folder may be gone."""
    if config.pretrained is not None and goes_on(config):
        return load_tokenizer(config.directory / "tokenizer")
    return config.task.build_tokenizer(config.pretrained)


def begin(setup: Setup) -> tuple[TrainState, Cursor]:
    """The state before RL, fresh parameters warmed up, and the cursor at the first prompt."""
    config = setup.config
    with compiled_beside(config, setup.mesh, setup.engines):
        params = warm_start(config, setup.mesh, setup.tokenizer)
    key = jax.random.fold_in(make_key(config.seed), 1)
    cursor = Cursor(step=0, data_cursor=0, rollout_key=jax.random.key_data(key).tolist())
    past = PastParams.needed_by(config)
    return initial_state(config, setup.mesh, build_optimizer(config), params, past), cursor
