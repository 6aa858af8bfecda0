import json
import os
import pwd
from pathlib import Path

import pytest

from dcjax.data.mathematics import MathTask
from dcjax.errors import RunError
from dcjax.models import load_hf, read_config, save_hf
from dcjax.models.config import presets
from dcjax.paths import local_path
from dcjax.recipe.config import Config
from dcjax.recipe.plain import from_dict, to_dict
from dcjax.recipe.reward import RewardConfig
from dcjax.tools.convert import import_model

ADDRESSES = ["gs://bucket/x", "s3://bucket", "hdfs:///x", "file:///tmp/x", "hf://datasets/a/b", "gs://", "a+b.c-1://x"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.mark.parametrize(
    "given",
    ["x", "./x", "../x/y.z", "/x", ".", "a b/c", "run:3", "s3:x", "x/gs:/y", "/gs:/y", "x~", "x/~", "://x", "1://"],
)
def test_a_local_path_is_left_as_it_is(given):
    assert local_path(given) == local_path(Path(given)) == Path(given)


def test_homes_are_spelled_out(home):
    me = pwd.getpwuid(os.getuid())
    assert local_path("~") == home
    assert local_path("~/a b") == local_path(Path("~/a b")) == home / "a b"
    assert local_path(f"~{me.pw_name}/x") == Path(me.pw_dir) / "x"
    assert local_path(local_path("~/x")) == local_path("~/x")


@pytest.mark.parametrize("given", ["", " ", "\t", *ADDRESSES, "~nobody-has-this-name/x"])
def test_what_is_no_local_path_is_refused_and_quoted(given):
    with pytest.raises(ValueError) as caught:
        local_path(given)
    assert str(caught.value).startswith(f"is {given!r}; ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("given", ADDRESSES)
def test_an_address_is_known_where_it_has_become_a_path(given):
    """Two slashes are one there."""
    with pytest.raises(ValueError, match="must be a local path"):
        local_path(Path(given))


# --- configs


def config(**paths):
    """A config and its task, whichever of the two has the field."""
    task = MathTask(max_prompt_tokens=9, **{name: paths.pop(name) for name in list(paths) if name not in OF_RUN})
    return Config(task=task, reward=RewardConfig(workers=1), **paths)


OF_RUN = ("run_dir", "pretrained")
FIELDS = {
    "run_dir": "run_dir",
    "pretrained": "pretrained",
    "data_dir": "task.data_dir",
    "index_file": "task.index_file",
}


@pytest.mark.parametrize("name", FIELDS)
def test_configs_hold_local_paths(name, home):
    for given in ("~/x", Path("~/x")):
        made = config(**{name: given})
        assert getattr(made if name in OF_RUN else made.task, name) == home / "x"
        assert from_dict(json.loads(json.dumps(to_dict(made)))) == made
    for given in ("", "gs://bucket/x", Path("gs://bucket/x"), "~nobody-has-this-name"):
        with pytest.raises(ValueError) as caught:
            config(**{name: given})
        assert str(caught.value).startswith(f"{FIELDS[name]} is {str(given)!r}; ")


@pytest.mark.parametrize("name", FIELDS)
def test_a_recorded_config_is_checked_too(name):
    recorded = to_dict(config())
    (recorded if name in OF_RUN else recorded["task"])[name] = "gs://bucket/x"
    with pytest.raises(ValueError, match=rf"^{FIELDS[name]} is 'gs://bucket/x'; it must be a local path"):
        from_dict(recorded)


def test_a_run_without_a_directory_has_its_own():
    assert config().run_dir is None and config().directory == Path("runs/run")


# --- folders of weights


@pytest.mark.parametrize("given", ["", "gs://bucket/x", Path("gs://bucket/x")])
def test_weights_are_read_and_written_locally(given, tmp_path):
    for act in (load_hf, read_config, lambda path: save_hf(path, presets["tiny"], {})):
        with pytest.raises(ValueError):
            act(given)
    assert list(tmp_path.iterdir()) == []


def test_an_imported_folder_is_local(home):
    folder = Path(__file__).parent / "data" / "hf_tiny_qwen3"
    with pytest.raises(RunError, match="is 'gs:/bucket/x'; it must be a local path"):
        import_model(folder, Path("gs://bucket/x"))
    import_model(folder, Path("~/x"))
    assert not Path("gs:").exists() and not Path("~").exists()
    assert read_config("~/x") == read_config(home / "x") == read_config(folder)
