"""Weights & Biases and MLflow hold what the run's own log holds, in one run, also where it is resumed."""

import dataclasses
import json
import shutil
import sys
import time

import pretend
import pytest
import tiny

from dcjax.errors import RunError
from dcjax.loop.train import train
from dcjax.recipe.config import TrackingConfig
from dcjax.reporting.record import read_metrics

pytestmark = pytest.mark.heavy

STEPS, EVERY = tiny.CONFIG.steps, tiny.CONFIG.checkpoint.every


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs in one directory, without arithmetic."""
    pretend.install(monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'mlflow'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    def run(**tracking):
        warm_start = dataclasses.replace(tiny.CONFIG.warm_start, steps=0)
        config = dataclasses.replace(
            tiny.CONFIG, run_dir=tmp_path / "run", warm_start=warm_start, tracking=TrackingConfig(**tracking)
        )
        train(config)
        return config.directory

    return run


def forget(directory, step):
    """Takes a run back to a checkpoint."""
    for path in (directory / "checkpoints").iterdir():
        if path.name.isdecimal() and int(path.name) > step:
            shutil.rmtree(path)


def records(path):
    """The records of a file of LevelDB's log format: blocks of 32 KiB, in which no header (7 bytes) is cut."""
    data, at, record = path.read_bytes(), len(":W&B") + 3, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record, at = record + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def offline(directory):
    """The number and the history of each offline part of a run, once its file has its end."""
    for path in sorted((directory / "wandb").glob("offline-run-*/run-*.wandb")):
        until = time.monotonic() + 30
        while not (whole := parsed(path))[-1].HasField("exit"):  # written by a process of the library's own
            assert time.monotonic() < until
            time.sleep(0.05)
        histories = [record.history.item for record in whole if record.HasField("history")]
        told = [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in h} for h in histories]
        yield path.stem.removeprefix("run-"), told


def parsed(path):
    from wandb.proto import wandb_internal_pb2

    record = wandb_internal_pb2.Record
    return [record(), *map(record.FromString, records(path))]


@pytest.mark.slow
def test_weights_and_biases_has_every_metric_once_a_step_and_the_report_in_one_run(run):
    pytest.importorskip("wandb")
    directory = run(wandb="project")
    forget(directory, EVERY)
    assert run(wandb="project") == directory
    (first, whole), (second, resumed) = offline(directory)
    assert first == second
    lines = {line["step"]: line for line in read_metrics(directory / "metrics.jsonl")}
    for history, steps in ((whole, range(STEPS + 1)), (resumed, range(EVERY + 1, STEPS + 1))):
        *logged, last = history
        assert [entry["step"] for entry in logged] == list(steps)
        told = {entry["step"]: entry for entry in logged}
        for step in steps:
            expected = {name: value for name, value in lines[step].items() if not untimed(name)}
            assert {name: told[step][name] for name in expected} == expected
        (kept,) = (directory / "wandb").glob(f"offline-run-*/files/{last['report/path']}")
        assert "<html" in kept.read_text()


def untimed(name):
    """Whether another process measures another value, or no tracker has a metric of the name."""
    return name == "step" or name.startswith("time/") or "per_second" in name


def test_mlflow_has_every_metric_of_every_step_and_the_report_in_one_run(run):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    directory = run(mlflow="experiment")
    forget(directory, EVERY)
    run(mlflow="experiment")
    client = MlflowClient()
    experiment = client.get_experiment_by_name("experiment")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    assert {file.path for file in client.list_artifacts(found.info.run_id)} == {"config.json", "report.html"}
    lines = read_metrics(directory / "metrics.jsonl")
    for name in ("reward", "mismatch/prob_diff_mean", "eval/deployed_accuracy"):
        told = {metric.step: metric.value for metric in client.get_metric_history(found.info.run_id, name)}
        assert told == {line["step"]: line[name] for line in lines if name in line}


def test_a_run_may_be_tracked_from_any_checkpoint_on(run):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    forget(run(), EVERY)
    run(mlflow="late")
    client = MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("late").experiment_id])
    told = [metric.step for metric in client.get_metric_history(found.info.run_id, "reward")]
    assert told == list(range(EVERY + 1, STEPS + 1))


def test_a_run_that_fails_is_said_to_have_failed(run, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr("dcjax.loop.train.Updater", lambda setup: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(mlflow="failing")
    client = MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("failing").experiment_id])
    assert found.info.status == "FAILED"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named_with_what_installs_it(run, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "mlflow.tracking", raising=False)
    with pytest.raises(RunError, match=rf"pip install 'dcjax\[{name}\]'"):
        run(**{name: "x"})


def test_a_tracker_that_does_not_start_is_one_line(run, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "carrier-pigeon://x")
    with pytest.raises(RunError, match=r"tracking\.mlflow is 'x', and MLflow does not start: "):
        run(mlflow="x")
