import dataclasses
import json

import pytest

from dcjax.errors import RunError
from dcjax.tools.suite.log import Conditions, ProblemSamples, SampleLog, SuiteProblem, read_samples

CONDITIONS = Conditions(
    benchmark="aime24",
    policy="deployed",
    weights=7,
    format="int8",
    kv_cache="auto",
    keep=[],
    mismatch={"weight_noise": 0.0},
    samples=2,
    seed=0,
    temperature=0.7,
    top_p=1.0,
    max_response_length=64,
    stop_tokens=[1],
    template="boxed",
    thinking="auto",
    answer_start="",
    chat_template="5ac0",
)
PROBLEMS = [SuiteProblem(f"p{number}", [5, 6], "7") for number in range(3)]


def sampled(problem, answer="7", gold="7"):
    return ProblemSamples(problem, gold, [answer, None], [1.0, 0.0], [12, 64], [True, False])


def test_what_was_logged_is_read_back_by_its_conditions_and_is_not_missing_any_more(tmp_path):
    other = dataclasses.replace(CONDITIONS, policy="training")
    with SampleLog(tmp_path / "new", 0) as log:
        assert log.missing(CONDITIONS, PROBLEMS) == PROBLEMS
        log.append(CONDITIONS, sampled("p0", 'a "quoted"\n\ud800 answer'))
        log.append(CONDITIONS, sampled("p2"))
        log.append(other, sampled("p1"))
    found = read_samples(tmp_path / "new")
    quoted = sampled("p0", 'a "quoted"\n\ud800 answer')
    assert found[CONDITIONS.fingerprint] == {("p0", "7"): quoted, ("p2", "7"): sampled("p2")}
    assert found[other.fingerprint] == {("p1", "7"): sampled("p1")}
    with SampleLog(tmp_path / "new", 0) as log:
        assert log.missing(CONDITIONS, PROBLEMS) == [PROBLEMS[1]]
        assert log.missing(other, PROBLEMS) == [PROBLEMS[0], PROBLEMS[2]]


def test_what_was_scored_by_another_gold_is_missing(tmp_path):
    """As where a row of the data was mended, or the line is of a version that did not write the gold."""
    with SampleLog(tmp_path, 0) as log:
        log.append(CONDITIONS, sampled("p0", gold="8"))
        log.append(CONDITIONS, sampled("p1"))
        log.append(CONDITIONS, sampled("p2"))
    path = tmp_path / "samples-0.jsonl"
    *rest, last = path.read_text().splitlines()
    old = {name: value for name, value in json.loads(last).items() if name != "gold"}
    path.write_text("\n".join([*rest, json.dumps(old)]) + "\n")
    with SampleLog(tmp_path, 1) as log:
        assert log.missing(CONDITIONS, PROBLEMS) == [PROBLEMS[0], PROBLEMS[2]]
        log.append(CONDITIONS, sampled("p0"))
    found = read_samples(tmp_path)[CONDITIONS.fingerprint]
    assert found["p0", "7"] == sampled("p0") and found["p0", "8"] == sampled("p0", gold="8")


def test_a_line_tells_what_it_is_of(tmp_path):
    with SampleLog(tmp_path, 3) as log:
        log.append(CONDITIONS, sampled("p0"))
    (line,) = (tmp_path / "samples-3.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "conditions": CONDITIONS.fingerprint,
        "benchmark": "aime24",
        "policy": "deployed",
        "seed": 0,
        "problem": "p0",
        "gold": "7",
        "answers": ["7", None],
        "rewards": [1.0, 0.0],
        "lengths": [12, 64],
        "finished": [True, False],
    }


def test_what_another_process_logged_is_not_missing(tmp_path):
    with SampleLog(tmp_path, 0) as ours:
        ours.append(CONDITIONS, sampled("p0"))
    with SampleLog(tmp_path, 1) as theirs:
        assert theirs.missing(CONDITIONS, PROBLEMS) == PROBLEMS[1:]


def test_a_torn_last_line_is_sampled_anew(tmp_path):
    with SampleLog(tmp_path, 0) as log:
        for problem in PROBLEMS:
            log.append(CONDITIONS, sampled(problem.id))
    path = tmp_path / "samples-0.jsonl"
    whole = path.read_bytes()
    for cut in (1, 20, 100):
        path.write_bytes(whole[:-cut])
        with SampleLog(tmp_path, 0) as log:
            assert log.missing(CONDITIONS, PROBLEMS) == [PROBLEMS[2]]
            log.append(CONDITIONS, sampled("p2"))
        assert path.read_bytes() == whole


def test_a_damaged_line_before_others_is_named(tmp_path):
    (tmp_path / "samples-0.jsonl").write_text('{"conditions": \n{}\n')
    with pytest.raises(RunError, match=r"samples-0.jsonl, line 1: not a JSON object"):
        SampleLog(tmp_path, 0)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Conditions)])
def test_samples_of_other_conditions_are_others(field):
    value = getattr(CONDITIONS, field)
    changed = value + type(value)([9]) if isinstance(value, list) else f"{value}x" if isinstance(value, str) else None
    if changed is None:
        changed = {"weight_noise": 0.1} if isinstance(value, dict) else value + 1
    assert dataclasses.replace(CONDITIONS, **{field: changed}).fingerprint != CONDITIONS.fingerprint
    assert dataclasses.replace(CONDITIONS).fingerprint == CONDITIONS.fingerprint
