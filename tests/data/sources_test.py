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
    assert list(read_rows(path, AIME.columns)) == [{"Problem": "a", "Answer": "1"}]


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


def test_binary_columns_are_the_text_that_they_hold(tmp_path):
    questions, answers = ["Wie groß?", "x", ""], ["42", "\\frac12", "1"]
    binary = {"problem": questions, "answer": answers}
    table = pa.table({name: pa.array([text.encode() for text in texts]) for name, texts in binary.items()})
    assert table.schema.types == [pa.binary(), pa.binary()]
    pq.write_table(table, tmp_path / "aime24.parquet")
    examples, counts = read_examples(AIME, [tmp_path / "aime24.parquet"])
    assert [(example.question, example.answer) for example in examples] == [("Wie groß?", "42"), ("x", "\\frac12")]
    assert counts["empty"] == 1


def test_a_nan_answer_is_counted_as_empty(tmp_path):
    table = pa.table({"problem": ["x", "y"], "answer": [1.0, float("nan")]})
    pq.write_table(table, tmp_path / "aime24.parquet")
    line = '{"problem": "z", "answer": NaN}\n'
    (tmp_path / "other.jsonl").write_text(line, encoding="utf-8")
    examples, counts = read_examples(AIME, [tmp_path / "aime24.parquet", tmp_path / "other.jsonl"])
    assert [(example.question, example.answer) for example in examples] == [("x", "1")]
    assert counts == {"rows": 3, "kept": 1, "empty": 2, "duplicate": 0, "conflicting": 0}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_cell_that_is_refused_is_named_by_file_row_and_column(kind, tmp_path):
    first = write(tmp_path / "a.jsonl", rows(("x", 1), ("y", 2)))
    answers = [{"value": "7"}, {"value": "8"}]
    second = write(tmp_path / f"b.{kind}", rows(*zip("zw", answers, strict=True)))
    message = f"{second}, row 1: column 'answer' is {{'value': '7'}}; it must be text, a number or a list of them"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read_examples(AIME, [first, second])


@pytest.mark.parametrize("column", ["problem", "answer"])
def test_text_that_is_not_utf8_is_named_by_file_row_and_column(column, tmp_path):
    path = tmp_path / "aime24.parquet"
    data = pa.array([b"1", b"2", "groß".encode("latin-1")])
    columns = {"problem": pa.array(["x", "y", "z"]), "answer": pa.array(["1", "2", "3"])}
    for kind in (pa.binary(), pa.string()):
        # as writers leave it that do not look
        cells = pa.Array.from_buffers(kind, 3, data.buffers())
        pq.write_table(pa.table(columns | {column: cells}), path)
        with pytest.raises(ValueError, match=rf"^{path}, row 3: column '{column}' [^\n]*$"):
            read_examples(AIME, [path])


def test_a_file_in_latin_1_is_refused_by_its_line(tmp_path):
    path = tmp_path / "aime24.jsonl"
    path.write_bytes('{"problem": "x", "answer": 1}\n{"problem": "Wie groß?", "answer": 2}\n'.encode("latin-1"))
    with pytest.raises(
        ValueError, match=rf"^{path}, line 2: b'\\xdf' after b'.*Wie gro' is not UTF-8; convert the file"
    ):
        read_examples(AIME, [path])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_pointer_of_git_lfs_is_told_from_the_file(kind, tmp_path):
    path = tmp_path / f"aime24.{kind}"
    path.write_text(POINTER)
    with pytest.raises(ValueError, match=rf"^{path} is a Git LFS pointer, .*git lfs pull"):
        read_examples(AIME, [path])


@pytest.mark.parametrize("keep", [0, 3, -9])
def test_a_parquet_file_that_is_none_is_named(keep, tmp_path):
    path = write(tmp_path / "aime24.parquet", rows(("x", "1")))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"^{path} is damaged or no Parquet file: [^\n]+$"):
        read_examples(AIME, [path])


def test_a_parquet_file_whose_pages_are_damaged_is_named(tmp_path):
    path = tmp_path / "aime24.parquet"
    pq.write_table(pa.Table.from_pylist(rows(("x", "1" * 999))), path, use_dictionary=False, compression="gzip")
    data = bytearray(path.read_bytes())
    data[80:100] = bytes(20)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"^{path} is damaged or no Parquet file: [^\n]+$"):
        read_examples(AIME, [path])


def test_a_line_that_nests_without_end_is_refused(tmp_path):
    path = tmp_path / "aime24.jsonl"
    path.write_text('{"answer": ' + "[" * 100_000, encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1: .* is not a JSON object"):
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
