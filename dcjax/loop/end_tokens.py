"""Which tokens end a response: those that a model's folder names, kept with the run that begins from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dcjax.errors import RunError
from dcjax.loop.run_directory import goes_on, recorded_end_tokens
from dcjax.models import read_config, read_end_tokens
from dcjax.models.hf_config import end_tokens_in
from dcjax.recipe.config import Config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def starting_end_tokens(config: Config, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids that end a response of a run which begins, or goes on as it began; ascending.

    Raises:
      RunError: as `folder_end_tokens` and `run_end_tokens`, or `config.directory` holds a run of another config.
    """
    if goes_on(config):
        return run_end_tokens(config.directory, config, tokenizer)
    if config.pretrained is not None:
        return folder_end_tokens(config.pretrained, tokenizer)
    return [tokenizer.eos_token_id]


def folder_end_tokens(folder: Path, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokenizer's end token and those that a Hugging Face folder names (`read_end_tokens`), ascending.

    Raises:
      RunError: one of them is no id of the model's vocabulary.
    """
    try:
        named, vocab_size = read_end_tokens(folder), read_config(folder).vocab_size
        own = {"eos_token_id": tokenizer.eos_token_id}
        return sorted({*named, *end_tokens_in(own, f"the tokenizer for {folder}", vocab_size=vocab_size)})
    except ValueError as error:
        raise RunError(str(error)) from None


def run_end_tokens(directory: Path, config: Config, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Those that a run's responses end in, ascending: as recorded, or of an older run its tokenizer's own.

    Raises:
      RunError: as `recorded_end_tokens`.
    """
    return recorded_end_tokens(directory, config) or [tokenizer.eos_token_id]
