"""Signals that arrive before the loop has begun, while Python imports or XLA compiles: real processes, real signals."""

import collections
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from dcjax.signals import INTERRUPTED, RESUMABLE

pytestmark = pytest.mark.heavy

COMPILING = """
import sys
from dcjax.signals import listen

listen("train")
print("listening", flush=True)
import jax, jax.numpy as jnp

def slow(x):
    for number in range(3000):
        x = jnp.sin(x) @ x + number
    return x

jax.jit(slow)(jnp.ones((8, 8)))
"""


UNHEARD = """
import dcjax.signals
import jax, jax.numpy as jnp

dcjax.signals.GRACE = 1.0
dcjax.signals.listen("probe")

def tell():
    print("what is there")
    return "formats finished: 1 of 2"

with dcjax.signals.last_words(tell):
    print("listening", flush=True)
    jax.jit(lambda x: jax.lax.fori_loop(0, 10**9, lambda i, x: jnp.sin(x), x))(1.0).block_until_ready()
"""


def ended(process, number, expected):
    process.send_signal(number)
    started = time.monotonic()
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == expected, errors
    return errors, time.monotonic() - started


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, INTERRUPTED), pytest.param(signal.SIGTERM, RESUMABLE, marks=pytest.mark.slow)],
)
def test_a_process_that_compiles_ends_at_once(number, status):
    command = [sys.executable, "-c", COMPILING]
    env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "listening\n"
    # in the midst of tracing or compiling, which take a minute
    time.sleep(3)
    errors, seconds = ended(process, number, status)
    assert seconds < 5
    assert errors.splitlines()[-1].startswith("dcjax: ") and "Traceback" not in errors


def test_what_is_there_is_told_though_the_main_thread_never_comes_back():
    command = [sys.executable, "-c", UNHEARD]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "listening\n"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (INTERRUPTED, "what is there\n")
    assert errors.splitlines()[-1] == "dcjax: interrupted; formats finished: 1 of 2" and "Traceback" not in errors


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, RESUMABLE), pytest.param(signal.SIGINT, INTERRUPTED, marks=pytest.mark.slow)],
)
def test_a_run_that_still_imports_ends_at_once(recipe, tmp_path, number, status):
    command = [sys.executable, "-m", "dcjax", "train", str(recipe), "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(1)
    errors, seconds = ended(process, number, status)
    assert seconds < 5
    assert len(errors.splitlines()) == 1 and errors.startswith("dcjax: ")


def test_another_command_that_is_stopped_by_its_launcher_ends_as_any_process(finished_run):
    process = subprocess.Popen([sys.executable, "-m", "dcjax", "evaluate", str(finished_run)], stderr=subprocess.PIPE)
    time.sleep(1)
    ended(process, signal.SIGTERM, -signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, RESUMABLE), (signal.SIGINT, INTERRUPTED)])
def test_at_any_moment_a_run_ends_with_its_status_without_a_traceback(recipe, tmp_path, number, status):
    statuses, source = collections.Counter(), random.Random(int(number))
    for trial in range(25):
        command = [sys.executable, "-m", "dcjax", "train", str(recipe), "--run-dir", str(tmp_path / str(trial))]
        command += ["steps=100000", "evaluation.every=1000"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(0.3 + 15 * source.random())
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        statuses[process.returncode] += 1
        assert "Traceback" not in errors and "Fatal" not in errors, errors
    assert statuses == {status: 25}
