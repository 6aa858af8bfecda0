"""Local copies of published files, parquet or JSONL: where they lie, their checksums, and the examples in them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dcjax.data.datasets import SAMPLES, Dataset, Example, find_dataset

KINDS = (".parquet", ".jsonl")
"""What files are told apart by."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def instructions(dataset: Dataset, data_dir: Path | str) -> str:
    """What to put where, so that `find_files` finds it."""
    name = dataset.name
    return (
        f"put it at {data_dir}/{name}.parquet or {data_dir}/{name}.jsonl, or its files of either kind into "
        f"{data_dir}/{name}/ (those of {dataset.hub} on the Hugging Face Hub: {' '.join(dataset.files)})"
    )


def find_files(dataset: Dataset, data_dir: Path) -> list[Path]:
    """The files of a local copy, sorted: NAME.parquet, NAME.jsonl, or all files of these kinds anywhere in NAME/.

    Raises:
      FileNotFoundError: there is none; the message says what to put where.
      ValueError: there are several copies.
    """
    folder = data_dir / dataset.name
    inside = sorted(path for path in folder.rglob("*") if path.suffix in KINDS and path.is_file())
    copies = [[path] for kind in KINDS if (path := data_dir / f"{dataset.name}{kind}").is_file()]
    copies += [inside] if inside else []
    if not copies:
        raise FileNotFoundError(f"no copy of {dataset.name} in {data_dir}; {instructions(dataset, data_dir)}")
    if len(copies) > 1:
        found = ", ".join(copy[0].relative_to(data_dir).as_posix() for copy in copies)
        raise ValueError(f"{data_dir} holds several copies of {dataset.name}: {found}; leave one")
    return copies[0]


def require_files(names: Sequence[str], data_dir: Path, *, option: str) -> None:
    """Looks for local copies of data sets, without reading them.

    Args:
      names: of the data sets.
      data_dir: the directory that the copies should be in.
      option: of the command line, which chooses that directory.

    Raises:
      FileNotFoundError: some are missing; the message names all of them, what to put where, and the packaged samples.
      ValueError: there are several copies of one.
    """
    missing: list[str] = []
    for name in dict.fromkeys(names):
        try:
            find_files(find_dataset(name), data_dir)
        except FileNotFoundError:
            missing.append(name)
    if missing:
        raise FileNotFoundError(
            f"no copy of {', '.join(missing)} in {data_dir}; dcjax data {data_dir} --download fetches what is missing, "
            f"or put each at {data_dir}/NAME.parquet or {data_dir}/NAME.jsonl (docs/data.md); for a first try, the "
            f"samples that come with dcjax: {option} {SAMPLES}"
        )


def checksum(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


Choice = Callable[[Sequence[str]], Collection[str]]
"""The columns of a file -> those that are read."""


def read_rows(path: Path, choose: Choice = tuple) -> Iterator[Mapping[str, Any]]:
    """The rows of one file, .jsonl or .parquet; from a parquet file, only the columns that `choose` names.

    Raises:
      ValueError: as `choose` does, or the file is not of its kind; the message is one line, which names the file.
    """
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself; git lfs pull fetches that")
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    return _read_parquet(path, choose)


def _read_jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                wrong = f"{line[error.start : error.end]!r} after {line[: error.start][-20:]!r}"
                raise ValueError(f"{path}, line {number}: {wrong} is not UTF-8; convert the file to UTF-8") from None
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: {text.rstrip()[:60]!r} is not a JSON object")
            yield row


def _read_parquet(path: Path, choose: Choice) -> Iterator[Mapping[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = choose(names)
            read = [name for name in names if name in wanted]
            done = 0
            for batch in file.iter_batches(columns=read):
                yield from _to_python(batch, path, done)
                done += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged or no Parquet file: {str(error).splitlines()[0]}") from None


def _to_python(batch: Any, path: Path, done: int) -> list[dict[str, Any]]:
    """The rows of an Arrow batch, which comes after `done` other rows of the file."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        # text that is not UTF-8, or a time that Python cannot represent: look for the cell
        for number in range(batch.num_rows):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                try:
                    column[number].as_py()
                except (ValueError, OverflowError) as error:
                    where = f"{path}, row {done + number + 1}: column {name!r}"
                    raise ValueError(f"{where} cannot be read: {error}") from None
        raise


def read_examples(dataset: Dataset, files: Sequence[Path]) -> tuple[list[Example], dict[str, int]]:
    """The examples of a copy in the order of its rows, each question once, and the counts of rows.

    Returns:
      The examples, and the counts `rows`, `kept`, and of the dropped `empty` (no question or no answer), `duplicate`
      and `conflicting` (the question came before, with another answer).

    Raises:
      ValueError: as `read_rows`; or a row lacks its columns, a cell is not what it should be, or there is no example.
        The message names the file, the row (from 1, without empty lines) and the column.
    """
    kept: dict[str, Example] = {}
    counts = Counter(rows=0, kept=0, empty=0, duplicate=0, conflicting=0)
    for path in files:
        for number, row in enumerate(read_rows(path, dataset.columns), start=1):
            counts["rows"] += 1
            try:
                example = dataset.example(row)
            except ValueError as error:
                raise ValueError(f"{path}, row {number}: {error}") from None
            if example is None:
                counts["empty"] += 1
            elif (first := kept.setdefault(example.question, example)) is example:
                counts["kept"] += 1
            else:
                counts["duplicate" if first.answer == example.answer else "conflicting"] += 1
    if not kept:
        raise ValueError(f"{files[0]} has no example of {dataset.name}")
    return list(kept.values()), dict(counts)
