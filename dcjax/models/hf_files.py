"""The files of a Hugging Face checkpoint: strict JSON, and safetensors with a checksum of each tensor in the metadata.

The `safetensors` library reads and writes headers, slices and tensors; the checksums are dcjax's own addition.
"""

from __future__ import annotations

import json
import os
import reprlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
}
"""The dtypes that weights may be stored in, by the names that safetensors uses."""

CHECKSUMS = "dcjax.crc32"
"""The metadata key of the checksums: a JSON object from names to CRC-32s, eight hexadecimal digits."""

_quoting = reprlib.Repr()
_quoting.maxstring, _quoting.maxother, _quoting.maxlong = 100, 60, 30


def quote(value: object) -> str:
    """`value` as one line of at most about 100 characters, whatever it contains."""
    return " ".join(_quoting.repr(value).split())


def read_json_object(path: Path, most_bytes: int) -> dict[str, Any]:
    """A file's JSON object, as `parse_json_object` reads it.

    Raises:
      ValueError: it is not a JSON object, or it is longer than `most_bytes`.
      OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        text = file.read(most_bytes + 1)
    if len(text) > most_bytes:
        raise ValueError(f"{path} is longer than {most_bytes} bytes; a file of this kind must be shorter")
    return parse_json_object(text, str(path))


def parse_json_object(text: bytes | str, where: str) -> dict[str, Any]:
    """A JSON object, strictly: UTF-8, no name twice, no NaN.

    Raises:
      ValueError: the text is anything else, nests too deeply to parse, or has integers of thousands of digits.
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
class StoredTensor:
    """One tensor of a safetensors file, of which only the header is read."""

    path: Path
    """The path of the file."""
    name: str
    kind: str
    """The dtype by the name that safetensors uses."""
    shape: tuple[int, ...]
    checksum: str | None
    """The CRC-32 as 8 hexadecimal digits; None if the file carries no checksums."""
    part: Any
    """A view of the file: indexing it reads that part of the tensor and nothing else."""

    @property
    def dtype(self) -> np.dtype:
        """The dtype of its values.

        Raises:
          ValueError: it is not in `DTYPES`.
        """
        if self.kind not in DTYPES:
            raise ValueError(f"{self.path}: {self.name} is stored as {self.kind}; supported are {', '.join(DTYPES)}")
        return DTYPES[self.kind]

    def read(self) -> np.ndarray:
        """The whole tensor, verified.

        Raises:
          ValueError: its dtype is not supported, it does not match its checksum, or it has an infinity or a NaN.
        """
        # checked first, because the library treats each of the other dtypes in its own way
        dtype = self.dtype
        array = np.asarray(self.part[:], dtype)
        if self.checksum is not None and (found := checksum(array)) != self.checksum:
            raise ValueError(
                f"{self.path}: {self.name} is damaged, its checksum is {found} and was {quote(self.checksum)} "
                "when written; copy or export the file again"
            )
        if not np.isfinite(array).all():
            raise ValueError(f"{self.path}: {self.name} has an infinity or a NaN; weights must be finite")
        return array


def checksum(array: np.ndarray) -> str:
    """The CRC-32 of a contiguous array's bytes."""
    return f"{zlib.crc32(array.view(np.uint8).data):08x}"


def open_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, its header read and checked, its payload mapped and not read.

    Raises:
      ValueError: the header is damaged, the payload is not exactly as long as the header says, or the checksums are of
        other tensors.
      OSError: the file cannot be read.
    """
    # this raises the true error: the library reports any file that it cannot open as missing
    open(path, "rb").close()
    try:
        file = safe_open(path, "np")
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise ValueError(f"{path} is truncated, damaged or no safetensors file: {quote(reason)[1:-1]}") from None
    written = parse_json_object(metadata.get(CHECKSUMS, "{}"), f"{path}: its {CHECKSUMS}")
    if written and (others := written.keys() ^ parts.keys()):
        raise ValueError(
            f"{path} is damaged: {CHECKSUMS} must name the file's tensors, and {quote(min(others))} is only in one"
        )
    return {
        name: StoredTensor(
            path, name, part.get_dtype(), tuple(part.get_shape()), str(written[name]) if written else None, part
        )
        for name, part in parts.items()
    }


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one safetensors file with checksums, and syncs it to disk; equal tensors always give equal bytes.

    Args:
      path: the file to write.
      tensors: contiguous, of dtypes in `DTYPES`; their names are ASCII.

    Raises:
      OSError: the file cannot be written.
    """
    checksums = {name: checksum(tensors[name]) for name in sorted(tensors)}
    # PyTorch's loaders ask for "format"
    metadata = {CHECKSUMS: json.dumps(checksums, separators=(",", ":")), "format": "pt"}
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {quote(str(error))[1:-1]}") from None
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        # the library writes metadata in random order (its issue 584), so two files of the same weights would differ
        header = json.loads(file.read(length)) | {"__metadata__": metadata}
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":")).encode().ljust(length))
        file.flush()
        os.fsync(file.fileno())
