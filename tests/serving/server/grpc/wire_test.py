import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcjax.serving.server.grpc.wire import LOG_PROBS, VERSIONS, Answer, Asked

FLOATS = st.floats(width=32, allow_nan=False)
ASKED = st.builds(
    Asked,
    seed=st.none() | st.integers(0, 2**64 - 1),
    temperature=st.none() | st.floats(0, 10),
    top_k=st.none() | st.integers(0, 1000),
    top_p=st.none() | st.floats(0, 1),
    stop_token_ids=st.none() | st.lists(st.integers(0, 2**31), min_size=1, max_size=5).map(tuple),
    log_probs=st.booleans(),
    weights_version=st.integers(0, 2**40),
)
ANSWERS = st.builds(
    Answer,
    st.sampled_from(["stop", "length"]),
    st.lists(st.integers(0, 5), max_size=40).map(tuple),
    st.none() | st.lists(FLOATS, max_size=40).map(tuple),
)


@given(ASKED)
def test_what_is_asked_arrives(asked):
    metadata = [*asked.to_metadata(), ("user-agent", "somebody's")]
    assert Asked.from_metadata(metadata) == asked


def test_nothing_is_sent_of_what_nobody_asks_for():
    assert Asked().to_metadata() == []


@given(ANSWERS)
def test_what_is_answered_arrives_to_the_bit(answer):
    assert Answer.from_metadata(answer.to_metadata()) == answer


def test_versions_are_told_in_runs_and_log_probs_as_float32():
    metadata = dict(Answer("stop", (3, 3, 3, 4), (-0.5, -1.0, -2.0, 0.0)).to_metadata())
    assert metadata[VERSIONS] == "3:3,4:1"
    assert metadata[LOG_PROBS] == np.array([-0.5, -1.0, -2.0, 0.0], "<f4").tobytes()


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ([("dcjax-sead", "1")], "'dcjax-sead' is unknown; known are dcjax-seed, "),
        ([("dcjax-seed", "1"), ("dcjax-seed", "1")], "given twice"),
        ([("dcjax-seed", "1_0")], "'1_0': it must be an integer"),
        ([("dcjax-seed", "٣")], "it must be an integer"),
        ([("dcjax-seed", "9" * 10_000)], "it must be an integer"),
        ([("dcjax-seed", str(2**64))], "must lie within"),
        ([("dcjax-seed", "-1")], "must lie within"),
        ([("dcjax-temperature", "hot")], "'hot'"),
        ([("dcjax-log-probs", "1")], "it must be true or false"),
        ([("dcjax-stop-token-ids", "1,,2")], "it must be an integer"),
        ([("dcjax-stop-token-ids", "")], "it must be an integer"),
        ([("dcjax-seed-bin", b"\x00")], "unknown"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_value(metadata, told):
    with pytest.raises(ValueError, match="metadata 'dcjax-") as refused:
        Asked.from_metadata(metadata)
    assert told in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "metadata",
    [[], [("dcjax-finish-reason", "stop")], [("dcjax-finish-reason", "stop"), ("dcjax-weights-versions", "3")]],
)
def test_an_answer_of_another_server_is_refused(metadata):
    with pytest.raises(ValueError, match="not a dcjax server's"):
        Answer.from_metadata(metadata)
