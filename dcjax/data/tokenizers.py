"""Tokenizers: that of a model's folder, or one of bytes for models that have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER = "tokenizer.json"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each byte of UTF-8 after <pad> and <eos>, 258 in all.

    It adds no beginning or end by itself, reads "<eos>" in a text as the five characters, and decodes what it encoded
    to exactly the same text. It has no chat template.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pad, eos = "<pad>", "<eos>"
    vocabulary = {
        token: number for number, token in enumerate([pad, eos, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=eos,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a Hugging Face folder.

    Raises:
      ValueError: there is no tokenizer, it is damaged, or it has no end token.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises an exception of its own, from Rust
        raise ValueError(
            _fault(folder) or f"{folder} holds no tokenizer that can be read: {_one_line(error)}"
        ) from None
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {folder} has no end token; a response could not end")
    return tokenizer


def _fault(folder: Path) -> str | None:
    """What is wrong with the files of a tokenizer that could not be loaded; None if all can be read as JSON."""
    for name in (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        try:
            json.loads((folder / name).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (ValueError, RecursionError) as error:
            return f"{folder / name} is damaged: it must be JSON ({_one_line(error)})"
        except OSError as error:
            return f"{folder / name} cannot be read: {error.strerror}"
    if (folder / TOKENIZER).exists():
        return None
    if (folder / "vocab.json").exists():
        return (
            f"no tokenizer in {folder}: it has vocab.json and no {TOKENIZER}, which transformers writes from it: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    return f"no tokenizer in {folder}: it must have a {TOKENIZER}"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
