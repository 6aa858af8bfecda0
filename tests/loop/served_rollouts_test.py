"""Runs whose rollouts come from a server: real processes, beside the same run in one process."""

import contextlib
import dataclasses
import signal
import subprocess
import sys
import time

import pytest
import tiny
from launching import complaints, fake_devices, free_port, processes
from listening import listening
from records import untimed

from dcjax.cli import main
from dcjax.recipe.config import Config
from dcjax.recipe.rollout import RolloutConfig
from dcjax.reporting.record import read_metrics
from dcjax.tools.serve import load_served

pytestmark = pytest.mark.heavy

CONFIG = dataclasses.replace(
    tiny.CONFIG,
    serving=dataclasses.replace(tiny.CONFIG.serving, format="float32"),
    checkpoint=dataclasses.replace(tiny.CONFIG.checkpoint, every=1),
)


@pytest.fixture(scope="module")
def float32_recipe(tmp_path_factory):
    return tiny.write_recipe(tmp_path_factory.mktemp("recipe") / "recipe.py", CONFIG)


@contextlib.contextmanager
def server(run, port):
    command = [sys.executable, "-m", "dcjax", "serve", str(run), "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=fake_devices(1)) as process:
        try:
            yield process
        finally:
            process.kill()


def steps_of(run):
    try:
        return len((run / "metrics.jsonl").read_text().splitlines()) - 1
    except FileNotFoundError:
        return -1


def wait_until(condition, seconds=120):
    ended = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ended
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_goes_on_over_the_death_of_its_server_as_if_it_had_sampled_itself(float32_recipe, tmp_path):
    alone, served, port = tmp_path / "alone", tmp_path / "served", free_port()
    assert main(["train", str(float32_recipe), "--run-dir", str(alone)]) == 0
    engine = f"rollout.engine=grpc://127.0.0.1:{port}"
    with processes(float32_recipe, served, engine, count=1) as (training,):
        wait_until(lambda: (served / "checkpoints" / "0").exists())
        with server(served, port) as first:
            wait_until(lambda: steps_of(served) >= 3)
            first.send_signal(signal.SIGKILL)
        # without a server nothing is trained on
        time.sleep(3)
        before = steps_of(served)
        time.sleep(2)
        assert steps_of(served) == before < CONFIG.steps
        with server(served, port):
            _, errors = training.communicate(timeout=120)
    assert training.returncode == 0, errors
    told = complaints(errors)
    assert sum("no samples from the server" in line for line in told) in (1, 2)
    assert told[-1].endswith("answers again")
    ours, theirs = (untimed(read_metrics(run / "metrics.jsonl")) for run in (served, alone))
    assert len(ours) == len(theirs) == CONFIG.steps + 1
    # log-probs of single prompts are rounded otherwise than those of batches, and training feeds that back
    for step, tolerance in ((1, 1e-4), (CONFIG.steps, 0.05)):
        for name, value in theirs[step].items():
            assert ours[step][name] == pytest.approx(value, rel=tolerance, abs=tolerance), (step, name)


def test_a_run_without_its_server_ends_in_a_status_to_start_again_by(float32_recipe, tmp_path, capfd):
    engine = [f"rollout.engine=grpc://127.0.0.1:{free_port()}", "rollout.patience=0.5"]
    assert main(["train", str(float32_recipe), "--run-dir", str(tmp_path / "run"), *engine]) == 75
    (_, told) = complaints(capfd.readouterr().err)
    assert "for 0.5 s (UNAVAILABLE" in told and f"dcjax serve {tmp_path / 'run'} --port" in told


def test_a_server_of_another_run_is_refused_with_what_differs(float32_recipe, finished_run, tmp_path, capfd):
    served = load_served(finished_run, serving={}, lengths={})
    with listening(served) as port:
        engine = f"rollout.engine=grpc://127.0.0.1:{port}"
        assert main(["train", str(float32_recipe), "--run-dir", str(tmp_path / "run"), engine]) == 2
    (told,) = complaints(capfd.readouterr().err)
    assert "serves another policy: format 'float32' and 'int8', run 'run " in told


@pytest.mark.parametrize("engine", ["", "http://127.0.0.1:9000", "grpc://127.0.0.1", "grpc://:9000", "grpc://x:y"])
def test_what_is_no_address_of_a_server_is_refused(engine):
    with pytest.raises(ValueError, match=f"rollout.engine is {engine!r}"):
        RolloutConfig(engine=engine)


@pytest.mark.parametrize("settings", [{"top_k": 5}, {"replay_routing": True}])
def test_what_a_black_box_does_not_tell_is_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"rollout.{name} is"):
        RolloutConfig(engine="grpc://127.0.0.1:9000", **settings)


def test_weights_that_lag_on_purpose_are_those_of_the_checkpoints():
    with pytest.raises(ValueError, match=r"mismatch\.staleness is 1"):
        Config(
            rollout=RolloutConfig(engine="grpc://127.0.0.1:9000"),
            mismatch=dataclasses.replace(tiny.CONFIG.mismatch, staleness=1),
        )
