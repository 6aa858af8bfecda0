"""safetensors files: a header that is checked entry by entry, a payload that is mapped, and a checksum of each tensor.

A file is 8 bytes with the header's length (little-endian), a JSON header of names, dtypes, shapes and offsets, and the
tensors, C-ordered and little-endian. The checksums are dcjax's own addition, in the header's free-form metadata.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
}
"""What weights may be stored in, by the format's own names."""

# bytes of what may stand in a file beside weights
_OTHER_SIZES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | _OTHER_SIZES | {"F8_E4M3": 1, "F8_E5M2": 1}

# an exponent of ones is an infinity or a NaN
_EXPONENTS = {
    "F32": np.array(0x7F800000, np.uint32),
    "BF16": np.array(0x7F80, np.uint16),
    "F16": np.array(0x7C00, np.uint16),
}

MAX_HEADER_BYTES = 100_000_000
"""As the reference implementation has it."""
CHECKSUMS = "dcjax.crc32"
"""The metadata key of the checksums: a JSON object from names to CRC-32s, eight hexadecimal digits."""
_CHUNK_BYTES = 1 << 22

_quoting = reprlib.Repr()
_quoting.maxstring, _quoting.maxother, _quoting.maxlong = 100, 60, 30


def quote(value: object) -> str:
    """`value` as one line of at most about 100 characters, whoever wrote it."""
    return " ".join(_quoting.repr(value).split())


def parse_json_object(text: bytes | str, where: str) -> dict[str, Any]:
    """A JSON object, strictly: UTF-8, no name twice, no NaN.

    Raises:
      ValueError: anything else, nesting too deep to parse, or integers of thousands of digits.
    """
    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        value = json.loads(decoded, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged: {quote(str(error))[1:-1]}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is damaged: it is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"it names {quote(twice)} twice")
    return named


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    dtype: str
    """The format's own name: F32, BF16, ..."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the start of the file."""
    stop: int
    """The byte after its last."""


class TensorFile:
    """One safetensors file, its header read and checked, its payload mapped and not read.

    Attributes:
      path: of the file.
      size: bytes.
      entries: the tensors by name.
      checksums: CRC-32s by name; empty where the file carries none.

    Raises:
      ValueError: a damaged header, or a payload that is not exactly as long as the header says.
      OSError: the file cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            header, payload_start = self._read_header(file)
            self.checksums = self._parse_metadata(header.pop("__metadata__", {}))
            self.entries = {name: self._parse_entry(name, entry, payload_start) for name, entry in header.items()}
            self._check_layout(payload_start)
            self._bytes = np.memmap(file, np.uint8, "r")

    def tensor(self, name: str) -> np.ndarray:
        """A view of one tensor in the mapped file: nothing is read before it is used.

        Raises:
          ValueError: a dtype that is not in `DTYPES`.
        """
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise ValueError(f"{self.path}: {name} is stored as {entry.dtype}; supported are {', '.join(DTYPES)}")
        return self._bytes[entry.start : entry.stop].view(DTYPES[entry.dtype]).reshape(entry.shape)

    def verify(self, name: str) -> None:
        """Reads one tensor through, a few megabytes at a time.

        Raises:
          ValueError: an unsupported dtype, bits that are not the ones its checksum was made of, an infinity or a NaN.
        """
        checksum, finite = _scan(self.tensor(name))
        if checksum != self.checksums.get(name, checksum):
            raise ValueError(
                f"{self.path}: {name} is damaged, its checksum is {checksum:08x} and was "
                f"{self.checksums[name]:08x} when written; copy or export the file again"
            )
        if not finite:
            raise ValueError(f"{self.path}: {name} has an infinity or a NaN; weights must be finite")

    def _read_header(self, file) -> tuple[dict[str, Any], int]:
        length = int.from_bytes(file.read(8), "little")
        if self.size < 8 or 8 + length > self.size:
            raise ValueError(
                f"{self.path} is truncated or no safetensors file: {self.size} bytes, "
                f"with a header said to take {length}"
            )
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{self.path} has a header of {length} bytes; at most {MAX_HEADER_BYTES} are supported")
        return parse_json_object(file.read(length), f"{self.path}: its header"), 8 + length

    def _parse_metadata(self, metadata: Any) -> dict[str, int]:
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError(f"{self.path} is damaged: its __metadata__ is not an object of strings")
        written = parse_json_object(metadata.get(CHECKSUMS, "{}"), f"{self.path}: its {CHECKSUMS}")
        try:
            return {name: int(digits, 16) for name, digits in written.items()}
        except (TypeError, ValueError):
            raise ValueError(f"{self.path} is damaged: a checksum in {CHECKSUMS} is not hexadecimal") from None

    def _parse_entry(self, name: str, entry: Any, payload_start: int) -> Entry:
        where = f"{self.path} is damaged: tensor {quote(name)}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{where} is {quote(entry)}; it must have a dtype, a shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _SIZES:
            raise ValueError(f"{where} has dtype {quote(dtype)}, which the format does not know")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"{where} has shape {quote(shape)} and offsets {quote(offsets)}, not lists of sizes")
        if offsets[1] - offsets[0] != math.prod(shape) * _SIZES[dtype]:
            raise ValueError(f"{where} has offsets {quote(offsets)}, which do not fit {dtype} {quote(shape)}")
        return Entry(dtype, tuple(shape), payload_start + offsets[0], payload_start + offsets[1])

    def _check_layout(self, payload_start: int) -> None:
        """Tensors must fill the payload without holes and without overlaps, as the format has it."""
        order = sorted(self.entries, key=lambda name: (self.entries[name].start, self.entries[name].stop))
        if unknown := set(self.checksums) - set(order):
            raise ValueError(f"{self.path} is damaged: it has a checksum of {quote(min(unknown))} but no such tensor")
        if self.checksums and (bare := set(order) - set(self.checksums)):
            raise ValueError(f"{self.path} is damaged: it has no checksum of {quote(min(bare))}, as of the others")
        stops = [payload_start, *(self.entries[name].stop for name in order)]
        for stop, name in zip(stops, order, strict=False):
            if self.entries[name].start != stop:
                raise ValueError(
                    f"{self.path} is damaged: tensor {quote(name)} starts at byte {self.entries[name].start} "
                    f"where the one before it ends at {stop}"
                )
        if stops[-1] != self.size:
            raise ValueError(f"{self.path} is truncated or damaged: {self.size} bytes of {stops[-1]}")


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 8 and all(type(item) is int and item >= 0 for item in value)


def _scan(array: np.ndarray) -> tuple[int, bool]:
    """The CRC-32 of an array's bytes, and whether all its values are finite."""
    name = next(name for name, dtype in DTYPES.items() if dtype == array.dtype)
    exponent, checksum, finite = _EXPONENTS[name], 0, True
    for chunk in _chunks(array.reshape(-1)):
        checksum = zlib.crc32(chunk.view(np.uint8).data, checksum)
        bits = chunk.view(exponent.dtype)
        finite = finite and not np.any((bits & exponent) == exponent)
    return checksum, finite


def _chunks(flat: np.ndarray) -> Iterator[np.ndarray]:
    bounds = range(0, flat.size + _CHUNK_BYTES // flat.itemsize, _CHUNK_BYTES // flat.itemsize)
    return (flat[start:stop] for start, stop in pairwise(bounds))


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two arrays are equal in dtype, shape and every bit; a few megabytes are compared at a time."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    pairs = zip(_chunks(left.reshape(-1)), _chunks(right.reshape(-1)), strict=True)
    return all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in pairs)


@dataclass(frozen=True)
class Pending:
    """A tensor that is to be written, and is fetched only then."""

    name: str
    dtype: np.dtype
    """One of the values of `DTYPES`."""
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    """Fetches it, in any dtype."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, tensors: Sequence[Pending], done: Callable[[], None]) -> None:
    """Writes one file with checksums, down to the disk, with one tensor in memory at a time.

    Args:
      path: a file to make.
      tensors: what it is to hold; wider dtypes are put first, so that each tensor starts at a multiple of its width.
      done: called after each tensor.

    Raises:
      ValueError: an infinity or a NaN, or a value that the dtype turns into one.
      OSError: the file cannot be written.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    checksums = dict.fromkeys((tensor.name for tensor in ordered), 0)
    with open(path, "xb") as file:
        # checksums are of one length, so the header keeps its place when they are known
        file.write(_header(ordered, checksums))
        for tensor in ordered:
            # what overflows is refused in the next line, by name
            with np.errstate(over="ignore"):
                array = np.ascontiguousarray(tensor.read().astype(tensor.dtype, copy=False))
            checksums[tensor.name], finite = _scan(array)
            if not finite:
                raise ValueError(
                    f"{tensor.name} has an infinity, a NaN or a value beyond {tensor.dtype}; weights must be finite"
                )
            file.write(array.reshape(-1).view(np.uint8).data)
            done()
        file.seek(0)
        file.write(_header(ordered, checksums))
        file.flush()
        os.fsync(file.fileno())


def _header(tensors: Sequence[Pending], checksums: Mapping[str, int]) -> bytes:
    written = json.dumps({name: f"{value:08x}" for name, value in checksums.items()}, separators=(",", ":"))
    # PyTorch's loaders ask for "format"
    fields: dict[str, Any] = {"__metadata__": {"format": "pt", CHECKSUMS: written}}
    names = {dtype: name for name, dtype in DTYPES.items()}
    start = 0
    for tensor in tensors:
        offsets = [start, start + tensor.nbytes]
        fields[tensor.name] = {"dtype": names[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
        start = offsets[1]
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
