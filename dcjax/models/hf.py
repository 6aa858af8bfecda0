"""Hugging Face checkpoints, checked and loaded into the tree of `init_params`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from dcjax.models.config import DTYPES, DtypeName, ModelConfig
from dcjax.models.hf_config import read_config
from dcjax.models.hf_names import Leaf, leaves
from dcjax.models.safetensors import TensorFile, parse_json_object, quote, same_bits
from dcjax.models.transformer import logical_axes
from dcjax.sharding.rules import shardings
from dcjax.types import Params

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_PARAMETERS = 10**13
MAX_INDEX_BYTES = 100_000_000


class Checkpoint:
    """A Hugging Face folder whose config and headers are read and agree; weights are read when asked for.

    Attributes:
      config: the architecture.
      leaves: of the architecture, as `leaves` lists them.
      files: the safetensors files.

    Raises:
      ValueError, FileNotFoundError: as `load_hf`, save what only shows in the weights themselves.
    """

    def __init__(self, path: Path):
        self.config = read_config(path)
        self.leaves = leaves(self.config)
        self._path = path
        if (count := sum(math.prod(leaf.shape) for leaf in self.leaves)) > MAX_PARAMETERS:
            raise ValueError(f"{path / 'config.json'} describes {count} parameters; at most {MAX_PARAMETERS} are read")
        self.files, self._file_of = _open_files(path)
        self._check_tensors()

    @property
    def entries(self):
        """The header's entry of each tensor, `Entry` by name; buffers that are no weights are left out."""
        return {name: file.entries[name] for name, file in self._file_of.items()}

    def tensor(self, name: str) -> np.ndarray:
        """A view of one tensor in its mapped file, as it is stored."""
        return self._file_of[name].tensor(name)

    def verify(self, name: str) -> None:
        """Reads a tensor through: its checksum if the file has one, and that all values are finite.

        Raises:
          ValueError: they are not, or it is damaged.
        """
        self._file_of[name].verify(name)

    def verify_tied_head(self) -> None:
        """Of a checkpoint with tied embeddings that stores a head as well, that it is the embedding.

        Raises:
          ValueError: it is not.
        """
        if self.config.tie_embeddings and "lm_head.weight" in self._file_of:
            self.verify("lm_head.weight")
            if not same_bits(self.tensor("lm_head.weight"), self.tensor("model.embed_tokens.weight")):
                raise ValueError(
                    f"{self._path}: lm_head.weight is not model.embed_tokens.weight bit for bit, "
                    "though tie_word_embeddings is true; one of the two is wrong"
                )

    def dtype(self, leaf: Leaf) -> np.dtype:
        """In what a leaf is stored.

        Raises:
          ValueError: an unsupported dtype, or tensors of several.
        """
        first = leaf.name((0,) * len(leaf.stack))
        dtype = self.tensor(first).dtype
        for name in map(leaf.name, leaf.indices()):
            if self.tensor(name).dtype != dtype:
                raise ValueError(
                    f"{self._path}: {first} is stored as {dtype} and {name} as {self.tensor(name).dtype}; "
                    "layers are stacked, so give a dtype to convert to"
                )
        return dtype

    def read(self, leaf: Leaf, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """The part of a leaf that `index` selects; other layers, experts, rows and columns are not read.

        Raises:
          ValueError: a value beyond the range of `dtype`.
        """
        spans = [range(*part.indices(size)) for part, size in zip(index, leaf.shape, strict=True)]
        depth = len(leaf.stack)
        array = np.empty([len(span) for span in spans], dtype)
        for places in itertools.product(*map(enumerate, spans[:depth])):
            name = leaf.name(tuple(place for _, place in places))
            stored = self.tensor(name)
            part = (stored.T if leaf.transposed else stored)[tuple(index[depth:])]
            target = tuple(position for position, _ in places)
            # what overflows is refused in the next line, by name
            with np.errstate(over="ignore"):
                array[target] = part
            if stored.dtype != dtype and not np.isfinite(array[target]).all():
                raise ValueError(f"{self._path}: {name} has values beyond the range of {dtype}")
        return array

    def _check_tensors(self) -> None:
        """That the files hold the tensors of the architecture, and no others, in its shapes."""
        leaf_of = {leaf.name(index): leaf for leaf in self.leaves for index in leaf.indices()}
        allowed = {"lm_head.weight"} if self.config.tie_embeddings else set()
        faults = {
            "missing": [name for name in leaf_of if name not in self._file_of],
            "unexpected": sorted(self._file_of.keys() - leaf_of.keys() - allowed),
        }
        if told := [f"{len(names)} {fault} ({_some(names)})" for fault, names in faults.items() if names]:
            raise ValueError(
                f"{self._path}: of the {len(leaf_of)} tensors that config.json describes: {', '.join(told)}"
            )
        for name, leaf in leaf_of.items():
            if (found := self._file_of[name].entries[name].shape) != leaf.stored_shape:
                raise ValueError(
                    f"{self._path}: {name} has shape {quote(list(found))}; "
                    f"by config.json it must be {list(leaf.stored_shape)}"
                )


def _some(names: Sequence[str]) -> str:
    return ", ".join(quote(name)[1:-1] for name in names[:3]) + (", ..." if len(names) > 3 else "")


def _open_files(path: Path) -> tuple[list[TensorFile], dict[str, TensorFile]]:
    """A folder's safetensors files, and in which of them each tensor is."""
    if (path / WEIGHTS).exists():
        placed, names = None, [WEIGHTS]
    elif (path / INDEX).exists():
        placed = _read_index(path / INDEX)
        names = sorted(set(placed.values()))
    else:
        raise _no_weights(path)
    files, file_of = [], {}
    for name in names:
        if not (path / name).is_file():
            raise FileNotFoundError(f"no {path / name}, which {INDEX} names; the download is not complete")
        files.append(TensorFile(path / name))
        for tensor in files[-1].entries:
            if tensor in file_of:
                raise ValueError(f"{path}: {quote(tensor)} is in {file_of[tensor].path.name} and again in {name}")
            file_of[tensor] = files[-1]
    _check_index(path, placed, file_of)
    # a buffer that old versions saved; it follows from rope_theta
    return files, {name: file for name, file in file_of.items() if not name.endswith("rotary_emb.inv_freq")}


def _read_index(path: Path) -> dict[str, str]:
    """Of each tensor, the name of the file that the index says it is in: files beside the index only."""
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise ValueError(f"{path} is longer than {MAX_INDEX_BYTES} bytes, which no index is")
    placed = parse_json_object(path.read_bytes(), str(path)).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ValueError(f"{path} is damaged: its weight_map is {quote(placed)}, not an object of file names")
    for name in placed.values():
        plain = isinstance(name, str) and name.endswith(".safetensors") and not set("/\\\0") & set(name)
        if not plain or len(name) > 200:
            raise ValueError(f"{path} names the file {quote(name)}; it must be a safetensors file in the same folder")
    return placed


def _check_index(path: Path, placed: dict[str, str] | None, file_of: dict[str, TensorFile]) -> None:
    if placed is None:
        return
    for name in {**placed, **file_of}:
        said, found = placed.get(name), file_of[name].path.name if name in file_of else None
        if said != found:
            raise ValueError(
                f"{path / INDEX} places {quote(name)} in {said or 'no file'}; it is in {found or 'none of them'}"
            )


def _no_weights(path: Path) -> Exception:
    pickles = sorted(file.name for ending in ("*.bin", "*.pt", "*.pth") for file in path.glob(ending))
    if pickles:
        return ValueError(
            f"{path} has its weights only as pickles ({_some(pickles)}), which may run code when read; "
            "convert them to safetensors first"
        )
    return FileNotFoundError(f"no {WEIGHTS} or {INDEX} in {path}")


def load_hf(
    path: Path | str, *, dtype: DtypeName | None = None, mesh: Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """A Hugging Face folder's architecture and weights, in the tree of `init_params`.

    Weights come from model.safetensors, or from the files that model.safetensors.index.json names. Each tensor is
    read through once to see that it is finite and, where the file carries dcjax's checksums, undamaged; then each
    device's part is read and placed, one leaf at a time, so that the host holds one leaf beside the params.

    Args:
      path: the folder; files in it may be links, as in Hugging Face's cache.
      dtype: of all params; None keeps each leaf's stored dtype (float32, bf16 or fp16).
      mesh: places each leaf by `sharding.rules`; None is JAX's default device.

    Raises:
      ValueError: an architecture that is not supported, or a checkpoint that is damaged, incomplete, infinite
        anywhere, of pickles, or not of its config's tensors, shapes and dtypes. One line, which names the tensor.
      FileNotFoundError: what was looked for and is not there.
    """
    checkpoint = Checkpoint(Path(path))
    places = _places(checkpoint, mesh)
    dtypes = {leaf: DTYPES[dtype] if dtype else checkpoint.dtype(leaf) for leaf in checkpoint.leaves}
    checkpoint.verify_tied_head()
    params: dict[str, Any] = {}
    for leaf in checkpoint.leaves:
        for name in map(leaf.name, leaf.indices()):
            checkpoint.verify(name)
        parent = params if len(leaf.path) == 1 else params.setdefault(leaf.path[0], {})
        parent[leaf.path[-1]] = _place(checkpoint, leaf, dtypes[leaf], places[leaf.path])
    return checkpoint.config, params


def _places(checkpoint: Checkpoint, mesh: Mesh | None) -> dict[tuple[str, ...], Sharding]:
    if mesh is None:
        alone = jnp.zeros(()).sharding
        return {leaf.path: alone for leaf in checkpoint.leaves}
    placed = shardings(mesh, logical_axes(checkpoint.config))
    return {leaf.path: at_path(placed, leaf.path) for leaf in checkpoint.leaves}


def at_path(tree: Any, path: tuple[str, ...]) -> Any:
    """The leaf of a tree of dicts at a path of keys."""
    for key in path:
        tree = tree[key]
    return tree


def _place(checkpoint: Checkpoint, leaf: Leaf, dtype: np.dtype, place: Sharding) -> jax.Array:
    parts: dict[tuple, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        # devices that hold the same part share one copy on the host
        key = tuple((each.start, each.stop) for each in index)
        if key not in parts:
            parts[key] = checkpoint.read(leaf, index, dtype)
        return parts[key]

    array = jax.make_array_from_callback(leaf.shape, place, part, dtype=dtype)
    # transfers run in the background and hold the host's copies: without this, leaves pile up
    return array.block_until_ready()
