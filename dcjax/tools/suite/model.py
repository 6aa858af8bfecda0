"""The model that a suite is asked of, and the engines of its two policies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from dcjax.data.mathematics import MathTask
from dcjax.data.templates import TemplateName
from dcjax.data.tokenizers import load_tokenizer
from dcjax.errors import RunError
from dcjax.loop.checkpoint import Checkpoints
from dcjax.loop.end_tokens import folder_end_tokens, run_end_tokens
from dcjax.loop.run_directory import load_config, locate
from dcjax.models.parallel.forward import check_model
from dcjax.recipe.build import abstract_state, build_engine, build_training_engine, starting_params
from dcjax.recipe.config import Config, on_one_device
from dcjax.recipe.reward import RewardConfig
from dcjax.serving.engine import Qwen3Engine
from dcjax.sharding.mesh import MeshConfig, make_mesh
from dcjax.tools.open_model import folder_config, is_folder
from dcjax.tools.suite.log import Policy
from dcjax.types import Params


@dataclass(frozen=True)
class Model:
    """A model with its settings, loaded."""

    name: str
    # None of a Hugging Face folder
    step: int | None
    config: Config
    mesh: Mesh
    tokenizer: PreTrainedTokenizerFast
    # ids that end a response
    stop_tokens: list[int]
    # on the mesh
    params: Params
    # where results go, unless told otherwise
    out: Path

    @property
    def template(self) -> TemplateName:
        """That it was trained with, or boxed where it was not trained on mathematics here."""
        task = self.config.task
        return task.template if isinstance(task, MathTask) else "boxed"

    def engine(self, policy: Policy, *, max_prompt_length: int, max_response_length: int) -> Qwen3Engine:
        """The policy's engine on the mesh, for prompts and responses of those lengths.

        Raises:
          RunError: the model, the hardware or its memory cannot serve that.
        """
        lengths: dict[str, Any] = {
            "max_prompt_length": max_prompt_length,
            "max_response_length": max_response_length,
        }
        config = replace(
            self.config,
            task=MathTask(max_prompt_tokens=max_prompt_length),
            reward=RewardConfig(workers=1),
            rollout=replace(self.config.rollout, top_k=0, top_p=1.0, replay_routing=False, **lengths),
            # one prompt in each pass of the prefill: its cache's roundings then do not depend on which are beside it
            serving=replace(self.config.serving, prefill_tokens=max_prompt_length),
        )
        make = build_engine if policy == "deployed" else build_training_engine
        return make(config, self.mesh, self.stop_tokens)


def load_model(path: Path, *, devices: int = 1, **serving: Any) -> Model:
    """A run's newest checkpoint, one checkpoint in a run, or a Hugging Face folder.

    Args:
      path: a run directory, RUN/checkpoints/STEP, or a folder.
      devices: that share the weights and the samples; several hosts take all that they have.
      serving: fields of `ServingConfig`; those that are not given, or None, are the run's.

    Raises:
      RunError: no such source, a damaged one, or a setting out of range.
    """
    path = path.resolve()
    given = {name: value for name, value in serving.items() if value is not None}
    count = jax.device_count() if jax.process_count() > 1 else devices
    try:
        mesh = make_mesh(MeshConfig(fsdp=count))
        return (_load_folder if is_folder(path) else _load_run)(path, mesh, given)
    except ValueError as error:
        raise RunError(str(error)) from None


def _load_run(path: Path, mesh: Mesh, serving: dict[str, Any]) -> Model:
    run_dir, step = locate(path)
    recorded = load_config(run_dir)
    config = _on(mesh, replace(recorded, serving=replace(recorded.serving, **serving)))
    checkpoints = Checkpoints(run_dir / "checkpoints")
    step = checkpoints.latest() if step is None else step
    state, loop = checkpoints.restore(step, abstract_state(config, mesh))
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    return Model(
        name=run_dir.name,
        step=loop.step,
        config=config,
        mesh=mesh,
        tokenizer=tokenizer,
        stop_tokens=run_end_tokens(run_dir, config, tokenizer),
        params=state.params,
        out=run_dir / "suite" / str(loop.step),
    )


def _load_folder(path: Path, mesh: Mesh, serving: dict[str, Any]) -> Model:
    config = _on(mesh, folder_config(path, replace(Config().serving, **serving)))
    tokenizer = load_tokenizer(path)
    return Model(
        name=path.name,
        step=None,
        config=config,
        mesh=mesh,
        tokenizer=tokenizer,
        stop_tokens=folder_end_tokens(path, tokenizer),
        params=starting_params(config, mesh),
        out=Path("suite") / path.name,
    )


def _on(mesh: Mesh, config: Config) -> Config:
    """The config as it is served on a mesh.

    Raises:
      ValueError: the mesh does not divide the model.
    """
    if mesh.size == 1:
        return on_one_device(config)
    check_model(config.model, dict(mesh.shape))
    return replace(config, mesh=MeshConfig())
