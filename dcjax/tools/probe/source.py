"""The input of a probe: a model, the prompts that it gets, and the weights that are served."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dcjax.data.task import encode_prompts
from dcjax.errors import RunError
from dcjax.loop.evaluate import HELDOUT_SEED
from dcjax.models import read_max_new_tokens
from dcjax.recipe.build import PastParams, open_problems
from dcjax.reporting.record import check_writable
from dcjax.serving.formats import serving_format
from dcjax.tools.open_model import OpenedModel, is_folder, open_model
from dcjax.tools.probe.ladder import ladder
from dcjax.tools.probe.policies import Policies, Weights
from dcjax.user_code import refusals_of

PROMPTS = 128
"""The default number of prompts, each of which gets one response."""
FOLDER_LENGTH = 256
"""Tokens of a response to a Hugging Face folder's prompts by default, at most."""


@dataclass(frozen=True)
class Source:
    """A model on one device as it is deployed in one format, with its prompts and its weights, loaded."""

    model: OpenedModel
    prompts: list[list[int]]
    weights: Weights
    stale_step: int | None
    """The step of the weights that are served; None if they are the trainer's own."""
    out: Path
    """The directory of the results."""


def load_sources(
    path: Path,
    *,
    formats: Sequence[str] = (),
    kv_cache: str | None = None,
    slots: int | None = None,
    prompts: int | None = None,
    prompts_file: Path | None = None,
    max_response_length: int | None = None,
    stale_step: int | None = None,
    out: Path | None = None,
    recipe_code: bool = True,
) -> list[Source]:
    """A run's newest checkpoint, one checkpoint in a run, or a Hugging Face folder, in each format that is asked for.

    Everything is read once, and what cannot be served is refused before the weights are.

    Args:
      path: a run directory, RUN/checkpoints/STEP, or a folder.
      formats: names of serving formats; none stands for the run's, or the default of `ServingConfig`.
      kv_cache: the dtype that keys and values are stored in; None is the run's, or the formats' own.
      slots: how many responses are decoded at once; None is the run's, or the default of `ServingConfig`.
      prompts: how many prompts; None is PROMPTS.
      prompts_file: for a folder, a file with one prompt per line: {"prompt": ...} or the text itself.
      max_response_length: longest response, in tokens; None is the run's, or for a folder the least of FOLDER_LENGTH,
        `read_max_new_tokens` and what the model's positions leave behind the longest prompt.
      stale_step: for a run, the checkpoint whose weights are served.
      out: the directory of the results; None is RUN/probe or ./probe.
      recipe_code: whether a run's own code may be executed, if its recipe has sections from outside dcjax.

    Raises:
      RunError: the source does not exist or is damaged, a setting is out of range or for the other kind of source, or
        the model, the hardware or its memory cannot serve a format.
      OSError: results cannot be written; no weights have been read then.
    """
    path = path.resolve()
    count = PROMPTS if prompts is None else prompts
    if count < 1:
        raise RunError(f"prompts is {count}; it must be at least 1")
    serving = {"kv_cache": kv_cache, "slots": slots}
    if is_folder(path):
        if stale_step is not None:
            raise RunError(f"stale is {stale_step}; {path} is a Hugging Face folder, which has one set of weights")
        if prompts_file is None:
            raise RunError(f"{path} is a Hugging Face folder, which has no prompts; give some with --prompts-file")
        # Both lengths follow from the prompts, which its tokenizer reads.
        model = open_model(path, serving=serving, rollout={"max_prompt_length": 1, "max_response_length": 1})
        encoded = [model.tokenizer(text)["input_ids"] for text in read_prompts(prompts_file)[:count]]
        model = _for_lengths(model, encoded, max_response_length)
    else:
        if prompts_file is not None:
            raise RunError(f"prompts-file is {prompts_file}; {path} is a run, whose held-out problems are the prompts")
        rollout = {"max_response_length": max_response_length}
        model = open_model(path, recipe_code=recipe_code, serving=serving, rollout=rollout)
        encoded = _heldout(model, count)
    out = model.directory_for("probe") if out is None else out
    check_writable(out)
    models = [_deployed(model, format) for format in dict.fromkeys(formats)] or [model]
    for each in models:
        _check_served(each)
    weights, stale_step = _weights(model, stale_step)
    return [Source(each, encoded, weights, stale_step, out) for each in models]


def _for_lengths(model: OpenedModel, prompts: Sequence[Sequence[int]], response: int | None) -> OpenedModel:
    """A folder's model for prompts as long as the longest, and for responses of so many tokens or of the default."""
    longest = max(map(len, prompts))
    positions = model.config.model.longest_sequence
    if (room := positions - longest) < 1:
        raise RunError(
            f"the longest prompt takes {longest} tokens; {model.name} has {positions} positions, for a response too"
        )
    if response is not None and response > room:
        raise RunError(
            f"max-response-length is {response}; {model.name} has {positions} positions, of which the longest prompt "
            f"leaves {room}"
        )
    try:
        if response is None:
            response = min(FOLDER_LENGTH, read_max_new_tokens(model.directory) or FOLDER_LENGTH, room)
        rollout = replace(model.config.rollout, max_prompt_length=longest, max_response_length=response)
        return replace(model, config=replace(model.config, rollout=rollout))
    except ValueError as error:
        raise RunError(str(error)) from None


def _heldout(model: OpenedModel, count: int) -> list[list[int]]:
    """The first of a run's held-out problems, as tokens."""
    problems = open_problems(model.config, model.tokenizer)
    with refusals_of(model.config.task, problems):
        return encode_prompts(model.tokenizer, problems.problems("heldout", HELDOUT_SEED, 0, count))


def _deployed(model: OpenedModel, format: str) -> OpenedModel:
    """The model with a serving format by its name: one of dcjax, or the run's own, which may be from outside."""
    if format == serving_format(model.config.serving.format).name:
        return model
    name: Any = format
    try:
        serving = replace(model.config.serving, format=name)
        return replace(model, config=replace(model.config, serving=serving))
    except ValueError as error:
        raise RunError(str(error)) from None


def _check_served(model: OpenedModel) -> None:
    """Refuses a model of which a rung of the ladder cannot be served."""
    config, policies = model.config, Policies(model.config, model.end_tokens)
    for rung in ladder(config.serving, config.mismatch, trained_in=config.model.precision.compute):
        policies.engine(rung.served)


def _weights(model: OpenedModel, stale_step: int | None) -> tuple[Weights, int | None]:
    """The trainer's and the served weights, and the step of these if it is another one."""
    stale, lag = None, PastParams.needed_by(model.config).history
    if stale_step is not None:
        params, stale = model.params(), model.params(stale_step)
    elif lag:
        # A run whose serving weights lag has kept those that it serves.
        params, stale = model.restore(lambda state: (state.params, state.history[0]))
        stale_step = max(model.version - lag, 0)
    else:
        params = model.params()
    return Weights(params, stale, version=model.version if stale_step is None else stale_step), stale_step


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
