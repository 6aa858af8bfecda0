import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcjax.data.tokenizers import byte_tokenizer, load_tokenizer

TOKENIZER = byte_tokenizer()


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@given(
    st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(["<eos>", "a<pad>b", "中文 \x00\r\n", "\\boxed{"])
)
def test_a_token_is_a_byte_and_decoding_gives_the_text_back(text):
    ids = encode(TOKENIZER, text)
    assert len(ids) == len(text.encode())
    assert TOKENIZER.decode(ids) == text
    assert not {TOKENIZER.pad_token_id, TOKENIZER.eos_token_id} & set(ids)


def test_equal_bytes_are_equal_tokens():
    assert encode(TOKENIZER, "é")[0] == encode(TOKENIZER, "ê")[0] != encode(TOKENIZER, "e")[0]


def test_special_tokens_are_left_out_of_texts():
    pad, eos = TOKENIZER.pad_token_id, TOKENIZER.eos_token_id
    assert (len(TOKENIZER), pad, eos) == (258, 0, 1)
    assert TOKENIZER.decode([pad, *encode(TOKENIZER, "42"), eos], skip_special_tokens=True) == "42"
    assert TOKENIZER.chat_template is None


def test_a_saved_tokenizer_comes_back(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert encode(loaded, "a<eos>中") == encode(TOKENIZER, "a<eos>中")
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)


def refusal(folder):
    with pytest.raises(ValueError) as caught:
        load_tokenizer(folder)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 600
    return line


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert refusal(folder) == f"no tokenizer in {folder}: it must have a tokenizer.json"


def test_a_vocabulary_and_its_merges_are_no_tokenizer_yet(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    folder = repr(str(tmp_path))
    assert refusal(tmp_path) == (
        f"no tokenizer in {tmp_path}: it has vocab.json and no tokenizer.json, which transformers writes from it: "
        f"AutoTokenizer.from_pretrained({folder}).save_pretrained({folder})"
    )


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 11422654\n"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b'{"version": "1.', POINTER, b"\xff\xfe\x00", b"[" * 100_000])
def test_a_damaged_file_is_named(tmp_path, name, content):
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path).startswith(f"{tmp_path / name} is damaged: it must be JSON (")


def test_json_that_is_no_tokenizer_is_one_line(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    for content in ("{}", "[]", '{"model": {"type": "BPE"}, "added_tokens": []}'):
        (tmp_path / "tokenizer.json").write_text(content)
        assert refusal(tmp_path).startswith(f"{tmp_path} holds no tokenizer that can be read: ")


def test_a_tokenizer_without_an_end_is_an_error(tmp_path):
    endless = byte_tokenizer()
    endless.eos_token = None
    endless.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no end token; a response could not end"):
        load_tokenizer(tmp_path)
