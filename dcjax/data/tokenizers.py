"""Tokenizers: that of a model's folder, or one of bytes for models that have none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
        raise ValueError(f"no tokenizer can be read in {folder}: {str(error).splitlines()[0]}") from None
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {folder} has no end token; a response could not end")
    return tokenizer
