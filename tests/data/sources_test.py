import hashlib
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dcjax.data.datasets import SAMPLES, datasets
from dcjax.data.sources import checksum, find_files, read_examples, read_rows

AIME = datasets["aime24"]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(*pairs):
    return [{"problem": question, "answer": answer} for question, answer in pairs]


@pytest.mark.parametrize("name", datasets)
def test_parquet_and_jsonl_hold_the_same_examples(name, tmp_path):
    dataset = datasets[name]
    (source,) = find_files(dataset, SAMPLES)
    copy = write(tmp_path / f"{name}.parquet", [json.loads(line) for line in source.open(encoding="utf-8")])
    assert read_examples(dataset, [copy]) == read_examples(dataset, [source])


def test_of_a_parquet_file_only_the_columns_in_use_are_read(tmp_path):
    path = write(tmp_path / "aime24.parquet", [{"ID": 1, "Problem": "a", "Solution": "long", "Answer": "1"}])
    assert list(read_rows(AIME, path)) == [{"Problem": "a", "Answer": "1"}]


def test_each_question_is_kept_once_and_every_row_is_accounted_for(tmp_path):
    first = write(tmp_path / "aime24/a.jsonl", rows(("x", 1), ("y", 2), ("x", "1.0"), (" x", 1), ("", 5)))
    second = write(tmp_path / "aime24/b/c.parquet", rows(("y", "3"), ("z", "4"), ("w", None), ("z", "4")))
    assert find_files(AIME, tmp_path) == [first, second]
    examples, counts = read_examples(AIME, [first, second])
    assert [(example.question, example.answer) for example in examples] == [("x", "1"), ("y", "2"), ("z", "4")]
    assert counts == {"rows": 9, "kept": 3, "empty": 2, "duplicate": 3, "conflicting": 1}


def test_empty_lines_are_no_rows(tmp_path):
    path = tmp_path / "aime24.jsonl"
    path.write_text('\n{"problem": "x", "answer": 1}\n\n', encoding="utf-8")
    assert read_examples(AIME, [path])[1]["rows"] == 1


@pytest.mark.parametrize("line", ["no json", "[1]", '"text"'])
def test_a_damaged_line_is_named(line, tmp_path):
    path = tmp_path / "aime24.jsonl"
    path.write_text(f'{{"problem": "x", "answer": 1}}\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=f"aime24.jsonl, line 2: {re.escape(repr(line)[:-1])}"):
        read_examples(AIME, [path])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_of_another_schema_name_the_columns_found_and_wanted(kind, tmp_path):
    path = write(tmp_path / f"aime24.{kind}", [{"text": "x", "answer": 1}])
    with pytest.raises(ValueError, match="no column of the question among 'text', 'answer'; it must be one of 'prob"):
        read_examples(AIME, [path])


def test_a_copy_without_examples_is_an_error(tmp_path):
    path = write(tmp_path / "aime24.jsonl", rows(("", 1)))
    with pytest.raises(ValueError, match=r"aime24\.jsonl has no example of aime24"):
        read_examples(AIME, [path])


def test_a_missing_copy_says_what_to_put_where(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        find_files(AIME, tmp_path)
    for place in ("aime24.parquet", "aime24.jsonl", "aime24/"):
        assert f"{tmp_path}/{place}" in str(caught.value)
    assert "HuggingFaceH4/aime_2024" in str(caught.value)


def test_two_copies_are_an_error(tmp_path):
    write(tmp_path / "aime24.jsonl", rows(("x", 1)))
    write(tmp_path / "aime24/data/train.parquet", rows(("x", 1)))
    with pytest.raises(ValueError, match=r"aime24\.jsonl, aime24/data/train\.parquet; leave one"):
        find_files(AIME, tmp_path)


def test_a_checksum_is_of_the_bytes(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\0bytes" * 100_000)
    assert checksum(path) == hashlib.sha256(b"\0bytes" * 100_000).hexdigest()
