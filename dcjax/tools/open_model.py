"""One way to open what a tool works on: a run, one of its checkpoints, or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import optax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from dcjax.data.chat import dated, template_digest
from dcjax.data.mathematics import MathTask
from dcjax.data.tokenizers import load_tokenizer
from dcjax.errors import RunError
from dcjax.loop.checkpoint import Checkpoints, Part
from dcjax.loop.end_tokens import folder_end_tokens, run_end_tokens
from dcjax.loop.run_directory import identity, load_config, locate, recorded_start
from dcjax.models.config import DTYPES
from dcjax.models.hf import INDEX, WEIGHTS
from dcjax.models.parallel.forward import check_model
from dcjax.recipe.architecture import with_pretrained_model
from dcjax.recipe.build import abstract_state, starting_params
from dcjax.recipe.config import Config, on_one_device
from dcjax.recipe.engine import contract_of
from dcjax.recipe.reward import RewardConfig
from dcjax.rl.averaging import average_of
from dcjax.serving.server.contract import Contract
from dcjax.sharding.mesh import MeshConfig, make_mesh
from dcjax.types import Params


@dataclass(frozen=True)
class OpenedModel:
    """A model with its settings; its weights are read only when they are asked for."""

    name: str
    """The name of the run's directory, or of the folder."""
    step: int | None
    """The step of the checkpoint; None for a Hugging Face folder."""
    config: Config
    """The settings of the run, or defaults around the folder's model, for `mesh`."""
    trained_on: MeshConfig
    """The mesh that the run was trained on."""
    mesh: Mesh
    """The devices that the weights are placed on."""
    tokenizer: PreTrainedTokenizerFast
    """To its chat template it is the time when the run was started, or for a folder now."""
    chat_template: str | None
    """The `template_digest` of the tokenizer, to which it was no particular time yet."""
    end_tokens: list[int]
    """The ids that end a response, ascending."""
    directory: Path
    """The directory of the run, or the folder."""

    def restore(self, part: Part, step: int | None = None) -> Any:
        """What `part` takes of the state that a run saved at a step, the model's own where None, placed on the mesh.

        With the optimiser's moments a state is three times as large as its parameters; nothing is read but the part.

        Raises:
          RunError: the run has no such checkpoint, the checkpoint is damaged, or the model is a Hugging Face folder.
        """
        if self.step is None:
            raise RunError(f"{self.directory} is a Hugging Face folder, which has one set of weights")
        like = abstract_state(self.config, self.mesh)
        return Checkpoints(self.directory / "checkpoints").restore(self.step if step is None else step, like, part)[0]

    def params(self, step: int | None = None) -> Params:
        """The weights, placed on the mesh; of a run those of a step, the model's own where None.

        Raises:
          RunError: there are none, or they are damaged.
        """
        if self.step is None and step is None:
            return starting_params(self.config, self.mesh)
        return self.restore(lambda state: state.params, step)

    def average(self) -> Params:
        """The moving average of a run's weights, in their dtypes, placed on the mesh.

        Raises:
          ValueError: the run keeps none.
          RunError: as `restore`.
        """
        average = self.restore(lambda state: average_of(state.opt_state))
        return optax.tree.cast(average, DTYPES[self.config.model.precision.parameters])

    def contract(self) -> Contract:
        """How the policy is sampled: as it was trained to be, or for a folder by the defaults."""
        run = None if self.step is None else identity(self.directory)
        config = self.config
        return contract_of(config.serving, config.rollout, config.task, self.end_tokens, run=run, step=self.step)

    @property
    def version(self) -> int:
        """What the engine calls these weights: the step, or 0 for a Hugging Face folder."""
        return self.step or 0

    def directory_for(self, results: str) -> Path:
        """The directory where results of a tool go, unless it is told otherwise: in the run, or in the working one."""
        return (Path() if self.step is None else self.directory) / results


def open_model(
    source: Path, *, devices: int = 1, recipe_code: bool = True, **sections: Mapping[str, Any]
) -> OpenedModel:
    """Opens a run's newest checkpoint, one checkpoint in a run, or a Hugging Face folder.

    Args:
      source: a run directory, RUN/checkpoints/STEP, or a folder.
      devices: how many share the weights; on one, nothing of a run's sharding is left, in serving neither.
      recipe_code: whether code of a run's own may be executed where its sections are not all of dcjax.
      sections: fields of the config's sections, as `serving={"format": "int8"}`; those that are not given, or None, are
        the run's, or the defaults.

    Raises:
      RunError: there is no such source, it is damaged, or a setting is out of range.
    """
    source = source.resolve()
    try:
        mesh = make_mesh(MeshConfig(fsdp=devices))
        if is_folder(source):
            return _open_folder(source, mesh, sections)
        return _open_run(source, mesh, sections, recipe_code)
    except ValueError as error:
        raise RunError(str(error)) from None


def is_folder(source: Path) -> bool:
    """Whether weights as in a Hugging Face folder lie there, and so no run."""
    return (source / WEIGHTS).exists() or (source / INDEX).exists()


def require_run(source: Path, advice: str) -> None:
    """Refuses a Hugging Face folder where only a run will do.

    Raises:
      RunError: the source is a Hugging Face folder; it ends with the advice.
    """
    if is_folder(source):
        raise RunError(f"{source} is a Hugging Face folder and not a run; {advice}")


def _open_run(source: Path, mesh: Mesh, sections: Mapping[str, Mapping[str, Any]], recipe_code: bool) -> OpenedModel:
    run_dir, step = locate(source)
    recorded = load_config(run_dir, recipe_code=recipe_code)
    config = _placed(_changed(recorded, sections), mesh)
    checkpoints = Checkpoints(run_dir / "checkpoints")
    step = checkpoints.latest() if step is None else step
    checkpoints.require(step)
    try:
        tokenizer = load_tokenizer(run_dir / "tokenizer")
    except ValueError as error:
        folder = config.pretrained
        again = (
            f"dcjax train {run_dir} writes the tokenizer" if folder is None else f"copy the tokenizer of {folder} there"
        )
        raise RunError(f"{error}; {again} again") from None
    return OpenedModel(
        name=run_dir.name,
        step=step,
        config=config,
        trained_on=recorded.mesh,
        mesh=mesh,
        tokenizer=dated(tokenizer, recorded_start(run_dir)),
        chat_template=template_digest(tokenizer),
        end_tokens=run_end_tokens(run_dir, config, tokenizer),
        directory=run_dir,
    )


def _open_folder(source: Path, mesh: Mesh, sections: Mapping[str, Mapping[str, Any]]) -> OpenedModel:
    # A folder has no task, and may be asked for responses that are shorter than the default one's.
    defaults = Config(pretrained=source, task=MathTask(max_prompt_tokens=1), reward=RewardConfig(workers=1))
    config = _placed(with_pretrained_model(_changed(defaults, sections)), mesh)
    tokenizer = load_tokenizer(source)
    return OpenedModel(
        name=source.name,
        step=None,
        config=config,
        trained_on=MeshConfig(),
        mesh=mesh,
        tokenizer=dated(tokenizer, datetime.now()),
        chat_template=template_digest(tokenizer),
        end_tokens=folder_end_tokens(source, tokenizer),
        directory=source,
    )


def _changed(config: Config, sections: Mapping[str, Mapping[str, Any]]) -> Config:
    """The config with those fields of its sections that are not None.

    Raises:
      ValueError: one of them is out of range.
    """
    changed = {
        section: replace(getattr(config, section), **{name: x for name, x in fields.items() if x is not None})
        for section, fields in sections.items()
    }
    return replace(config, **changed)


def _placed(config: Config, mesh: Mesh) -> Config:
    """The config of a model that is opened on a mesh.

    Raises:
      ValueError: the mesh does not divide the model.
    """
    if mesh.size == 1:
        return on_one_device(config)
    check_model(config.model, dict(mesh.shape))
    return replace(config, mesh=MeshConfig())
