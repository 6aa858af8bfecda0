"""The tokenizer of a GGUF file, built anew as a tokenizer.json and its tokenizer_config.json.

llama.cpp keeps the tokens, and either the merges of a byte-level BPE with the name of how a text is cut before merging,
or the scores of a SentencePiece BPE.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dcjax.data.tokenizers import TOKENIZER
from dcjax.models.hf_files import quote
from dcjax.tools.gguf.container import Container

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_CONFIG = "tokenizer_config.json"
MAX_PIECE = 256
"""Longest token of a SentencePiece model, in characters, of which all cuts in two are tried."""

# types of tokens
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_LETTERS}|\p{{N}}|{_REST}"
_LLAMA3 = rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"


@dataclass(frozen=True)
class _Cut:
    """How a byte-level BPE treats a text before it merges, by the model that it was trained for."""

    patterns: tuple[str, ...]
    """Regular expressions: each cuts the pieces that those before it have left."""
    composed: bool = False
    """Whether the text is brought into Unicode's form NFC, which llama.cpp leaves out."""
    whole_words: bool = False
    """Whether a piece that is a token is that token, whatever the merges make of it."""
    begins: bool = False
    """Whether a text begins with the begin token, where the file does not say."""


_CUTS = {
    # llama.cpp's own, for files that do not say
    "default": _Cut((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _Cut((_GPT2,)),
    "smollm": _Cut((r"\p{N}", _GPT2)),
    "qwen2": _Cut((_QWEN2,), composed=True),
    "deepseek-r1-qwen": _Cut((_QWEN2,), composed=True),
    "llama-bpe": _Cut((_LLAMA3,), whole_words=True, begins=True),
}
"""By the values of tokenizer.ggml.pre."""


@dataclass(frozen=True)
class ReadTokenizer:
    """A GGUF file's tokenizer, as files of a Hugging Face folder."""

    files: Mapping[str, str]
    """Texts of tokenizer.json and tokenizer_config.json by their names."""
    token_ids: Mapping[str, int | list[int]]
    """bos_token_id, eos_token_id (one, or all that end a response), and pad_token_id, those that the file names."""


def read_tokenizer(container: Container, vocab_size: int) -> ReadTokenizer:
    """The tokenizer of a GGUF file.

    A chat template is stored and never rendered. The tokens that only fill the vocabulary up to the size of the
    embedding table are left out.

    Args:
      container: the file.
      vocab_size: the number of rows of its embedding table, which has at least one for each token.

    Raises:
      ValueError: the file has no tokenizer, one of another kind than byte-level or SentencePiece BPE, or one that cuts
        texts in a way that is not known; or it is damaged; the message is one line.
    """
    model = container.text("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise container.refuse("tokenizer.ggml.model", "gpt2 or llama, the ones supported")
    tokens = _tokens(container, vocab_size)
    types = _types(container, len(tokens))
    ids = _special_ids(container, types)
    tokens = tokens[: _used(types, ids)]
    tokenizer = _byte_level(container, tokens) if model == "gpt2" else _sentence_piece(container, tokens, types)
    _add_tokens(tokenizer, tokens, types, ids)
    _add_ends(container, tokenizer, tokens, ids, begins=model == "llama" or _cut(container).begins)
    ends = sorted({ids[kind] for kind in ("eos", "eot", "eom") if kind in ids})
    named: dict[str, int | list[int]] = {f"{kind}_token_id": ids[kind] for kind in ("bos", "pad") if kind in ids}
    config = _config(container, tokens, ids)
    files = {TOKENIZER: tokenizer.to_str(), TOKENIZER_CONFIG: json.dumps(config, indent=2, sort_keys=True) + "\n"}
    return ReadTokenizer(files, named | {"eos_token_id": ends if len(ends) > 1 else ends[0]})


def _tokens(container: Container, vocab_size: int) -> list[str]:
    tokens = container.texts("tokenizer.ggml.tokens")
    if len(tokens) > vocab_size:
        raise ValueError(
            f"{container.path}: tokenizer.ggml.tokens has {len(tokens)} tokens, and the embedding table {vocab_size} "
            "rows; it must have one for each"
        )
    if len(set(tokens)) < len(tokens) or "" in tokens:
        seen: set[str] = {""}
        first = next(token for token in tokens if token in seen or seen.add(token))
        raise ValueError(
            f"{container.path}: tokenizer.ggml.tokens has {quote(first)} {'twice' if first else 'as a token'}; "
            "tokens must be different strings, none of them empty"
        )
    return tokens


def _types(container: Container, count: int) -> np.ndarray:
    """The type of each token; normal ones if the file does not say."""
    if "tokenizer.ggml.token_type" not in container.metadata:
        return np.full(count, _NORMAL)
    return container.numbers("tokenizer.ggml.token_type", count)


def _special_ids(container: Container, types: np.ndarray) -> dict[str, int]:
    """The ids that the file names, by bos, eos, eot, eom, unk and pad."""
    keys = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding"}
    ids = {
        kind: container.integer(key, most=len(types) - 1)
        for kind, name in keys.items()
        if (key := f"tokenizer.ggml.{name}_token_id") in container.metadata or kind == "eos"
    }
    # a text would be cut at them: some files name a letter or "!" because they have nothing better
    return {kind: number for kind, number in ids.items() if kind not in ("unk", "pad") or types[number] != _NORMAL}


def _used(types: np.ndarray, ids: Mapping[str, int]) -> int:
    """The number of tokens without those at the end that are not used."""
    used = np.flatnonzero(types != _UNUSED)
    return max(int(used[-1]) + 1 if len(used) else 0, *(number + 1 for number in ids.values()))


def _cut(container: Container) -> _Cut:
    if container.text("tokenizer.ggml.pre") not in _CUTS:
        raise container.refuse("tokenizer.ggml.pre", f"one of those known, {', '.join(_CUTS)}")
    return _CUTS[container.text("tokenizer.ggml.pre")]


def _byte_level(container: Container, tokens: Sequence[str]) -> Tokenizer:
    """A BPE of bytes, each written as one of 256 characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    cut = _cut(container)
    if container.flag("tokenizer.ggml.add_space_prefix", False):
        raise container.refuse("tokenizer.ggml.add_space_prefix", "false, the only one supported of a byte-level BPE")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [_merge(container, merge, vocabulary) for merge in container.texts("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut.whole_words))
    if cut.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merge(container: Container, merge: str, vocabulary: Mapping[str, int]) -> tuple[str, str]:
    # a space that begins the left one is its own
    left, _, right = merge[1:].partition(" ")
    left = merge[:1] + left
    if not (left in vocabulary and right in vocabulary and left + right in vocabulary):
        raise ValueError(
            f"{container.path}: tokenizer.ggml.merges has {quote(merge)}; it must be two tokens with a space between, "
            "which together are a token"
        )
    return left, right


def _sentence_piece(container: Container, tokens: Sequence[str], types: np.ndarray) -> Tokenizer:
    """A BPE of characters, and of bytes for those that are no tokens, which merges what has the highest score."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    for key in ("tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.precompiled_charsmap"):
        if key in container.metadata and container.metadata[key] is not False:
            raise container.refuse(key, "absent: a text must reach a SentencePiece model as it is")
    scores = container.numbers("tokenizer.ggml.scores", len(types))
    if not np.isfinite(scores).all():
        raise ValueError(f"{container.path}: tokenizer.ggml.scores has an infinity or a NaN; scores must be finite")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    unknown = [token for token, kind in zip(tokens, types, strict=False) if kind == _UNKNOWN]
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            _merges_by_score(container, tokens, types, scores),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = container.flag("tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            *(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return tokenizer


def _merges_by_score(
    container: Container, tokens: Sequence[str], types: np.ndarray, scores: np.ndarray
) -> list[tuple[str, str]]:
    """All pairs of normal tokens that together are one, by descending score of it."""
    normal = {token for token, kind in zip(tokens, types, strict=False) if kind == _NORMAL}
    if longest := [token for token in normal if len(token) > MAX_PIECE]:
        raise ValueError(
            f"{container.path}: tokenizer.ggml.tokens has {quote(longest[0])} of {len(longest[0])} characters; "
            f"those of a SentencePiece model must have at most {MAX_PIECE}"
        )
    merges = []
    # a stable sort: of equal scores the first token, of one token the shortest left part
    for number in np.argsort(-scores[: len(tokens)].astype(np.float64), kind="stable"):
        if (token := tokens[number]) in normal:
            cuts = ((token[:end], token[end:]) for end in range(1, len(token)))
            merges += [pair for pair in cuts if normal.issuperset(pair)]
    return merges


def _add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: np.ndarray, ids: Mapping[str, int]) -> None:
    """Adds the tokens that a text is cut at before anything else; those that control are left out of decoded texts."""
    from tokenizers import AddedToken

    named = set(ids.values())
    control = [
        AddedToken(token, normalized=False, special=kind != _USER or number in named)
        for number, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind in (_UNKNOWN, _CONTROL, _USER) or number in named
    ]
    tokenizer.add_tokens(control)


def _add_ends(
    container: Container, tokenizer: Tokenizer, tokens: Sequence[str], ids: Mapping[str, int], *, begins: bool
) -> None:
    """Makes every text begin with the begin token and end with the end token, where the file says so."""
    from tokenizers import processors

    added = {}
    for kind, default in (("bos", begins), ("eos", False)):
        key = f"tokenizer.ggml.add_{kind}_token"
        if container.flag(key, default):
            if kind not in ids:
                raise container.refuse(f"tokenizer.ggml.{kind}_token_id", f"the id of a token, as {key} is true")
            added[kind] = {"id": kind, "ids": [ids[kind]], "tokens": [tokens[ids[kind]]]}
    if added:
        begin, end = ([kind] if kind in added else [] for kind in ("bos", "eos"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end],
            pair=[*begin, "$A", *end, *begin, "$B:1", *end],
            special_tokens=list(added.values()),
        )


def _config(container: Container, tokens: Sequence[str], ids: Mapping[str, int]) -> dict[str, Any]:
    """The fields of tokenizer_config.json."""
    fields: dict[str, Any] = {
        f"{kind}_token": tokens[ids[kind]] for kind in ("bos", "eos", "unk", "pad") if kind in ids
    }
    fields |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": container.integer(f"{container.text('general.architecture')}.context_length"),
    }
    prefix = "tokenizer.chat_template"
    named = {
        key.removeprefix(f"{prefix}."): container.text(key)
        for key in container.metadata
        if key.startswith(f"{prefix}.")
    }
    if prefix in container.metadata:
        named = {"default": container.text(prefix), **named}
    if list(named) == ["default"]:
        fields["chat_template"] = named["default"]
    elif named:
        fields["chat_template"] = [{"name": name, "template": template} for name, template in named.items()]
    return fields
