import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from dcjax.reporting import progress
from dcjax.reporting.progress import Progress, format_duration

SHOWN = {"reward": "0.69", "δ̄": "0.0014/0.0010", "λ": "0.18", "tok/s": "8123"}


class Clock:
    """Stands for the `time` module; tests set the seconds."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def run_steps(stream, clock, steps, *, total, seconds_a_step, initial=0, **shown):
    with Progress(total, initial=initial, description="step", stream=stream) as bar:
        for step in steps:
            clock.now += seconds_a_step
            bar.update(step, **shown)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (31.4, "0:31"), (59.6, "1:00"), (3599, "59:59"), (3723, "1:02:03"), (180_000, "50:00:00")],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_format_duration_refuses_what_is_no_duration(seconds):
    with pytest.raises(ValueError, match="duration"):
        format_duration(seconds)


def test_plain_line_reads_in_order(clock):
    stream = io.StringIO()
    run_steps(stream, clock, [11, 12], total=70, seconds_a_step=6.0, initial=10, **SHOWN)
    assert stream.getvalue().splitlines() == [
        "step 11/70  reward 0.69  δ̄ 0.0014/0.0010  λ 0.18  tok/s 8123  ETA 5:54",
        "step 12/70  reward 0.69  δ̄ 0.0014/0.0010  λ 0.18  tok/s 8123  ETA 5:48",
    ]


def test_plain_lines_are_five_seconds_apart_with_first_and_last(clock):
    stream = io.StringIO()
    run_steps(stream, clock, range(1, 18), total=17, seconds_a_step=1.0)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == [
        "1/17",
        "6/17",
        "11/17",
        "16/17",
        "17/17",
    ]


def test_closing_early_shows_the_last_step_once(clock):
    stream = io.StringIO()
    bar = Progress(70, initial=0, description="step", stream=stream)
    for step in (1, 2, 3):
        bar.update(step)
    bar.close()
    bar.close()
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/70", "3/70"]


def test_time_left_forgets_a_slow_start(clock):
    stream = io.StringIO()
    with Progress(100, initial=0, description="step", stream=stream) as bar:
        clock.now += 500.0
        bar.update(1)
        for step in range(2, 51):
            clock.now += 60.0 if step < 20 else 2.0
            bar.update(step)
    assert stream.getvalue().splitlines()[-1] == "step 50/100  ETA 1:40"


def test_behind_the_first_step_time_left_is_reckoned_from_that_one_alone(clock):
    stream = io.StringIO()
    with Progress(5, initial=0, description="step", stream=stream) as bar:
        clock.now += 900.0  # an evaluation, say
        bar.begin()
        clock.now += 40.0
        bar.update(1)
        clock.now += 10.0
        bar.update(2)
    assert stream.getvalue().splitlines() == ["step 1/5  ETA 2:40", "step 2/5  ETA 0:30"]


def test_phases_are_lines_until_the_first_step_is_done(clock):
    stream = io.StringIO()
    with Progress(9, initial=3, description="step", stream=stream) as bar:
        bar.phase("sampling")
        bar.phase("update")
        clock.now += 10.0
        bar.update(4)
        bar.phase("sampling")
    assert stream.getvalue().splitlines() == ["step 3/9  sampling …", "step 3/9  update …", "step 4/9  ETA 0:50"]


def test_names_fall_back_where_the_encoding_is_ascii(clock):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    run_steps(stream, clock, [70], total=70, seconds_a_step=1.0, **SHOWN, task="算")
    stream.flush()
    assert raw.getvalue().decode() == (
        "step 70/70  reward 0.69  gap 0.0014/0.0010  lambda 0.18  tok/s 8123  task ?  ETA 0:00\n"
    )


def test_standard_error_is_the_default(capsys, clock):
    with Progress(1, initial=0, description="warm start") as bar:
        bar.update(1)
    assert capsys.readouterr().err == "warm start 1/1  ETA 0:00\n"


ON_TERMINAL = """
from dcjax.reporting.progress import Progress
with Progress(3, initial=1, description="step") as bar:
    for step in (2, 3):
        bar.phase("sampling")
        bar.update(step, **{"reward": "0.69", "δ̄": "0.0014/0.0010", "λ": "0.18"})
"""


def on_terminal(columns, encoding):
    """What a program shows on a pseudo-terminal as its standard error."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    subprocess.run([sys.executable, "-c", ON_TERMINAL], stderr=slave, env=environment, check=True, timeout=60)
    os.close(slave)
    shown = b""
    # Linux reports the other side's end as an error once all has been read.
    try:
        while chunk := os.read(master, 65536):
            shown += chunk
    except OSError:
        pass
    os.close(master)
    return shown.decode(encoding)


def test_a_terminal_gets_a_live_bar():
    first, *_, last = on_terminal(120, "utf-8").strip("\r\n").split("\r")
    assert first == "|█████▎          | step 1/3"
    assert last.rstrip() == "|████████████████| step 3/3  ETA 0:00  reward 0.69  δ̄ 0.0014/0.0010  λ 0.18"


def test_a_terminal_shows_the_phase_beside_the_last_values():
    shown = [part.rstrip() for part in on_terminal(120, "utf-8").strip("\r\n").split("\r")]
    assert "|█████▎          | step 1/3  sampling" in shown
    (beside,) = (part for part in shown if "step 2/3  sampling" in part)
    assert beside.endswith("step 2/3  sampling  ETA 0:00  reward 0.69  δ̄ 0.0014/0.0010  λ 0.18")


def test_a_narrow_terminal_keeps_the_line_and_the_time_left():
    *_, last = on_terminal(40, "utf-8").strip("\r\n").split("\r")
    assert last.rstrip() == "|████████████████| step 3/3  ETA 0:00"


def test_an_ascii_terminal():
    *_, last = on_terminal(120, "ascii").strip("\r\n").split("\r")
    assert last.rstrip() == "|################| step 3/3  ETA 0:00  reward 0.69  gap 0.0014/0.0010  lambda 0.18"
