"""Where a model is: a run, one of its checkpoints, a Hugging Face folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dcjax.models.hf import INDEX, WEIGHTS
from dcjax.recipe.build import with_pretrained_model
from dcjax.recipe.config import Config
from dcjax.recipe.serving import ServingConfig


def is_folder(path: Path) -> bool:
    """Whether a Hugging Face folder's weights lie there, and no run."""
    return (path / WEIGHTS).exists() or (path / INDEX).exists()


def folder_config(path: Path, serving: ServingConfig, *, max_prompt_length: int = 1) -> Config:
    """A config of a Hugging Face folder's model, for prompts of that length at least.

    Raises:
      RunError: the folder holds no model that is supported.
    """
    config = Config(pretrained=path, serving=serving)
    longest = max(config.rollout.max_prompt_length, max_prompt_length)
    return with_pretrained_model(replace(config, rollout=replace(config.rollout, max_prompt_length=longest)))
