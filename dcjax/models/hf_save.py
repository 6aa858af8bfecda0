"""Writes params as a Hugging Face checkpoint."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dcjax.models.config import DTYPES, DtypeName, ModelConfig
from dcjax.models.hf import INDEX, WEIGHTS
from dcjax.models.hf_config import GENERATION_CONFIG, MAX_CONFIG_BYTES, read_fields, to_fields
from dcjax.models.hf_files import read_json_object, save_tensors
from dcjax.models.parameters import parameters
from dcjax.paths import local_path
from dcjax.types import Params

MAX_SHARD_BYTES = 5_000_000_000
"""Largest payload of one file (bytes); a tensor that is larger has a file of its own."""

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    # how a policy that dcjax has trained is served
    "dcjax.json",
    GENERATION_CONFIG,
)
"""The files that `save_hf` copies from `tokenizer_from`, if they exist."""

MORE_TEMPLATES = "additional_chat_templates"
"""The folder of chat templates that have names, which is copied too."""

MAX_TOKENIZER_CONFIG_BYTES = 1 << 26
"""Largest tokenizer_config.json that is read; some list thousands of tokens."""

Told = Callable[[int, int], None]
"""A progress callback: it is called after each tensor with the number done and the total."""


@dataclass(frozen=True)
class Pending:
    """A tensor to be written, which is fetched only then."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    """Fetches the tensor, in any dtype."""

    @property
    def nbytes(self) -> int:
        """Number of bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def fetch(self) -> np.ndarray:
        """The tensor as it is to be written.

        Raises:
          ValueError: it has an infinity, a NaN, or a value beyond the range of `dtype`.
        """
        # an overflow is reported below, with the tensor's name
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(self.read().astype(self.dtype, copy=False))
        if not np.isfinite(array).all():
            raise ValueError(
                f"{self.name} has an infinity, a NaN or a value beyond {self.dtype}; weights must be finite"
            )
        return array


def save_hf(
    path: Path | str,
    config: ModelConfig,
    params: Params,
    *,
    dtype: DtypeName | None = None,
    tokenizer_from: Path | str | None = None,
    token_ids: Mapping[str, int | list[int]] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    further_files: Mapping[str, str] | None = None,
    told: Told | None = None,
) -> None:
    """Writes params as a Hugging Face folder that `transformers`, vLLM and `load_hf` read.

    The folder holds config.json in both styles, safetensors files with a CRC-32 of each tensor in their metadata, an
    index if there are several files, and the tokenizer, as transformers 4 and 5 read it. It appears only once it is
    complete: a crash leaves at most a hidden `.NAME.*.partial` beside it. One tensor is fetched from the devices at a
    time, and the host holds those of one file.

    Args:
      path: the folder to make; it may exist if it is empty.
      config: the architecture.
      params: as `init_params` lays them out, on one device or sharded; this process must be able to address all of it.
      dtype: the dtype of the weights; None keeps each array's.
      tokenizer_from: a folder whose tokenizer files and generation_config.json are copied, and whose config.json
        gives the token ids and any fields unknown to dcjax.
      token_ids: bos_token_id, eos_token_id (one or a list), pad_token_id for config.json and generation_config.json,
        in place of those of `tokenizer_from`.
      max_shard_bytes: largest payload of one file (bytes).
      further_files: texts to write beside them, by the files' names.
      told: progress callback, called after each tensor with the number done and the total.

    Raises:
      ValueError: the params do not have the architecture's arrays, are not finite, or are beyond the range of `dtype`;
        or the path is not local.
      FileExistsError: the folder is not empty.
      FileNotFoundError: `tokenizer_from` does not exist.
    """
    arrays = _checked(config, params)
    pending = []
    for parameter in parameters(config):
        array = arrays[parameter.path]
        as_dtype = DTYPES[dtype] if dtype else np.dtype(array.dtype)
        pending += [
            Pending(name, as_dtype, parameter.tensor_shape, partial(_fetch, array, index, parameter.transposed))
            for name, index in zip(parameter.tensor_names(), parameter.indices(), strict=True)
        ]
    write_folder(
        path,
        config,
        pending,
        tokenizer_from,
        token_ids=token_ids,
        max_shard_bytes=max_shard_bytes,
        further_files=further_files,
        told=told,
    )


def _checked(config: ModelConfig, params: Params) -> dict[tuple[str, ...], Any]:
    """The arrays of params by their paths, after checking that they are those of the architecture."""
    arrays = {
        tuple(getattr(key, "key", str(key)) for key in keys): array
        for keys, array in jax.tree_util.tree_leaves_with_path(params)
    }
    shapes = {parameter.path: parameter.stacked_shape for parameter in parameters(config)}
    for path in sorted(shapes.keys() | arrays.keys()):
        found, wanted = _described(arrays[path].shape if path in arrays else None), _described(shapes.get(path))
        if found != wanted:
            raise ValueError(f"params {'.'.join(path)} is {found}; by the config it must be {wanted}")
        if arrays[path].dtype not in DTYPES.values():
            raise ValueError(f"params {'.'.join(path)} is {arrays[path].dtype}; supported are {', '.join(DTYPES)}")
    return arrays


def _described(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {shape}"


@jax.jit
def _one_of_stack(array: jax.Array, index: jax.Array) -> jax.Array:
    for position in range(index.shape[0]):
        array = jax.lax.dynamic_index_in_dim(array, index[position], keepdims=False)
    return array


def _fetch(array: Any, index: tuple[int, ...], transposed: bool) -> np.ndarray:
    """One tensor of a stacked array, on the host and in Hugging Face's layout."""
    on_host = isinstance(array, np.ndarray)
    # jitted with the index as data: one compilation serves all layers, and a sharded stack is never gathered whole
    part = array[index] if on_host else np.asarray(_one_of_stack(array, np.array(index, np.int32)))
    return part.T if transposed else part


def write_folder(
    path: Path | str,
    config: ModelConfig,
    pending: Sequence[Pending],
    tokenizer_from: Path | str | None,
    *,
    token_ids: Mapping[str, int | list[int]] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    further_files: Mapping[str, str] | None = None,
    told: Told | None = None,
) -> None:
    """Writes a Hugging Face folder; each tensor is fetched when its file is written. See `save_hf`."""
    path = check_vacant(path)
    source = Path() if tokenizer_from is None else local_path(tokenizer_from)
    carried, copied = ({}, []) if tokenizer_from is None else _carried(source)
    name = max(DTYPES, key=lambda name: sum(tensor.nbytes for tensor in pending if tensor.dtype == DTYPES[name]))
    fields = to_fields(config, name, carried) | dict(token_ids or {})
    with _appearing_whole(path) as partial_path:
        for file in copied:
            _copy(file, partial_path / file.relative_to(source))
        _write_json(partial_path / "config.json", fields)
        if token_ids:
            # transformers reads a model's end tokens from this file, and from config.json only if it does not exist
            generation = partial_path / GENERATION_CONFIG
            carried = read_json_object(generation, MAX_CONFIG_BYTES) if generation.exists() else {}
            _write_json(generation, carried | dict(token_ids))
        for file_name, text in (further_files or {}).items():
            (partial_path / file_name).write_text(text, encoding="utf-8")
        _write_shards(partial_path, _shards(pending, max_shard_bytes), told)


def check_vacant(path: Path | str) -> Path:
    """Checks that a folder may be written at a path, and returns it as a local path.

    Raises:
      ValueError: as `local_path`.
      FileExistsError: there is a file, or a folder that is not empty.
    """
    path = local_path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder; choose another, nothing is overwritten")
    return path


def _carried(source: Path) -> tuple[dict[str, Any], list[Path]]:
    """The fields of a folder's config.json, if it has one, and the files to copy from it."""
    if not source.is_dir():
        raise FileNotFoundError(f"no folder {source} to take a tokenizer from")
    fields = read_fields(source)[0] if (source / "config.json").exists() else {}
    named = [source / name for name in COPIED if (source / name).is_file()]
    return fields, named + sorted((source / MORE_TEMPLATES).glob("*.jinja"))


def _copy(file: Path, to: Path) -> None:
    to.parent.mkdir(exist_ok=True)
    shutil.copyfile(file, to)
    if file.name == "tokenizer_config.json":
        fields = read_json_object(file, MAX_TOKENIZER_CONFIG_BYTES)
        if (changed := _for_transformers_4(fields)) != fields:
            _write_json(to, changed)


def _for_transformers_4(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer's config as transformers 4 reads it, and 5 as well; 5 writes other names than 4 knows."""
    fields = dict(fields)
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    # of 4, extra_special_tokens are named ones, a dictionary
    if isinstance(fields.get("extra_special_tokens"), list):
        fields.setdefault("additional_special_tokens", fields.pop("extra_special_tokens"))
    return fields


@contextlib.contextmanager
def _appearing_whole(path: Path) -> Iterator[Path]:
    """Yields a hidden folder beside `path`, which is renamed to `path` at the end, or removed after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield hidden
        # mkdtemp makes folders for one user only, and safetensors makes its files so (its issue 782)
        mask = os.umask(0)
        os.umask(mask)
        hidden.chmod(0o777 & ~mask)
        for file in hidden.rglob("*"):
            file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)
        hidden.rename(path)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def _shards(pending: Sequence[Pending], max_bytes: int) -> list[list[Pending]]:
    shards: list[list[Pending]] = [[]]
    size = 0
    for tensor in pending:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_shards(folder: Path, shards: list[list[Pending]], told: Told | None) -> None:
    total, done = sum(map(len, shards)), 0
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, tensors in zip(names if len(shards) > 1 else [WEIGHTS], shards, strict=True):
        arrays = {}
        for tensor in tensors:
            arrays[tensor.name] = tensor.fetch()
            done += 1
            if told is not None:
                told(done, total)
        save_tensors(folder / name, arrays)
    if len(shards) > 1:
        placed = {tensor.name: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
        size = sum(tensor.nbytes for tensors in shards for tensor in tensors)
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        _write_json(folder / INDEX, index)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
