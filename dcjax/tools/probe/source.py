"""The input of a probe: a model, the prompts that it gets, and the weights that are served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dcjax.data.task import encode_prompts
from dcjax.errors import RunError
from dcjax.loop.evaluate import HELDOUT_SEED
from dcjax.recipe.build import PastParams, open_problems
from dcjax.reporting.record import check_writable
from dcjax.tools.open_model import OpenedModel, is_folder, open_model
from dcjax.tools.probe.policies import Weights
from dcjax.user_code import refusals_of

PROMPTS = 128
"""The default number of prompts, each of which gets one response."""


@dataclass(frozen=True)
class Source:
    """A model on one device with its prompts and its weights, loaded."""

    model: OpenedModel
    prompts: list[list[int]]
    weights: Weights
    stale_step: int | None
    """The step of the weights that are served; None if they are the trainer's own."""
    out: Path
    """The directory of the results."""


def load_source(
    path: Path,
    *,
    format: str | None = None,
    kv_cache: str | None = None,
    prompts: int | None = None,
    prompts_file: Path | None = None,
    max_response_length: int | None = None,
    stale_step: int | None = None,
    out: Path | None = None,
    recipe_code: bool = True,
) -> Source:
    """A run's newest checkpoint, one checkpoint in a run, or a Hugging Face folder.

    Args:
      path: a run directory, RUN/checkpoints/STEP, or a folder.
      format: the serving format; None is the run's, or the default of `ServingConfig`.
      kv_cache: likewise the dtype that keys and values are stored in.
      prompts: how many prompts; None is PROMPTS.
      prompts_file: for a folder, a file with one prompt per line: {"prompt": ...} or the text itself.
      max_response_length: longest response, in tokens; None is the run's, or the default of `RolloutConfig`.
      stale_step: for a run, the checkpoint whose weights are served.
      out: the directory of the results; None is RUN/probe or ./probe.
      recipe_code: whether a run's own code may be executed, if its recipe has sections from outside dcjax.

    Raises:
      RunError: the source does not exist or is damaged, or a setting is out of range or for the other kind of source.
      OSError: results cannot be written; no weights have been read then.
    """
    path = path.resolve()
    count = PROMPTS if prompts is None else prompts
    if count < 1:
        raise RunError(f"prompts is {count}; it must be at least 1")
    sections = {
        "serving": {"format": format, "kv_cache": kv_cache},
        "rollout": {"max_response_length": max_response_length},
    }
    if not is_folder(path):
        if prompts_file is not None:
            raise RunError(f"prompts-file is {prompts_file}; {path} is a run, whose held-out problems are the prompts")
        return _of_run(open_model(path, recipe_code=recipe_code, **sections), stale_step, count, out)
    if stale_step is not None:
        raise RunError(f"stale is {stale_step}; {path} is a Hugging Face folder, which has one set of weights")
    if prompts_file is None:
        raise RunError(f"{path} is a Hugging Face folder, which has no prompts; give some with --prompts-file")
    return _of_folder(open_model(path, **sections), prompts_file, count, out)


def _writable(model: OpenedModel, out: Path | None) -> Path:
    """The directory of the results, which can be written to."""
    out = model.directory_for("probe") if out is None else out
    check_writable(out)
    return out


def _of_run(model: OpenedModel, stale_step: int | None, count: int, out: Path | None) -> Source:
    """A run, with its held-out problems as prompts."""
    out = _writable(model, out)
    problems = open_problems(model.config, model.tokenizer)
    with refusals_of(model.config.task, problems):
        prompts = encode_prompts(model.tokenizer, problems.problems("heldout", HELDOUT_SEED, 0, count))
    step, stale, lag = model.version, None, PastParams.needed_by(model.config).history
    if stale_step is not None:
        params, stale = model.params(), model.params(stale_step)
    elif lag:
        # A run whose serving weights lag has kept those that it serves.
        params, stale = model.restore(lambda state: (state.params, state.history[0]))
        stale_step = max(step - lag, 0)
    else:
        params = model.params()
    weights = Weights(params, stale, version=step if stale_step is None else stale_step)
    return Source(model, prompts, weights, stale_step, out)


def _of_folder(model: OpenedModel, prompts_file: Path, count: int, out: Path | None) -> Source:
    """A folder with the prompts of a file; its engine takes prompts as long as the longest."""
    out = _writable(model, out)
    prompts = [model.tokenizer(text)["input_ids"] for text in read_prompts(prompts_file)[:count]]
    longest = max(model.config.rollout.max_prompt_length, *map(len, prompts))
    rollout = replace(model.config.rollout, max_prompt_length=longest)
    weights = Weights(model.params(), None, version=0)
    model = replace(model, config=replace(model.config, rollout=rollout))
    return Source(model, prompts, weights, stale_step=None, out=out)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one per line: {"prompt": ...} or the text itself; empty lines are skipped.

    Raises:
      RunError: a line in braces is not such an object, the file is not UTF-8, or it has no prompt.
    """
    try:
        prompts = list(_prompts(path, path.read_text(encoding="utf-8")))
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is not UTF-8: {error}") from None
    if not prompts:
        raise RunError(f"{path} has no prompt; it must have one per line")
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
            raise RunError(f'{path}, line {number}: {line[:60]!r} is not a JSON object with a text "prompt"')
        yield prompt
