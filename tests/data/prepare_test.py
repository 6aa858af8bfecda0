import json
import shutil

import huggingface_hub
import pytest

from dcjax.cli import main
from dcjax.data import prepare
from dcjax.data.datasets import SAMPLES, datasets
from dcjax.data.prepare import prepare_data


def test_the_report_of_the_samples(tmp_path):
    report = prepare_data(SAMPLES, cache_dir=tmp_path)
    assert [each.name for each in report.prepared] == list(datasets)
    assert sum(each.counts["kept"] for each in report.prepared) == 29 + 6 + 6 + 7 + 7 + 6 + 7
    assert not report.missing and not any(each.golds.unreadable + each.golds.refused for each in report.prepared)
    lines = str(report).splitlines()
    assert lines[1].split() == [
        *["dapo-math-17k", "33", "29", "17398", "0", "0", "3", "duplicate,", "1", "conflicting"]
    ]
    assert lines[7].split() == ["olympiadbench", "7", "7", "674", "or", "675", "0", "0", "-"]
    assert "amc23: 1 questions as in training, 0 alike (14.3% of 7)" in lines
    assert "aime24: 0 questions as in training, 1 alike (16.7% of 6)" in lines


def test_what_is_there_is_prepared_and_what_is_not_is_told(tmp_path):
    shutil.copy(SAMPLES / "aime24.jsonl", tmp_path)
    report = prepare_data(tmp_path, ["aime24", "math500"], cache_dir=tmp_path / "cache")
    assert [each.name for each in report.prepared] == ["aime24"]
    assert report.missing.keys() == {"math500"} and report.overlaps == []
    assert f"math500: not there; put it at {tmp_path}/math500.parquet" in str(report)


def test_golds_that_cannot_be_read_are_counted_for_each_data_set_and_listed(tmp_path):
    """Of minervamath, whose golds are of many spellings, and a column of floats."""
    minerva = ["5.", "-1./3", "4.5e33", r"\frac{1}{m} t", r"A \cap B", "np.arcsin(10/13)", "x" * 301, "}"]
    floats = [27.0, 1e16, 3e-05, 0.1, -0.5]
    for name, golds in {"minerva": minerva, "amc23": floats}.items():
        rows = [{"question": f"What is number {number}?", "answer": gold} for number, gold in enumerate(golds)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    report = prepare_data(tmp_path, ["minerva", "amc23"], cache_dir=tmp_path / "cache")
    checked = {each.name: each.golds for each in report.prepared}
    assert [gold.answer for gold in checked["minerva"].unreadable] == [r"A \cap B", "np.arcsin(10/13)", "}"]
    assert [gold.answer for gold in checked["minerva"].refused] == ["x" * 301, "}"]
    assert checked["amc23"].unreadable == checked["amc23"].refused == ()
    lines = str(report).splitlines()
    assert [line.split()[4:6] for line in lines[1:3]] == [["3", "2"], ["0", "0"]]
    (named,) = (line for line in lines if "cap B" in line)
    first = checked["minerva"].unreadable[0].id
    assert named == rf"minerva: gold 'A \\cap B' of {first} cannot be read; only its own text is right"
    assert sum("is refused, even as its own text in a box" in line for line in lines) == 2


def test_a_download_is_asked_for_by_repository_and_pattern(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repository, *, repo_type, allow_patterns, local_dir):
        asked.append((repository, repo_type, allow_patterns))
        local_dir.mkdir()
        (local_dir / "test.jsonl").write_text(json.dumps({"problem": "x", "answer": "1"}), encoding="utf-8")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for _ in range(2):
        report = prepare_data(tmp_path, ["math500"], download=True, cache_dir=tmp_path / "cache")
        assert report.prepared[0].sha256.keys() == {"math500/test.jsonl"}
    assert asked == [("HuggingFaceH4/MATH-500", "dataset", ["*.parquet", "*.jsonl"])]


def test_a_failed_download_says_what_to_do_by_hand(tmp_path, monkeypatch):
    def snapshot_download(*arguments, **options):
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(OSError, match=r"math500 was not downloaded \(no route\); put it at .*math500\.parquet"):
        prepare_data(tmp_path, ["math500"], download=True)


# --- the command ---


@pytest.fixture
def told(tmp_path, monkeypatch, capfd):
    """Runs `dcjax data`; returns its status and what it printed on either stream."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments):
        capfd.readouterr()
        return main(["data", *map(str, arguments)]), *capfd.readouterr()

    return run


def test_the_command_prints_the_report_or_its_json(told):
    status, output, _ = told(SAMPLES, "--names", "dapo-math-17k", "amc23")
    assert status == 0 and output.splitlines()[1].split()[:4] == ["dapo-math-17k", "33", "29", "17398"]
    assert "amc23: 1 questions as in training, 0 alike (14.3% of 7)" in output
    status, output, _ = told(SAMPLES, "--names", "dapo-math-17k", "amc23", "--json")
    report = json.loads(output)
    assert status == 0 and output.count("\n") == 1
    assert [each["counts"]["kept"] for each in report["prepared"]] == [29, 7]
    assert [each["golds"] for each in report["prepared"]] == [{"unreadable": [], "refused": []}] * 2


def test_the_command_downloads_only_where_it_is_told_to(told, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(prepare, "download_dataset", lambda name, data_dir: asked.append((name, data_dir)))
    status, output, _ = told(tmp_path, "--names", "math500")
    assert (status, asked) == (0, []) and "math500: not there; put it at" in output
    assert told(tmp_path, "--names", "math500", "--download")[0] == 2
    assert asked == [("math500", tmp_path)]


def test_the_command_refuses_what_there_is_not_in_one_line(told):
    status, output, errors = told(SAMPLES, "--names", "gsm8k")
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("dcjax: error: dataset is 'gsm8k'; it must be one of dapo-math-17k")


def test_the_command_names_the_file_and_the_cell_that_it_refuses(told, tmp_path):
    path = tmp_path / "math500.jsonl"
    path.write_text(json.dumps({"problem": "x", "answer": {"value": "7"}}), encoding="utf-8")
    status, output, errors = told(tmp_path)
    assert (status, output) == (2, "")
    assert errors == (
        f"dcjax: error: {path}, row 1: column 'answer' is {{'value': '7'}}; "
        "it must be text, a number or a list of them\n"
    )
