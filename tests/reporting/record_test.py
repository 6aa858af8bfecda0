import json
import os
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dcjax.reporting.record import (
    MetricsLog,
    TokenProbabilities,
    Transcripts,
    check_writable,
    read_metrics,
    read_transcripts,
    write_atomically,
)


def write_steps(run_dir, steps, *, last_step=None):
    with MetricsLog(run_dir, "metrics", last_step=last_step) as log:
        for step in steps:
            log.write(step, {"reward": step / 7})


def steps_in(run_dir):
    return [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")]


def read_events(directory):
    """The events of all files in order: a TFRecord is a length, its checksum, the message, its checksum."""
    events = []
    for path in sorted(directory.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            events.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return events


def test_a_line_a_step_with_the_step_first(tmp_path):
    with MetricsLog(tmp_path / "runs" / "new", "warm_start", last_step=None) as log:
        log.write(0, {"eval/prompts": 128})
        log.write(np.int64(1), {"loss": 0.5, "eval/prompts": np.int32(3)})
    path = tmp_path / "runs" / "new" / "warm_start.jsonl"
    assert path.read_text() == '{"step": 0, "eval/prompts": 128}\n{"step": 1, "loss": 0.5, "eval/prompts": 3}\n'


def test_floats_come_back_bit_for_bit(tmp_path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 1e16 + 2, np.float64(np.pi), np.float32(0.1)]
    with MetricsLog(tmp_path, "metrics", last_step=None) as log:
        for step, value in enumerate(values):
            log.write(step, {"value": value})
    read = [record["value"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert [value.hex() for value in read] == [float(value).hex() for value in values]
    assert np.float32(read[-1]) == np.float32(0.1)


def test_a_step_can_be_read_while_the_log_is_open(tmp_path):
    with MetricsLog(tmp_path, "metrics", last_step=None) as log:
        log.write(3, {"reward": 1.0})
        assert steps_in(tmp_path) == [3]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("-inf")])
def test_a_value_that_is_not_finite_is_refused_by_name(tmp_path, value):
    with MetricsLog(tmp_path, "metrics", last_step=None) as log:
        with pytest.raises(ValueError, match=r"'grad_norm' is -?(nan|inf) at step 4"):
            log.write(4, {"reward": 1.0, "grad_norm": value})
        log.write(5, {"reward": 1.0})
    assert steps_in(tmp_path) == [5]


@pytest.mark.parametrize("value", ["high", None, np.zeros(3), [1.0]])
def test_what_is_not_one_number_is_refused_by_name(tmp_path, value):
    with (
        MetricsLog(tmp_path, "metrics", last_step=None) as log,
        pytest.raises(TypeError, match="entropy"),
    ):
        log.write(1, {"entropy": value})


def test_a_metric_must_not_be_called_step(tmp_path):
    with MetricsLog(tmp_path, "metrics", last_step=None) as log, pytest.raises(ValueError, match="'step'"):
        log.write(1, {"step": 2})


def test_resume_drops_later_steps(tmp_path):
    write_steps(tmp_path, range(10))
    write_steps(tmp_path, [7, 8], last_step=6)
    assert steps_in(tmp_path) == list(range(9))


def test_no_last_step_starts_over(tmp_path):
    write_steps(tmp_path, range(10))
    write_steps(tmp_path, [])
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_resume_without_a_file_starts_one(tmp_path):
    write_steps(tmp_path, [6], last_step=5)
    assert steps_in(tmp_path) == [6]


def test_a_line_cut_anywhere_is_dropped(tmp_path):
    write_steps(tmp_path, range(4))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    start_of_last = whole[:-1].rindex(b"\n") + 1
    for end in range(start_of_last, len(whole)):
        path.write_bytes(whole[:end])
        # Cut before its newline, the line is whole all the same.
        kept = [0, 1, 2, 3] if end == len(whole) - 1 else [0, 1, 2]
        assert steps_in(tmp_path) == kept
        write_steps(tmp_path, [4], last_step=3)
        assert steps_in(tmp_path) == [*kept, 4]


@pytest.mark.parametrize("garbage", [b'{"step": 7, "rew', b"\0" * 40, b"[8]", b'{"reward": 1}', b"\xff\xfe", b""])
def test_resume_drops_damage_in_the_tail(tmp_path, garbage):
    write_steps(tmp_path, range(3))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(garbage + b'\n{"step": 9, "reward": 1.0}\n')
    write_steps(tmp_path, [3], last_step=2)
    assert steps_in(tmp_path) == [0, 1, 2, 3]


def test_damage_before_kept_lines_names_file_and_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    damaged = b'{"step": 0}\n{"step": 1, "re\n{"step": 2}\n'
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        MetricsLog(tmp_path, "metrics", last_step=5)
    assert path.read_bytes() == damaged


def test_reading_no_file_and_an_empty_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").touch()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


WRITER = """
import sys
from dcjax.reporting.record import Transcripts
log = Transcripts(sys.argv[1], last_step=None)
for step in range(10_000):
    log.write(step, prompt="p", response="计" * 3_000_000, reward=1.0, finished=True, policy_version=step)
"""


def test_killed_in_the_middle_of_a_write(tmp_path):
    path = tmp_path / "samples.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
    try:
        # A line has 9 MB, so that a size that is no whole number of them is met while a write is under way.
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            size = path.stat().st_size if path.exists() else 0
            if size > 20_000_000 and size % 9_000_000 > 1_000_000:
                break
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    assert writer.returncode == -signal.SIGKILL
    steps = [record["step"] for record in read_transcripts(path)]
    assert steps == list(range(len(steps)))
    assert len(steps) >= 2
    with Transcripts(tmp_path, last_step=0) as log:
        log.write(1, prompt="p", response="r", reward=0.0, finished=False, policy_version=1)
    assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == [0, 1]
    assert path.read_bytes().endswith(b"\n")


def test_a_replaced_file_leaves_nothing_behind(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    with MetricsLog(tmp_path, "metrics", last_step=None, tensorboard=True) as log:
        log.write(0, {"eval/prompts": 128})
        log.write(1, {"reward": 0.5, "dual/multiplier": 0.25})
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in read_events(tmp_path / "tensorboard")
        for value in event.summary.value
    ]
    assert scalars == [(0, "eval/prompts", 128.0), (1, "reward", 0.5), (1, "dual/multiplier", 0.25)]


def test_tensorboard_is_told_to_purge_what_the_log_dropped(tmp_path):
    for last_step in (None, 4):
        with MetricsLog(tmp_path, "metrics", last_step=last_step, tensorboard=True) as log:
            for step in range(0 if last_step is None else last_step + 1, 8):
                log.write(step, {"reward": 0.5})
    # The second log was opened within a second of the first, and must not have overwritten its file.
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    starts = [
        event.step for event in read_events(tmp_path / "tensorboard") if event.session_log.status == SessionLog.START
    ]
    assert starts == [0, 5]


def test_only_the_log_that_asks_writes_events(tmp_path):
    write_steps(tmp_path, range(2))
    assert not (tmp_path / "tensorboard").exists()


def test_transcripts_keep_any_text(tmp_path):
    response = 'a\n"b"\\ 计算 \u2028 \x00 \ud800 </script>'
    told = TokenProbabilities("\n", 0.12345678, 1.0)
    with Transcripts(tmp_path, last_step=None) as log:
        log.write(2, prompt="x", response=response, reward=np.float32(0.5), finished=np.True_, policy_version=1)
        log.write(2, prompt="y", response="", reward=1, finished=False, policy_version=2, tokens=[told])
    first, second = read_transcripts(tmp_path / "samples.jsonl")
    assert list(first) == ["step", "prompt", "response", "reward", "finished", "policy_version"]
    assert (first["response"], first["reward"], first["finished"]) == (response, 0.5, True)
    assert second["tokens"] == [["\n", 0.123457, 1.0]]
    assert "计算" in (tmp_path / "samples.jsonl").read_text("utf-8")


def test_transcripts_drop_all_samples_of_later_steps(tmp_path):
    for last_step, steps in ((None, (1, 2, 3)), (1, (2,))):
        with Transcripts(tmp_path, last_step=last_step) as log:
            for step in steps:
                for prompt in "ab":
                    log.write(step, prompt=prompt, response="", reward=0, finished=True, policy_version=0)
    samples = read_transcripts(tmp_path / "samples.jsonl")
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [
        (1, "a"),
        (1, "b"),
        (2, "a"),
        (2, "b"),
    ]


def test_a_reward_that_is_not_finite_is_refused(tmp_path):
    with Transcripts(tmp_path, last_step=None) as log, pytest.raises(ValueError, match="'reward' is nan"):
        log.write(1, prompt="", response="", reward=float("nan"), finished=True, policy_version=0)


def test_looking_whether_a_directory_is_writable_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    check_writable(tmp_path)
    check_writable(tmp_path / "a" / "b")
    for unusable in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(NotADirectoryError) as raised:
            check_writable(unusable)
        assert raised.value.filename == str(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
