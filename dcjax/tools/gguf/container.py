"""The container of a GGUF file: its metadata and its table of tensors, checked before anything of it is used.

The format is llama.cpp's, in ggml's docs/gguf.md: magic, version and counts; then the metadata, each value behind its
name and type; then the table of tensors; then, from the next multiple of the alignment, the tensors. The types of
tensors, with their sizes, are those of the package `gguf`. Its reader is not used: it trusts the counts and offsets of
a file, and makes several arrays of every token.
"""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dcjax.models.hf_files import quote

MAGIC = b"GGUF"
VERSIONS = (2, 3)
"""The versions that are read. They differ only in that 3 may be big-endian, which is refused; 1 is long out of use."""
MAX_HEADER_BYTES = 1 << 27
"""Longest metadata and table of tensors, in bytes; those of a vocabulary of 256 thousand tokens take 2^24."""
MAX_TEXTS = 1 << 22
"""Most strings in one list, such as the tokens."""
MAX_ENTRIES = 1 << 17
"""Most values of the metadata, and most tensors."""
MAX_RANK = 4
"""Most dimensions of a tensor."""

_STRING, _LIST, _BOOL = 8, 9, 7
_NUMBERS = {
    number: np.dtype(code)
    for number, code in {
        0: "<u1",
        1: "<i1",
        2: "<u2",
        3: "<i2",
        4: "<u4",
        5: "<i4",
        6: "<f4",
        _BOOL: "<u1",
        10: "<u8",
        11: "<i8",
        12: "<f8",
    }.items()
}
"""The dtypes of the format's types of numbers."""


def ggml() -> ModuleType:
    """The package `gguf`, which knows the types of tensors and how to dequantise them.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import gguf  # pyrefly: ignore[missing-import]  (the extra gguf)
    except ImportError:
        raise ValueError("GGUF files are read with dcjax's extra gguf: pip install 'dcjax[gguf]'") from None
    return gguf


def is_gguf(path: Path) -> bool:
    """Whether a path is meant as a GGUF file: it is a file, or would be by its name."""
    return path.is_file() or (path.suffix.lower() == ".gguf" and not path.is_dir())


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a GGUF file, which is mapped and not read."""

    kind: Any
    """Its type, a `gguf.GGMLQuantizationType`: how numbers are packed into blocks, each of so many of one row."""
    shape: tuple[int, ...]
    """Sizes in NumPy's order, the last the one along which blocks lie; the file has them reversed."""
    data: np.ndarray
    """The file's bytes [..., bytes of a row] (uint8)."""


@dataclass(frozen=True)
class Container:
    """The metadata and the tensors of a GGUF file."""

    path: Path
    metadata: Mapping[str, Any]
    """Numbers, booleans, strings, lists of strings, and arrays of numbers, by their keys."""
    tensors: Mapping[str, StoredTensor]
    """By their names in the file."""

    def refuse(self, key: str, right: str) -> ValueError:
        """The error for a value of the metadata, saying what would be right."""
        named = quote(key)[1:-1]
        if key not in self.metadata:
            return ValueError(f"{self.path} has no {named}; it must be {right}")
        return ValueError(f"{self.path}: {named} is {quote(self.metadata[key])}; it must be {right}")

    def integer(self, key: str, default: int | None = None, *, most: int = 2**31) -> int:
        """An integer from 0 to `most`.

        Raises:
          ValueError: it is missing without a default, or is anything else.
        """
        value = self.metadata.get(key, default)
        # a bool is an int to Python
        if type(value) is not int or not 0 <= value <= most:
            raise self.refuse(key, f"an integer from 0 to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; of a float32, the shortest decimal that rounds to it: 1e-05, not 9.999999747378752e-06.

        Raises:
          ValueError: it is missing without a default, or is anything else.
        """
        value = self.metadata.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.refuse(key, "a finite number")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string.

        Raises:
          ValueError: it is missing without a default, or is anything else.
        """
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self.refuse(key, "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A boolean.

        Raises:
          ValueError: it is anything else.
        """
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings.

        Raises:
          ValueError: it is missing or anything else.
        """
        value = self.metadata.get(key)
        if not isinstance(value, list):
            raise self.refuse(key, "a list of strings")
        return value

    def numbers(self, key: str, count: int) -> np.ndarray:
        """A list of so many numbers [count].

        Raises:
          ValueError: it is missing, is anything else, or has another length.
        """
        value = self.metadata.get(key)
        if not isinstance(value, np.ndarray) or len(value) != count:
            raise self.refuse(key, f"a list of {count} numbers")
        return value


def open_container(path: Path) -> Container:
    """The container of a GGUF file: its header read and checked, its tensors mapped and not read.

    Every count is held against the bytes that are left before anything is allocated for it.

    Raises:
      ValueError: the file is no GGUF, is big-endian, truncated, damaged or too large, or the package `gguf` is not
        installed; the message is one line.
      FileNotFoundError: there is no such file.
      OSError: it cannot be read.
    """
    kinds = ggml().GGMLQuantizationType
    sizes = ggml().GGML_QUANT_SIZES
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give a GGUF file")
    with open(path, "rb") as file:
        start = file.read(len(MAGIC))
        if start != MAGIC:
            raise ValueError(f"{path} is no GGUF file: it begins with {quote(start)}, and must with {quote(MAGIC)}")
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    header = _Header(path, mapped)
    tensor_count, value_count = _read_counts(header)
    metadata = _read_metadata(header, value_count)
    table = [_read_entry(header, kinds, sizes) for _ in range(tensor_count)]
    container = Container(path, metadata, {})
    alignment = container.integer("general.alignment", 32)
    if alignment == 0 or alignment & (alignment - 1):
        raise container.refuse("general.alignment", "a power of 2")
    start = -(-header.position // alignment) * alignment
    _check_placed(path, table, start, len(mapped), alignment)
    tensors = {
        entry.name: StoredTensor(
            entry.kind,
            entry.shape,
            np.frombuffer(mapped, np.uint8, entry.size, start + entry.offset).reshape(*entry.shape[:-1], -1),
        )
        for entry in table
    }
    return Container(path, metadata, tensors)


class _Header:
    """Reads the header from its beginning, and never past its end.

    Raises:
      ValueError: from every method, the header ends before what is read, or its bytes are not what they must be.
    """

    def __init__(self, path: Path, mapped: memoryview):
        self.path = path
        self.mapped = mapped
        self.end = min(len(mapped), MAX_HEADER_BYTES)
        self.position = len(MAGIC)

    def damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is damaged: {what}, at byte {self.position}")

    def take(self, size: int) -> memoryview:
        """The next bytes."""
        if size > self.end - self.position:
            raise self._over()
        self.position += size
        return self.mapped[self.position - size : self.position]

    def countable(self, count: int, size: int, what: str) -> int:
        """A count of things that take at least so many bytes each, after checking that the header has room for them."""
        if count * size > self.end - self.position:
            raise ValueError(
                f"{self.path} is truncated or damaged: it announces {count} {what}, and has no room for them"
            )
        return count

    def number(self, kind: int) -> Any:
        """The next number, as an int, a float or a bool."""
        dtype = _NUMBERS[kind]
        value = np.frombuffer(self.take(dtype.itemsize), dtype)[0]
        if kind == _BOOL and value > 1:
            raise self.damaged(f"a boolean is {value}; it must be 0 or 1")
        # a float32 was written for a decimal number, which its shortest decimal gives back
        return bool(value) if kind == _BOOL else float(str(value)) if dtype == np.float32 else value.item()

    def integer(self, size: int) -> int:
        """The next unsigned integer of so many bytes."""
        return int.from_bytes(self.take(size), "little")

    def text(self) -> str:
        """The next string, which is UTF-8."""
        part = self.take(self.countable(self.integer(8), 1, "bytes of a string"))
        try:
            return str(part, "utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"a string is not UTF-8 ({quote(bytes(part[:60]))}, {error.reason})") from None

    def value(self, kind: int) -> Any:
        """The next value of a type."""
        if kind == _STRING:
            return self.text()
        if kind in _NUMBERS:
            return self.number(kind)
        if kind != _LIST:
            raise self.damaged(f"a value has the type {kind}; types are 0 to 12")
        within, count = self.integer(4), self.integer(8)
        if within == _STRING:
            if count > MAX_TEXTS:
                raise self.damaged(f"a list has {count} strings; at most {MAX_TEXTS} are read")
            return [self.text() for _ in range(self.countable(count, 8, "strings"))]
        if within not in _NUMBERS:
            raise self.damaged(f"a list is of type {within}; only lists of strings and of numbers are read")
        dtype = _NUMBERS[within]
        return np.frombuffer(self.take(self.countable(count, dtype.itemsize, "numbers") * dtype.itemsize), dtype)

    def _over(self) -> ValueError:
        if self.end < len(self.mapped):
            return ValueError(
                f"{self.path} is damaged: its metadata and table of tensors are longer than {MAX_HEADER_BYTES} bytes"
            )
        return ValueError(f"{self.path} is truncated: it ends in its metadata or table of tensors")


@dataclass(frozen=True)
class _Entry:
    """A row of the table of tensors."""

    name: str
    kind: Any
    shape: tuple[int, ...]
    offset: int
    """From the beginning of the first tensor, in bytes."""
    size: int
    """In bytes."""


def _read_counts(header: _Header) -> tuple[int, int]:
    """The numbers of tensors and of values of the metadata."""
    version = header.integer(4)
    if version and not version & 0xFFFF:
        raise ValueError(f"{header.path} is big-endian; only little-endian GGUF files are read")
    if version not in VERSIONS:
        raise ValueError(
            f"{header.path} is of GGUF version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} are read"
        )
    tensors, values = header.integer(8), header.integer(8)
    for count, what, size in ((tensors, "tensors", 32), (values, "values", 13)):
        if header.countable(count, size, what) > MAX_ENTRIES:
            raise ValueError(f"{header.path} has {count} {what}; at most {MAX_ENTRIES} are read")
    return tensors, values


def _read_metadata(header: _Header, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = header.text()
        if key in metadata:
            raise header.damaged(f"it names {quote(key)} twice")
        metadata[key] = header.value(header.integer(4))
    return metadata


def _read_entry(header: _Header, kinds: Any, sizes: Mapping[Any, tuple[int, int]]) -> _Entry:
    name, rank = header.text(), header.integer(4)
    if not 1 <= rank <= MAX_RANK:
        raise header.damaged(f"{quote(name)} has {rank} dimensions; it must have 1 to {MAX_RANK}")
    shape = tuple(header.integer(8) for _ in range(rank))[::-1]
    number, offset = header.integer(4), header.integer(8)
    try:
        kind = kinds(number)
    except ValueError:
        raise header.damaged(f"{quote(name)} is of type {number}, which is not known") from None
    width, block_bytes = sizes[kind]
    if 0 in shape or shape[-1] % width:
        right = f"positive sizes, the last a multiple of {width}" if width > 1 else "positive sizes"
        raise header.damaged(f"{quote(name)} has shape {list(shape)}; one of type {kind.name} must have {right}")
    return _Entry(name, kind, shape, offset, math.prod(shape) // width * block_bytes)


def _check_placed(path: Path, table: list[_Entry], start: int, end: int, alignment: int) -> None:
    """Checks that the tensors have names of their own, and bytes of their own within the file."""
    if len({entry.name for entry in table}) < len(table):
        names = sorted(entry.name for entry in table)
        twice = next(name for name, following in itertools.pairwise(names) if name == following)
        raise ValueError(f"{path} is damaged: it has the tensor {quote(twice)} twice")
    placed = sorted(table, key=lambda entry: entry.offset)
    expected = 0
    for entry in placed:
        # nothing but padding lies between two, so that a type or a shape that is wrong is noticed
        if entry.offset != expected:
            raise ValueError(
                f"{path} is damaged: {quote(entry.name)} is at {entry.offset}; behind the tensor before it, and at a "
                f"multiple of the alignment {alignment}, it must be at {expected}"
            )
        if start + entry.offset + entry.size > end:
            raise ValueError(
                f"{path} is truncated or damaged: {quote(entry.name)} of {entry.size} bytes at "
                f"{start + entry.offset} is not within the file's {end}"
            )
        expected = -(-(entry.offset + entry.size) // alignment) * alignment
    if (more := end - start - expected) > 0:
        raise ValueError(f"{path} is damaged: {more} bytes lie behind its last tensor, and must not")
