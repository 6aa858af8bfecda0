"""Tokenizers from GGUF files, against a loop that merges by hand, SentencePiece itself, and pieces cut by hand."""

import io
import itertools
import json
import unicodedata

import pytest
import regex
import sentencepiece
from gguf_files import TOKENS, Sizes, gguf_bytes, metadata, tensors
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from dcjax.data.tokenizers import load_tokenizer
from dcjax.tools.gguf.container import open_container
from dcjax.tools.gguf.tokenizer import MAX_PIECE, read_tokenizer

pytest.importorskip("gguf")

GPT2 = r"'(?:s|t|re|ve|m|ll|d)|[ ]?\p{L}+|[ ]?\p{N}+|[ ]?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SINCE = r"(?i:'(?:s|t|re|ve|m|ll|d))|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,{}}}|[ ]?[^\s\p{{L}}\p{{N}}]+[\r\n]*" + (
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "qwen2": [SINCE.format(1)],
    "deepseek-r1-qwen": [SINCE.format(1)],
    "llama-bpe": [SINCE.format(3)],
    "default": [r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9]{3}"],
}
COMPOSED = ("qwen2", "deepseek-r1-qwen")
CORPUS = [
    "The sum of 3 and 4 is 7, and it's what we'd expect; they've DON'T'd 1234567 times.",
    "def f(x):\n    return x ** 2 + 3 * x - 17  # naïve café\r\n\r\n\tpass",
    "Die Größe beträgt 12,5 % — 中文字符和数字 2024年。 Ωμέγα, привет мир, नमस्ते 123 ४५६",
    "the the the then there these 🙂🙂 👩‍👩‍👧 \\boxed{42} $$x^2 = 9$$",
] * 3
SPECIAL = ["<|start|>", "<|end|>", "<｜begin▁of｜>"]
PARTS = [*"aeths'TDRVLM 0123456789\n\r\t.,!-é中Ω\u0301ſ½\u2028\u00a0", "the", "'ll", "'S", "  "]
WORDS = sorted({word for line in CORPUS for word in line.split(" ")})
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40),
    st.lists(st.sampled_from(PARTS), max_size=30).map("".join),
    # what there are tokens for, and so merges that compete
    st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join),
    st.lists(st.sampled_from(WORDS).map(lambda word: word[1:]), max_size=12).map("".join),
)


def letters():
    """The characters that stand for bytes: those that can be seen for themselves, the others from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


LETTERS = letters()


def trained():
    """Tokens and merges of a small byte-level BPE, the special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=LETTERS, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(pair) for pair in model["merges"]]


BPE_TOKENS, BPE_MERGES = trained()


def cut(pieces, pattern):
    """Each piece cut into the matches of a pattern and what lies between them."""
    for piece in pieces:
        end = 0
        for found in regex.finditer(pattern, piece):
            yield from (part for part in (piece[end : found.start()], found.group()) if part)
            end = found.end()
        if piece[end:]:
            yield piece[end:]


def by_hand(text, pre):
    """The ids of a text without special tokens: cut, then merge the pair that was learned first, again and again."""
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(BPE_MERGES)}
    ids = {token: number for number, token in enumerate(BPE_TOKENS)}
    pieces = [unicodedata.normalize("NFC", text) if pre in COMPOSED else text]
    for pattern in PATTERNS[pre]:
        pieces = list(cut(pieces, pattern))
    result = []
    for piece in pieces:
        parts = [LETTERS[byte] for byte in piece.encode()]
        if pre == "llama-bpe" and "".join(parts) in ids:
            parts = ["".join(parts)]
        while pairs := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
            first = min(pairs, key=ranks.get)
            merged, at = [], 0
            while at < len(parts):
                both = tuple(parts[at : at + 2]) == first
                merged.append("".join(parts[at : at + 1 + both]))
                at += 1 + both
            parts = merged
        result += [ids[part] for part in parts]
    return result


def write(path, **changes):
    """A file with this tokenizer and weights to match."""
    fields = metadata(**changes)
    sizes = Sizes(vocabulary=len(fields["tokenizer.ggml.tokens"]))
    path.write_bytes(gguf_bytes(fields, tensors(sizes=sizes)))
    return open_container(path), sizes.vocabulary


def folder_of(path, **changes):
    """A folder with the tokenizer that an import writes."""
    read = read_tokenizer(*write(path / "model.gguf", **changes))
    for name, text in read.files.items():
        (path / name).write_text(text, encoding="utf-8")
    return path, read


BYTE_LEVEL = {
    "tokenizer__ggml__tokens": BPE_TOKENS,
    "tokenizer__ggml__merges": BPE_MERGES,
    "tokenizer__ggml__token_type": [3 if token in SPECIAL else 1 for token in BPE_TOKENS],
    "tokenizer__ggml__eos_token_id": 1,
}


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """Tokenizers by what cuts a text before merging, as dcjax loads them."""
    return {
        pre: load_tokenizer(
            folder_of(
                tmp_path_factory.mktemp(pre),
                **BYTE_LEVEL,
                tokenizer__ggml__pre=pre,
                tokenizer__ggml__bos_token_id=0,
                tokenizer__ggml__add_bos_token=False,
            )[0]
        )
        for pre in PATTERNS
    }


@example(text="cafe\u0301 A\u030a", pre="qwen2")
@example(text="cafe\u0301 A\u030a", pre="deepseek-r1-qwen")
@example(text="cafe\u0301 A\u030a", pre="llama-bpe")
@given(text=TEXTS, pre=st.sampled_from(sorted(PATTERNS)))
def test_ids_are_those_of_a_loop_and_decode_to_the_text(byte_level, text, pre):
    tokenizer = byte_level[pre]
    ids = tokenizer(text)["input_ids"]
    assert ids == by_hand(text, pre)
    assert tokenizer.decode(ids) == (unicodedata.normalize("NFC", text) if pre in COMPOSED else text)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", "It|'s| 1234567| DON|'|T|  | x|\n|\n|y|?!|\n"),
        ("smollm", "It|'s| |1|2|3|4|5|6|7| DON|'|T|  | x|\n|\n|y|?!|\n"),
        ("qwen2", "It|'s| |1|2|3|4|5|6|7| DON|'T|  | x|\n\n|y|?!\n"),
        ("deepseek-r1-qwen", "It|'s| |1|2|3|4|5|6|7| DON|'T|  | x|\n\n|y|?!\n"),
        ("llama-bpe", "It|'s| |123|456|7| DON|'T|  | x|\n\n|y|?!\n"),
        ("default", "It|'|s| |123|456|7| DON|'|T|  | x|\n|\n|y|?!|\n"),
    ],
)
def test_texts_are_cut_as_by_hand(byte_level, pre, pieces):
    """What is between two bars is one piece: digits, contractions in capitals, spaces before a word, ends of lines."""
    pieces = pieces.split("|")
    backend = byte_level[pre].backend_tokenizer
    found = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("".join(pieces))]
    assert found == ["".join(LETTERS[byte] for byte in piece.encode()) for piece in pieces]


def test_special_tokens_are_read_in_a_text_and_left_out_of_one(byte_level):
    tokenizer = byte_level["smollm"]
    text = "<|start|>12<|end|>a<｜begin▁of｜> <|none|>"
    ids = tokenizer(text)["input_ids"]
    assert [ids[place] for place in (0, 3, 5)] == [0, 1, 2]
    assert not {0, 1, 2} & {*ids[1:3], ids[4], *ids[6:]}
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "12a <|none|>"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|start|>", "<|end|>")
    assert tokenizer.pad_token is None


def test_a_word_that_is_a_token_is_that_token_only_for_llama(tmp_path):
    """ "abc" is a token that no merges lead to."""
    changes = {
        "tokenizer__ggml__tokens": [*TOKENS, "abc"],
        "tokenizer__ggml__token_type": None,
        "tokenizer__ggml__bos_token_id": 1,
    }
    for pre, expected in (("llama-bpe", ["<user>", "abc"]), ("qwen2", ["ab", "c"])):
        folder, _ = folder_of(tmp_path, **changes, tokenizer__ggml__pre=pre)
        assert load_tokenizer(folder)("abc").tokens() == expected


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({}, ["ab"]),
        ({"bos_token_id": 1, "add_bos_token": True}, ["<user>", "ab"]),
        ({"bos_token_id": 1, "add_bos_token": False, "pre": "llama-bpe"}, ["ab"]),
        ({"bos_token_id": 1, "add_bos_token": True, "add_eos_token": True}, ["<user>", "ab", "<end>"]),
        ({"add_eos_token": True}, ["ab", "<end>"]),
        # which means something to the library's templates
        ({"tokens": ["<end>", "$B:1:x", *TOKENS[2:]], "bos_token_id": 1, "add_bos_token": True}, ["$B:1:x", "ab"]),
    ],
)
def test_texts_begin_and_end_as_the_file_says(tmp_path, changes, tokens):
    folder, _ = folder_of(tmp_path, **{f"tokenizer__ggml__{name}": value for name, value in changes.items()})
    for tokenizer in (load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)):
        assert tokenizer("ab").tokens() == tokens
        assert tokenizer("ab", add_special_tokens=False).tokens() == ["ab"]


def test_transformers_and_dcjax_load_the_same(tmp_path):
    folder, _ = folder_of(tmp_path, **BYTE_LEVEL)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(theirs) and ours.get_vocab() == theirs.get_vocab()
    assert ours.get_vocab() == {token: number for number, token in enumerate(BPE_TOKENS)}
    for text in CORPUS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_ids_of_ends_and_beginnings(tmp_path):
    def told(**ids):
        return folder_of(tmp_path, **{f"tokenizer__ggml__{kind}_token_id": number for kind, number in ids.items()})[1]

    assert told().token_ids == {"eos_token_id": 0}
    assert told(bos=1, padding=0).token_ids == {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    assert told(eos=1, eot=0, eom=5).token_ids == {"eos_token_id": [0, 1, 5]}
    assert told(eot=0).token_ids == {"eos_token_id": 0}
    # a letter is no padding, nor unknown: texts would be cut at it
    read = told(padding=3, unknown=4)
    assert read.token_ids == {"eos_token_id": 0}
    assert load_tokenizer(tmp_path)("abab").tokens() == ["ab", "ab"]


def test_tokens_that_only_fill_the_vocabulary_are_left_out(tmp_path):
    filled = [*TOKENS, "[PAD17]", "[PAD18]"]
    types = [3, 3, 5, *[1] * (len(TOKENS) - 3), 5, 5]
    folder, _ = folder_of(tmp_path, tokenizer__ggml__tokens=filled, tokenizer__ggml__token_type=types)
    assert len(load_tokenizer(folder)) == len(TOKENS)


HOSTILE = "{{ cycler.__init__.__globals__.os.system('touch ran') }}{% while %}\x00\n" + "{{ 1/0 }}" * 9


def test_templates_are_stored_as_they_are(tmp_path):
    folder, _ = folder_of(tmp_path, **{"tokenizer.chat_template": HOSTILE})
    assert load_tokenizer(folder).chat_template == HOSTILE
    named = {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": HOSTILE}
    folder, _ = folder_of(tmp_path, **named, **{"tokenizer.chat_templates": ["tool_use"]})
    assert load_tokenizer(folder).chat_template == {"default": "a", "tool_use": HOSTILE}
    folder, _ = folder_of(tmp_path, **{"tokenizer.chat_template": None})
    assert load_tokenizer(folder).chat_template is None
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def pieces():
    """A SentencePiece model, trained as Llama's, and what llama.cpp keeps of it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["<|end|>"],
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    numbers = range(processor.get_piece_size())
    types = [
        2 if processor.is_unknown(n) else 3 if processor.is_control(n) else 6 if processor.is_byte(n) else 1
        for n in numbers
    ]
    return processor, {
        "tokenizer__ggml__model": "llama",
        "tokenizer__ggml__pre": "default",
        "tokenizer__ggml__tokens": [processor.id_to_piece(n) for n in numbers],
        "tokenizer__ggml__scores": [processor.get_score(n) for n in numbers],
        "tokenizer__ggml__token_type": types,
        "tokenizer__ggml__merges": None,
        "tokenizer__ggml__bos_token_id": processor.bos_id(),
        "tokenizer__ggml__eos_token_id": processor.eos_id(),
        "tokenizer__ggml__unknown_token_id": processor.unk_id(),
    }


@pytest.fixture(scope="module")
def sentence_piece(pieces, tmp_path_factory):
    return pieces[0], load_tokenizer(folder_of(tmp_path_factory.mktemp("pieces"), **pieces[1])[0])


@example(text=" ".join(CORPUS))
@example(text="")
@example(text="  the  ")
@example(text="\n\n the")
@given(text=TEXTS)
def test_ids_are_those_of_sentencepiece(sentence_piece, text):
    processor, tokenizer = sentence_piece
    ids = tokenizer(text)["input_ids"]
    assert ids == processor.encode(text, add_bos=True)
    if "▁" not in text:
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_control_tokens_of_sentencepiece_are_read_in_a_text(sentence_piece):
    processor, tokenizer = sentence_piece
    end = processor.piece_to_id("<|end|>")
    ids = tokenizer("the<|end|>the")["input_ids"]
    the = processor.encode("the")
    assert ids == [processor.bos_id(), *the, end, *the]


def test_the_name_of_a_byte_in_a_text_is_not_that_byte(tmp_path):
    """Nothing merges into a token of another type, though its parts are tokens."""
    tokens = ["<unk>", "</s>", "<0x41>", *"<0x41>", "<0", "<0x", "<0x4", "1>"]
    changes = {
        "model": "llama",
        "tokens": tokens,
        "scores": [-float(number) for number in range(len(tokens))],
        "token_type": [2, 3, 6, *[1] * (len(tokens) - 3)],
        "merges": None,
        "eos_token_id": 1,
        "add_bos_token": False,
        "add_space_prefix": False,
    }
    folder, _ = folder_of(tmp_path, **{f"tokenizer__ggml__{key}": value for key, value in changes.items()})
    tokenizer = load_tokenizer(folder)
    assert tokenizer("<0x41>").tokens() == ["<0x4", "1>"]
    assert tokenizer("A").tokens() == ["<0x41>"] and tokenizer.decode([2]) == "A"


def test_the_space_before_a_text_may_be_left_out(pieces, tmp_path):
    changes = pieces[1] | {"tokenizer__ggml__add_space_prefix": False, "tokenizer__ggml__add_bos_token": False}
    tokenizer = load_tokenizer(folder_of(tmp_path, **changes)[0])
    for text in ("the", " the", "  the "):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        # as if the text had been longer by the space that is added otherwise
        assert ids == pieces[0].encode(text[1:]) if text.startswith(" ") else ids != pieces[0].encode(text)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": None}, "has no tokenizer.ggml.model"),
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; it must be gpt2 or llama"),
        ({"pre": "qwen35"}, "tokenizer.ggml.pre is 'qwen35'; it must be one of those known, default, gpt-2, smollm"),
        ({"pre": None}, "has no tokenizer.ggml.pre; it must be a string"),
        ({"pre": 3}, "tokenizer.ggml.pre is 3"),
        ({"tokens": [*TOKENS[:-1], "a"]}, "tokenizer.ggml.tokens has 'a' twice"),
        ({"tokens": [*TOKENS[:-1], ""]}, "tokenizer.ggml.tokens has '' as a token"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type is array([1]"),
        ({"token_type": ["a"]}, "tokenizer.ggml.token_type is ['a']"),
        ({"merges": None}, "has no tokenizer.ggml.merges"),
        ({"merges": ["ab"]}, "tokenizer.ggml.merges has 'ab'; it must be two tokens"),
        ({"merges": ["a b c"]}, "tokenizer.ggml.merges has 'a b c'"),
        ({"merges": ["a c"]}, "tokenizer.ggml.merges has 'a c'"),
        ({"merges": [""]}, "tokenizer.ggml.merges has ''"),
        ({"merges": [" "]}, "tokenizer.ggml.merges has ' '"),
        ({"eos_token_id": None}, "has no tokenizer.ggml.eos_token_id"),
        ({"eos_token_id": len(TOKENS)}, f"eos_token_id is {len(TOKENS)}; it must be an integer from 0 to"),
        ({"eos_token_id": ("i32", -1)}, "eos_token_id is -1"),
        ({"eos_token_id": True}, "eos_token_id is True"),
        ({"eos_token_id": [0, 1]}, "eos_token_id is array"),
        ({"eot_token_id": 1.5}, "eot_token_id is 1.5"),
        ({"add_bos_token": True}, "has no tokenizer.ggml.bos_token_id; it must be the id of a token, as"),
        ({"pre": "llama-bpe"}, "has no tokenizer.ggml.bos_token_id"),
        ({"add_bos_token": 1}, "add_bos_token is 1; it must be true or false"),
        ({"add_space_prefix": True}, "add_space_prefix is True; it must be false"),
        ({"model": "llama"}, "has no tokenizer.ggml.scores"),
        ({"model": "llama", "scores": [0.0]}, "tokenizer.ggml.scores is array"),
        ({"model": "llama", "scores": [float("nan")] * len(TOKENS)}, "scores has an infinity or a NaN"),
        ({"model": "llama", "precompiled_charsmap": [1]}, "precompiled_charsmap is array"),
        ({"model": "llama", "remove_extra_whitespaces": True}, "remove_extra_whitespaces is True"),
        (
            {"model": "llama", "scores": [0.0] * len(TOKENS), "tokens": [*TOKENS[:-1], "a" * (MAX_PIECE + 1)]},
            f"of {MAX_PIECE + 1} characters",
        ),
    ],
)
def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path, changes, said):
    container, size = write(
        tmp_path / "model.gguf",
        **{f"tokenizer__ggml__{key}": value for key, value in changes.items()},
    )
    with pytest.raises(ValueError) as caught:
        read_tokenizer(container, size)
    message = str(caught.value)
    assert said in message and "\n" not in message and len(message) < 500
    assert message.startswith(f"{tmp_path / 'model.gguf'}")


def test_more_tokens_than_rows_are_refused(tmp_path):
    container, size = write(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=f"has {size} tokens, and the embedding table {size - 1} rows"):
        read_tokenizer(container, size - 1)
    assert read_tokenizer(container, size + 1).token_ids == {"eos_token_id": 0}


@pytest.mark.parametrize("tokens", ["a", 3, [1, 2], None])
def test_tokens_must_be_strings(tmp_path, tokens):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(metadata(tokenizer__ggml__tokens=tokens), tensors()))
    with pytest.raises(ValueError, match=r"tokenizer.ggml.tokens.*; it must be a list of strings"):
        read_tokenizer(open_container(path), 17)
