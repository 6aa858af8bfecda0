"""Text as it arrives, against the whole of it cut by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcjax.serving.server.http.answers import Answer
from dcjax.serving.server.http.engine_thread import Piece, Scored

LETTERS = "ab"
END = 2


def decode(tokens):
    """Each token is a letter; the end token has no text."""
    return "".join(LETTERS[token] for token in tokens if token != END)


def pushed(sizes, tokens, stops, reason):
    """All deltas of tokens that come in pieces of these sizes; what follows a stop string is not pushed."""
    answer, deltas, at = Answer(decode, stops), [], 0
    while at < len(tokens):
        size = sizes[len(deltas) % len(sizes)]
        new, at = tokens[at : at + size], at + size
        scored = tuple(Scored(token, 7, -0.5) for token in new)
        deltas.append(answer.push(Piece(scored, reason if at >= len(tokens) else None)))
        if deltas[-1].finish_reason:
            break
    return deltas


@given(
    tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20),
    ends=st.booleans(),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    stops=st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3),
)
def test_the_text_is_what_stands_before_the_first_stop_string_however_it_comes(tokens, ends, sizes, stops):
    tokens = [*tokens, END] if ends else tokens
    text = decode(tokens)
    # the first token with whose text one of the strings is there
    whole = next((n for n in range(1, len(tokens) + 1) if any(stop in decode(tokens[:n]) for stop in stops)), None)
    seen = text if whole is None else decode(tokens[:whole])
    expected = min([seen.index(stop) for stop in stops if stop in seen], default=len(seen))
    deltas = pushed(sizes, tokens, stops, "stop" if ends else "length")
    assert "".join(delta.text for delta in deltas) == seen[:expected]
    assert [scored.token for delta in deltas for scored in delta.tokens] == tokens[:whole]
    assert deltas[-1].finish_reason == ("stop" if ends or whole else "length")
    assert all(delta.finish_reason is None for delta in deltas[:-1])


def test_offsets_are_where_each_tokens_text_begins():
    deltas = pushed([3], [0, 1, 0, 1, END], ["bb"], "stop")
    assert [offset for delta in deltas for offset in delta.offsets] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("stops", "held"), [(["abab"], "aba"), (["bb"], ""), (["aab", "bb"], "a")])
def test_what_may_be_the_beginning_of_a_stop_string_waits(stops, held):
    (delta,) = pushed([3], [0, 1, 0], stops, None)
    assert delta.text == "aba"[: 3 - len(held)]
