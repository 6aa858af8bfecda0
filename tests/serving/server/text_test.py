import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcjax.data.tokenizers import byte_tokenizer
from dcjax.serving.server.text import INCOMPLETE, TextStream

TOKENIZER = byte_tokenizer()


def decode(tokens):
    return TOKENIZER.backend_tokenizer.decode(tokens, skip_special_tokens=True)


def pieces(tokens, turns):
    """What each turn tells; a turn has so many tokens."""
    stream, told, start = TextStream(decode), [], 0
    for number, count in enumerate(turns):
        told.append(stream.push(tokens[start : start + count], last=number == len(turns) - 1))
        start += count
    assert start == len(tokens)
    return told


@st.composite
def cut(draw, tokens):
    """Tokens and how many of them come in each turn."""
    tokens, turns = draw(tokens), []
    while sum(turns) < len(tokens):
        turns.append(draw(st.integers(1, len(tokens) - sum(turns))))
    return tokens, turns or [0]


@given(cut(st.text(max_size=30).map(lambda text: TOKENIZER.encode(text))))
def test_pieces_make_the_text_and_none_ends_within_a_character(drawn):
    told = pieces(*drawn)
    assert "".join(told) == decode(drawn[0])
    assert not any(piece.endswith(INCOMPLETE) for piece in told[:-1] if INCOMPLETE not in decode(drawn[0]))


@given(cut(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=30)))
def test_bytes_that_are_no_text_are_told_too(drawn):
    told = pieces(*drawn)
    assert "".join(told).replace(INCOMPLETE, "") == decode(drawn[0]).replace(INCOMPLETE, "")


@pytest.mark.parametrize(("text", "turns", "told"), [("é", [1, 1], ["", "é"]), ("aé", [2, 1], ["a", "é"])])
def test_the_beginning_of_a_character_waits_for_its_end(text, turns, told):
    assert pieces(TOKENIZER.encode(text), turns) == told


def test_a_character_that_never_ends_is_told_at_the_end():
    tokens = TOKENIZER.encode("aé")[:2]
    assert pieces(tokens, [1, 1]) == ["a", INCOMPLETE]
