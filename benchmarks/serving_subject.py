"""What the benchmarks of `dcjax serve` serve, and what the engine's own loop samples of it."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from depth import WIDTHS  # pyrefly: ignore[missing-import]  (beside this file)

from dcjax.data.tokenizers import byte_tokenizer
from dcjax.models import init_params, save_hf
from dcjax.recipe.build import build_engine
from dcjax.serving.rollout import Sampling, sample_keys, sample_responses
from dcjax.tools.open_model import OpenedModel, open_model
from dcjax.types import Rollout

TRAIN = ["--steps", "1", "--warm_start.steps", "5", "--warm_start.warmup_steps", "1", "--evaluation.prompts", "8"]
TRAIN += ["--rollout.prompts", "4", "--rollout.group_size", "4", "--serving.format", "float32"]
"""Of the quickstart's recipe: a run that is served in float32."""
PROMPTS = 16
"""Different prompts, in turn as text and as tokens."""


@dataclass(frozen=True)
class Subject:
    """A policy that is served, and what it answers."""

    source: Path
    options: list[str]
    model: OpenedModel
    # token ids, and the same as texts
    prompts: list[list[int]]
    texts: list[str]
    # samples of each prompt at most; further requests ask for the same ones again
    group: int
    # tokens of a long response
    long: int


@dataclass(frozen=True)
class Direct:
    """What the engine's own loop samples: each sample in full, [N, T], and its cost (CPU-seconds a token)."""

    rollout: Rollout
    keys: np.ndarray
    cpu: float


def open_subject(source: Path, options: dict[str, int | str], group: int = 1000, long: int | None = None) -> Subject:
    """A run or a folder with `dcjax serve`'s options, and prompts that its tokenizer reads back as they were.

    Args:
      source: the run or folder.
      options: names and values.
      group: samples of each prompt at most.
      long: tokens of a long response; None are as many as are served.
    """
    names = ("max_prompt_length", "max_response_length")
    lengths = {name: options[name] for name in names if name in options}
    serving = {name: value for name, value in options.items() if name not in lengths}
    model = open_model(source, serving=serving, rollout=lengths)
    decode, vocabulary = model.tokenizer.backend_tokenizer.decode, model.tokenizer.get_vocab().values()
    shown = [(token, decode([token], skip_special_tokens=True)) for token in sorted(vocabulary)]
    usable = [token for token, text in shown if len(text) == 1 and text.isascii() and text.isprintable()]
    draw = random.Random(0)
    limits = model.config.rollout
    chosen = [draw.choices(usable, k=draw.randint(1, limits.max_prompt_length)) for _ in range(PROMPTS)]
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    texts = [decode(prompt) for prompt in chosen]
    return Subject(source, flags, model, chosen, texts, group, limits.max_response_length if long is None else long)


def tiny(folder: Path) -> Subject:
    """The quickstart's model after one step."""
    run = folder / "run"
    command = [sys.executable, "-m", "dcjax", "train", "quickstart", "--run-dir", str(run), *TRAIN]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return open_subject(run, {})


def smollm2(folder: Path) -> Subject:
    """SmolLM2-135M's sizes; few slots and tokens, and 96 different samples, so that it takes minutes on two cores."""
    tokenizer, source = byte_tokenizer(), folder / "smollm2"
    tokenizer.save_pretrained(folder / "tokenizer")
    save_hf(source, WIDTHS, init_params(WIDTHS, jax.random.key(0)), tokenizer_from=folder / "tokenizer")
    sizes = {"slots": 8, "steps_per_call": 4, "max_prompt_length": 16, "max_response_length": 48}
    return open_subject(source, {"format": "float32", **sizes}, group=6, long=8)


def sample_directly(subject: Subject, group: int) -> Direct:
    """A group of samples of each prompt by the engine's own loop, all of them to their ends."""
    model, key = subject.model, jax.random.key(1)
    engine = build_engine(model.config, model.mesh, model.end_tokens)
    params = engine.sync(model.params(), model.step or 0)
    settings = {"samples_per_prompt": group, "temperature": model.config.rollout.temperature, "key": key}
    Sampling(engine, params, subject.prompts, **settings).advance(params)
    began = time.process_time()
    rollout = sample_responses(engine, params, subject.prompts, **settings)
    taken = time.process_time() - began
    keys = np.asarray(sample_keys(key, np.arange(group * len(subject.prompts))))
    return Direct(rollout, keys, taken / int(rollout.response_mask.sum()))


MODELS = {"tiny": tiny, "smollm2": smollm2}
