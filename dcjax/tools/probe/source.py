"""What can be probed: a run, one of its checkpoints, a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from dcjax.data.task import encode_prompts
from dcjax.data.tokenizers import load_tokenizer
from dcjax.errors import RunError
from dcjax.loop.checkpoint import Checkpoints
from dcjax.loop.end_tokens import folder_end_tokens, run_end_tokens
from dcjax.loop.evaluate import HELDOUT_SEED
from dcjax.loop.run_directory import load_config, locate
from dcjax.recipe.build import abstract_state, open_problems, starting_params
from dcjax.recipe.config import Config
from dcjax.recipe.serving import ServingConfig
from dcjax.sharding.mesh import MeshConfig, make_mesh
from dcjax.tools.open_model import folder_config, is_folder
from dcjax.tools.probe.policies import Weights

PROMPTS = 128
"""Sampled from, one response each, where nothing else is asked for."""


@dataclass(frozen=True)
class Source:
    """A model with its settings and prompts, loaded."""

    name: str
    # None of a Hugging Face folder
    step: int | None
    # on one device
    config: Config
    # that it was trained on
    mesh: MeshConfig
    tokenizer: PreTrainedTokenizerFast
    # ids that end a response
    end_tokens: list[int]
    prompts: list[list[int]]
    weights: Weights
    # of the weights that are served; None where they are the trainer's own
    stale_step: int | None
    # where results go, unless told otherwise
    out: Path


def load_source(
    path: Path,
    *,
    format: str | None = None,
    kv_cache: str | None = None,
    prompts: int | None = None,
    prompts_file: Path | None = None,
    stale_step: int | None = None,
) -> Source:
    """A run's newest checkpoint, one checkpoint in a run, or a Hugging Face folder.

    Args:
      path: a run directory, RUN/checkpoints/STEP, or a folder.
      format: serving format; None is the run's, or the default of `ServingConfig`.
      kv_cache: likewise.
      prompts: how many; PROMPTS where None.
      prompts_file: of a folder, one prompt a line: {"prompt": ...} or the text itself.
      stale_step: of a run, the checkpoint whose weights are served.

    Raises:
      RunError: no such source, a damaged one, or a setting out of range or of the other kind of source.
    """
    path = path.resolve()
    count = PROMPTS if prompts is None else prompts
    if count < 1:
        raise RunError(f"prompts is {count}; it must be at least 1")
    serving = {name: value for name, value in (("format", format), ("kv_cache", kv_cache)) if value is not None}
    try:
        if is_folder(path):
            if stale_step is not None:
                raise RunError(f"stale is {stale_step}; {path} is a Hugging Face folder, which has one set of weights")
            return _load_folder(path, serving, prompts_file, count)
        if prompts_file is not None:
            raise RunError(f"prompts-file is {prompts_file}; {path} is a run, whose held-out problems are the prompts")
        return _load_run(path, serving, stale_step, count)
    except ValueError as error:
        raise RunError(str(error)) from None


def _load_run(path: Path, serving: dict[str, Any], stale_step: int | None, count: int) -> Source:
    run_dir, step = locate(path)
    recorded = load_config(run_dir)
    config = replace(recorded, mesh=MeshConfig(), serving=replace(recorded.serving, **serving))
    like, checkpoints = abstract_state(config, make_mesh(config.mesh)), Checkpoints(run_dir / "checkpoints")
    state, loop = checkpoints.restore(checkpoints.latest() if step is None else step, like)
    if stale_step is not None:
        stale = checkpoints.restore(stale_step, like)[0].params
    else:
        stale, stale_step = (
            (state.history[0], max(loop.step - len(state.history), 0)) if state.history else (None, None)
        )
    version = loop.step if stale_step is None else stale_step
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    problems = open_problems(config, tokenizer).problems("heldout", HELDOUT_SEED, 0, count)
    return Source(
        name=run_dir.name,
        step=loop.step,
        config=config,
        mesh=recorded.mesh,
        tokenizer=tokenizer,
        end_tokens=run_end_tokens(run_dir, config, tokenizer),
        prompts=encode_prompts(tokenizer, problems),
        weights=Weights(state.params, stale, version),
        stale_step=stale_step,
        out=run_dir / "probe",
    )


def _load_folder(path: Path, serving: dict[str, Any], prompts_file: Path | None, count: int) -> Source:
    if prompts_file is None:
        raise RunError(f"{path} is a Hugging Face folder, which has no prompts; give some with --prompts-file")
    tokenizer = load_tokenizer(path)
    prompts = [tokenizer(text)["input_ids"] for text in read_prompts(prompts_file)[:count]]
    config = folder_config(path, ServingConfig(**serving), max_prompt_length=max(map(len, prompts)))
    return Source(
        name=path.name,
        step=None,
        config=config,
        mesh=config.mesh,
        tokenizer=tokenizer,
        end_tokens=folder_end_tokens(path, tokenizer),
        prompts=prompts,
        weights=Weights(starting_params(config, make_mesh(config.mesh)), None, 0),
        stale_step=None,
        out=Path("probe"),
    )


def read_prompts(path: Path) -> list[str]:
    """One prompt a line, {"prompt": ...} or the text itself; empty lines are none.

    Raises:
      RunError: a line in braces that is not such an object, no text in UTF-8, or no prompt at all.
    """
    try:
        prompts = list(_prompts(path, path.read_text(encoding="utf-8")))
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is not UTF-8: {error}") from None
    if not prompts:
        raise RunError(f"{path} has no prompt; it takes one a line")
    return prompts


def _prompts(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            yield line.rstrip("\r")
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, RecursionError):
            prompt = None
        if not isinstance(prompt, str) or not prompt:
            raise RunError(f'{path}, line {number}: {line[:60]!r} is no JSON object with a text "prompt"')
        yield prompt
