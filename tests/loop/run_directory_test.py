import dataclasses
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from dcjax.errors import RunError
from dcjax.loop.run_directory import (
    BESIDE_CONFIG,
    VERSIONED,
    load_config,
    locate,
    open_run,
    recorded_end_tokens,
    start_of,
)
from dcjax.recipe.config import CheckpointConfig, Config
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.recipe.plain import to_dict
from dcjax.sharding.mesh import MeshConfig


@pytest.fixture
def config(tmp_path):
    return Config(steps=7, objective=ObjectiveConfig(budget=0.25), run_dir=tmp_path / "runs" / "one")


def refusal(action):
    """The message of the RunError that a call raises."""
    with pytest.raises(RunError) as caught:
        action()
    return str(caught.value)


def enter(config):
    with open_run(config):
        pass


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_file_system_without_locks_is_refused(config, monkeypatch):
    def without_locks(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without_locks)
    assert refusal(lambda: enter(config)) == (
        f"{config.directory} cannot be locked: No locks available; "
        "a run directory must be on a file system that has locks (docs/launching.md names some)"
    )
    assert contents(config.directory) == {".lock": b""}


def test_a_run_directory_is_made_with_its_config(config):
    with open_run(config) as directory:
        assert directory == config.directory
        recorded = json.loads((directory / "config.json").read_text())
    versions, *_, started_in, started = (recorded.pop(name) for name in BESIDE_CONFIG)
    assert recorded == to_dict(config)
    assert load_config(config.directory) == config
    assert started_in == str(Path.cwd()) and datetime.fromisoformat(started) <= datetime.now()
    assert versions == {name: importlib.metadata.version(name) for name in VERSIONED} | {
        "python": platform.python_version()
    }


def test_the_tokens_that_end_a_response_are_recorded(config):
    for recorded in ((1, 16), [1, 16]):
        with open_run(config, end_tokens=recorded) as directory:
            assert recorded_end_tokens(directory, config) == [1, 16]


def test_a_run_directory_is_entered_again_with_the_same_config(config):
    enter(config)
    first = (config.directory / "config.json").read_bytes()
    enter(config)
    assert (config.directory / "config.json").read_bytes() == first


def test_a_relative_run_directory_is_the_same_run_seen_from_elsewhere(config, monkeypatch):
    enter(config)
    monkeypatch.chdir(config.directory.parent)
    enter(dataclasses.replace(config, run_dir=Path("one")))
    assert load_config(Path("one")).steps == config.steps


def test_where_and_how_often_a_run_is_saved_may_change(config):
    enter(config)
    changed = dataclasses.replace(config, mesh=MeshConfig(fsdp=2), checkpoint=CheckpointConfig(every=1, keep=1))
    enter(changed)
    assert load_config(config.directory) == changed


def test_a_directory_of_another_config_lists_the_fields_and_is_left_as_it_was(config):
    enter(config)
    before = contents(config.directory)
    other = dataclasses.replace(config, seed=3, objective=ObjectiveConfig(budget=0.5))
    message = refusal(lambda: enter(other))
    assert str(config.directory) in message
    assert "seed 3 (there 0)" in message and "objective.budget 0.5 (there 0.25)" in message
    assert "steps" not in message
    assert contents(config.directory) == before


def test_a_directory_written_with_a_field_that_is_gone_is_another_config(config):
    enter(config)
    path = config.directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"wisdom": 3}))
    assert "wisdom None (there 3)" in refusal(lambda: enter(config))


@pytest.mark.parametrize(
    ("recorded", "present"), [("int8", "w8a8"), ("int8_weight_only", "int8_channel"), ("fp8", "fp8")]
)
def test_a_run_from_before_formats_were_renamed_goes_on_in_the_format_it_had(config, recorded, present):
    enter(config)
    path = config.directory / "config.json"
    written = json.loads(path.read_text())
    assert load_config(config.directory).serving.format == written["serving"]["format"] == "int8"
    del written["model"]["rope_scaling"]
    written["serving"]["format"] = recorded
    path.write_text(json.dumps(written))
    assert load_config(config.directory).serving.format == present


def test_a_directory_is_held_while_the_run_is_open(config):
    with open_run(config):
        before = contents(config.directory)
        message = refusal(lambda: enter(dataclasses.replace(config, checkpoint=CheckpointConfig(every=1))))
        assert "another process" in message and str(config.directory) in message and "--run-dir" in message
        assert contents(config.directory) == before
    enter(config)


def test_a_directory_is_let_go_after_an_error(config):
    with pytest.raises(ZeroDivisionError), open_run(config):
        raise ZeroDivisionError
    enter(config)


def test_a_lock_that_a_killed_process_left_does_not_hold(config):
    """The lock is the kernel's, not the file's."""
    config.directory.mkdir(parents=True)
    holds = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); print(); input()"
    lock = str(config.directory / ".lock")
    with subprocess.Popen(
        [sys.executable, "-uc", holds, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()
        assert "another process" in refusal(lambda: enter(config))
        holder.kill()
    enter(config)


def test_reading_a_config_needs_no_lock(config):
    with open_run(config) as directory:
        assert load_config(directory) == config


def test_a_run_and_its_checkpoints_are_found_by_any_path_to_them(tmp_path, monkeypatch):
    """A run may be called by a number, as those of several seeds are."""
    run = tmp_path / "seeds" / "7"
    (run / "checkpoints" / "8").mkdir(parents=True)
    assert locate(run) == (run, None)
    assert locate(run / "checkpoints" / "8") == (run, 8)
    monkeypatch.chdir(run)
    assert locate(Path("checkpoints/8/")) == (run, 8)
    assert locate(Path(".")) == (run, None)
    monkeypatch.chdir("checkpoints")
    assert locate(Path("8")) == (run, 8)
    assert locate(Path("..")) == (run, None)


def test_a_directory_without_a_run_says_what_makes_one(tmp_path):
    for directory in (tmp_path, tmp_path / "missing"):
        message = refusal(lambda directory=directory: load_config(directory))
        assert f"no run in {directory}" in message and "dcjax train" in message


@pytest.mark.parametrize("damage", [b"", b"[]", b"3", b"{", b"\xff"])
def test_a_config_that_is_no_json_object_is_named(config, damage):
    config.directory.mkdir(parents=True)
    (config.directory / "config.json").write_bytes(damage)
    for action in (lambda: load_config(config.directory), lambda: enter(config)):
        message = refusal(action)
        assert str(config.directory / "config.json") in message and "damaged" in message


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        ({"wisdom": 3}, "'wisdom'"),
        ({"steps": -1}, "steps is -1"),
        ({"task": 3}, "config.json"),
        ({"steps": "many"}, "config.json"),
    ],
    ids=str,
)
def test_a_config_of_another_version_is_named_with_the_reason(config, recorded, expected):
    config.directory.mkdir(parents=True)
    (config.directory / "config.json").write_text(json.dumps(recorded))
    message = refusal(lambda: load_config(config.directory))
    assert str(config.directory / "config.json") in message and expected in message


def test_a_file_in_the_way_is_left_as_it_is(config):
    config.directory.parent.mkdir()
    config.directory.write_text("mine")
    with pytest.raises(OSError, match="one"):
        enter(config)
    assert config.directory.read_text() == "mine"


DATA = {"train dapo-math-17k": "29 problems (SHA-256 ab)", "heldout aime24": "6 problems (SHA-256 cd)"}


def test_a_run_goes_on_only_with_the_data_that_it_began_with(config):
    with open_run(config, data=DATA):
        pass
    with open_run(config, data=DATA) as directory:
        assert load_config(directory) == config
    changed = DATA | {"heldout aime24": "5 problems (SHA-256 ef)"}
    with pytest.raises(RunError) as caught, open_run(config, data=changed):
        pass
    told = "on other data: heldout aime24: 5 problems (SHA-256 ef), there 6 problems (SHA-256 cd); put the files"
    assert told in str(caught.value) and "train" not in str(caught.value).split(";")[0]
    with pytest.raises(RunError, match="train dapo-math-17k: None, there 29 problems"), open_run(config):
        pass


def test_a_run_that_goes_on_has_another_template_or_other_files_and_says_which(config):
    template, files = {"prompt template": "SHA-256 ab"}, {"heldout aime24": "6 problems (SHA-256 ef)"}
    with open_run(config, data=DATA | {"prompt template": "SHA-256 cd"}):
        pass
    for changed, told in (
        (template, "put the chat template that it began with back into the tokenizer's folder, or choose"),
        (
            template | files,
            "into the tokenizer's folder and the files that it began with back into task.data_dir, or choose",
        ),
    ):
        with pytest.raises(RunError, match=told), open_run(config, data=DATA | changed):
            pass


# --- when a run was started ---


def test_a_run_was_started_when_it_was_started_first(config):
    first = datetime(2024, 2, 3, 4, 5, 6)
    assert start_of(config) > first
    with open_run(config, started=first):
        pass
    assert start_of(config) == first
    enter(config)
    assert start_of(config) == first


@pytest.mark.parametrize("recorded", ["yesterday", 7, ["2024"]])
def test_a_start_that_is_no_time_is_refused(config, recorded):
    enter(config)
    path = config.directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"started": recorded}))
    told = refusal(lambda: start_of(config))
    assert told.startswith(f"{path}: started is {recorded!r}; it must be a time, such as '20") and "\n" not in told


def test_a_run_that_does_not_say_when_it_was_started_goes_on(config):
    enter(config)
    path = config.directory / "config.json"
    recorded = json.loads(path.read_text())
    del recorded["started"]
    path.write_text(json.dumps(recorded))
    assert start_of(config) <= datetime.now()
    enter(config)
