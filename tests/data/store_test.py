import hashlib
import json
import logging
import subprocess
import sys

import pytest

from dcjax.data import store
from dcjax.data.datasets import SAMPLES, datasets
from dcjax.data.sources import find_files, read_examples
from dcjax.data.store import default_cache, load_examples, prepare, read_metadata


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", datasets)
def test_what_is_read_back_is_what_the_files_hold_in_their_order(name, cache):
    dataset = datasets[name]
    examples, _ = read_examples(dataset, find_files(dataset, SAMPLES))
    assert load_examples(name, SAMPLES, cache_dir=cache) == examples


def test_checksums_and_counts_are_recorded_and_counts_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="dcjax"):
        folder = prepare("dapo-math-17k", SAMPLES, cache_dir=tmp_path)
    content = (SAMPLES / "dapo-math-17k.jsonl").read_bytes()
    assert read_metadata(folder) == {
        "sha256": {"dapo-math-17k.jsonl": hashlib.sha256(content).hexdigest()},
        "counts": {"rows": 33, "kept": 29, "empty": 0, "duplicate": 3, "conflicting": 1},
    }
    assert "dapo-math-17k: rows 33, kept 29, empty 0, duplicate 3, conflicting 1" in caplog.messages


def test_it_is_prepared_once_and_again_when_its_files_change(tmp_path):
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()

    def ask(answer):
        (data / "aime24.jsonl").write_text(json.dumps({"problem": "x", "answer": answer}), encoding="utf-8")
        return prepare("aime24", data, cache_dir=cache)

    first = ask(1)
    written = (first / "metadata.json").stat().st_mtime_ns
    assert ask(1) == first and (first / "metadata.json").stat().st_mtime_ns == written
    assert ask(2) != first
    assert load_examples("aime24", data, cache_dir=cache)[0].answer == "2"
    # nothing half-written is left
    assert len(list(cache.iterdir())) == 2


def test_of_several_that_prepare_at_the_same_time_the_first_counts(tmp_path, monkeypatch):
    write, faster = store._write, []

    def overtaken(*arguments):
        written = write(*arguments)
        monkeypatch.setattr(store, "_write", write)
        faster.append(prepare("amc23", SAMPLES, cache_dir=tmp_path))
        return written

    monkeypatch.setattr(store, "_write", overtaken)
    assert [prepare("amc23", SAMPLES, cache_dir=tmp_path)] == faster == list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_write", lambda name, data_dir, scratch: scratch / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        prepare("amc23", SAMPLES, cache_dir=tmp_path)


def test_a_copy_that_cannot_be_read_leaves_nothing_behind(tmp_path):
    (tmp_path / "aime24.jsonl").write_text("no json", encoding="utf-8")
    with pytest.raises(ValueError, match="not a JSON object"):
        prepare("aime24", tmp_path, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_is_where_caches_are(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "dcjax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache/dcjax"


def test_neither_preparing_nor_reading_imports_tensorflow_or_jax(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom dcjax.data.datasets import SAMPLES\n"
        "from dcjax.data.store import load_examples\n"
        "assert len(load_examples('math500', SAMPLES, cache_dir=Path(sys.argv[1]))) == 7\n"
        "sys.exit(bool({'tensorflow', 'jax'} & set(sys.modules)))"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, stdout=subprocess.DEVNULL)


def test_standard_output_is_left_to_results(tmp_path, capsys):
    prepare("math500", SAMPLES, cache_dir=tmp_path)
    assert capsys.readouterr().out == ""
