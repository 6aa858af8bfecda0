"""The engines of the two policies that a suite evaluates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dcjax.data.mathematics import MathTask
from dcjax.recipe.build import build_engine, build_training_engine
from dcjax.recipe.reward import RewardConfig
from dcjax.serving.engine import Qwen3Engine
from dcjax.tools.open_model import OpenedModel
from dcjax.tools.suite.log import SuitePolicy


def make_suite_engine(
    model: OpenedModel, policy: SuitePolicy, *, max_prompt_length: int, max_response_length: int
) -> Qwen3Engine:
    """The policy's engine on the model's mesh, for prompts and responses of those lengths (tokens).

    Raises:
      RunError: the model, the hardware or its memory cannot serve that.
    """
    lengths: dict[str, Any] = {"max_prompt_length": max_prompt_length, "max_response_length": max_response_length}
    config = replace(
        model.config,
        task=MathTask(max_prompt_tokens=max_prompt_length),
        reward=RewardConfig(workers=1),
        rollout=replace(model.config.rollout, top_k=0, top_p=1.0, replay_routing=False, **lengths),
        # One prompt is in each pass of the prefill: its cache's roundings then do not depend on which are beside it.
        serving=replace(model.config.serving, prefill_tokens=max_prompt_length),
    )
    build = build_engine if policy == "deployed" else build_training_engine
    return build(config, model.mesh, model.end_tokens)
