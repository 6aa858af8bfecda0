"""The architecture that a run has: of its recipe, or of the folder that it starts from."""

from __future__ import annotations

import dataclasses

from dcjax.errors import RunError
from dcjax.models import ModelConfig, read_config
from dcjax.recipe.config import Config, check_positions


def with_pretrained_model(config: Config) -> Config:
    """The config with the architecture that `pretrained` has, if it names a folder.

    Raises:
      RunError: the folder holds no model that is supported, or as `with_architecture`.
    """
    if config.pretrained is None:
        return config
    try:
        return with_architecture(config, read_config(config.pretrained))
    except ValueError as error:
        raise RunError(str(error)) from None


def with_architecture(config: Config, model: ModelConfig) -> Config:
    """The config with another architecture, computed in the numerics of its own.

    Raises:
      RunError: responses may be longer than it is made for.
    """
    computed = {name: getattr(config.model, name) for name in ("remat", "attention", "head_chunk", "precision")}
    model = dataclasses.replace(model, **computed)
    try:
        check_positions(model, config.rollout)
    except ValueError as error:
        raise RunError(str(error)) from None
    return dataclasses.replace(config, model=model)
