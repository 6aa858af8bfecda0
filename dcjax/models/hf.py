"""Hugging Face checkpoints, checked and loaded into the tree of `init_params`."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from dcjax.models.config import DTYPES, DtypeName, ModelConfig
from dcjax.models.hf_config import gguf_advice, read_config
from dcjax.models.hf_files import StoredTensor, open_tensors, quote, read_json_object
from dcjax.models.parameters import Parameter, count_params, parameter_tree, parameters
from dcjax.paths import local_path
from dcjax.sharding.rules import partition_spec
from dcjax.types import Params

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_PARAMETERS = 10**13
MAX_INDEX_BYTES = 100_000_000

_ONE_SET = "keep those that are meant and move the others out of the folder"


class Checkpoint:
    """A Hugging Face folder whose config and headers have been read and agree; weights are read on request.

    Attributes:
      config: the architecture.
      parameters: the arrays of the params tree.
      tensors: the tensors in its files, by name; buffers that are not weights are left out.

    Raises:
      ValueError, FileNotFoundError: as `load_hf`, except for faults in the weights themselves.
    """

    def __init__(self, path: Path):
        self.config = read_config(path)
        self.parameters = parameters(self.config)
        self._path = path
        if (count := count_params(self.config)) > MAX_PARAMETERS:
            raise ValueError(f"{path / 'config.json'} describes {count} parameters; at most {MAX_PARAMETERS} are read")
        self.tensors = _open_folder(path)
        self._check_tensors()

    def verify_tied_head(self) -> None:
        """Checks that a head stored beside tied embeddings is the embedding table, bit for bit.

        Raises:
          ValueError: it is not.
        """
        if self.config.tie_embeddings and "lm_head.weight" in self.tensors:
            head, table = (self.tensors[name].read() for name in ("lm_head.weight", "model.embed_tokens.weight"))
            if head.dtype != table.dtype or not np.array_equal(head.view(np.uint8), table.view(np.uint8)):
                raise ValueError(
                    f"{self._path}: lm_head.weight is not model.embed_tokens.weight bit for bit, "
                    "though tie_word_embeddings is true; one of the two is wrong"
                )

    def dtype(self, parameter: Parameter) -> np.dtype:
        """The dtype that a parameter is stored in.

        Raises:
          ValueError: the dtype is not supported, or the parameter's tensors have several.
        """
        first, *others = parameter.tensor_names()
        dtype = self.tensors[first].dtype
        for name in others:
            if self.tensors[name].dtype != dtype:
                raise ValueError(
                    f"{self._path}: {first} is stored as {dtype} and {name} as {self.tensors[name].dtype}; "
                    "layers are stacked, so give a dtype to convert to"
                )
        return dtype

    def read(self, parameter: Parameter, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """The part of a parameter that `index` selects; other layers, experts, rows and columns are not read.

        Raises:
          ValueError: a value is beyond the range of `dtype`.
        """
        spans = [range(*part.indices(size)) for part, size in zip(index, parameter.stacked_shape, strict=True)]
        depth = len(parameter.stack)
        array = np.empty([len(span) for span in spans], dtype)
        for places in itertools.product(*map(enumerate, spans[:depth])):
            name = parameter.tensor_name(tuple(place for _, place in places))
            matrix = tuple(index[depth:])
            part = self.tensors[name].part[matrix[::-1]].T if parameter.transposed else self.tensors[name].part[matrix]
            target = tuple(position for position, _ in places)
            # an overflow is reported below, with the tensor's name
            with np.errstate(over="ignore"):
                array[target] = part
            if part.dtype != dtype and not np.isfinite(array[target]).all():
                raise ValueError(f"{self._path}: {name} has values beyond the range of {dtype}")
        return array

    def _check_tensors(self) -> None:
        """Checks that the files hold the tensors of the architecture, in its shapes, and no others."""
        wanted = {name: parameter.tensor_shape for parameter in self.parameters for name in parameter.tensor_names()}
        allowed = {"lm_head.weight"} if self.config.tie_embeddings else set()
        found = {name: tensor.shape for name, tensor in self.tensors.items() if name not in allowed}
        check_tensors(self._path, "config.json", wanted, found)


def check_tensors(
    path: Path, described_by: str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Checks that a checkpoint holds the tensors that it should, in their shapes, and no others.

    Args:
      path: of the checkpoint.
      described_by: what says which tensors it should hold.
      wanted: their shapes by their names.
      found: the shapes of those that it holds.

    Raises:
      ValueError: it does not; the message is one line.
    """
    faults = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": sorted(found.keys() - wanted.keys()),
    }
    if listed := [f"{len(names)} {fault} ({_some(names)})" for fault, names in faults.items() if names]:
        raise ValueError(f"{path}: of the {len(wanted)} tensors that {described_by} describes: {', '.join(listed)}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ValueError(
                f"{path}: {name} has shape {quote(list(found[name]))}; by {described_by} it must be {list(shape)}"
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(quote(name)[1:-1] for name in names[:3]) + (", ..." if len(names) > 3 else "")


def _open_folder(path: Path) -> dict[str, StoredTensor]:
    """The tensors in a folder's safetensors files."""
    placed, names = _weight_files(path)
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        if not (path / name).is_file():
            raise FileNotFoundError(f"no {path / name}, which {INDEX} names; the download is not complete")
        opened = open_tensors(path / name)
        if twice := tensors.keys() & opened.keys():
            first = min(twice)
            raise ValueError(f"{path}: {quote(first)} is in {tensors[first].path.name} and again in {name}")
        tensors |= opened
    for name in {**placed, **tensors} if placed else ():
        indexed, found = placed.get(name), tensors[name].path.name if name in tensors else None
        if indexed != found:
            raise ValueError(
                f"{path / INDEX} places {quote(name)} in {indexed or 'no file'}; it is in {found or 'none of them'}"
            )
    # old versions of transformers saved this buffer, which follows from rope_theta
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def _weight_files(path: Path) -> tuple[dict[str, str], list[str]]:
    """Where a folder's index places each tensor, if it has an index, and the names of the files with the weights.

    Raises:
      ValueError: model.safetensors lies beside shards that are not of one index with it. Loaders differ in which they
        read: transformers the single file, vLLM the files that the index names.
      FileNotFoundError: there are no weights.
    """
    has_single = (path / WEIGHTS).is_file()
    if (path / INDEX).is_file():
        placed = _read_index(path / INDEX)
        names = sorted(set(placed.values()))
        if has_single and WEIGHTS not in names:
            raise ValueError(f"{path} has {WEIGHTS} beside {INDEX}, which names {_some(names)}; {_ONE_SET}")
        return placed, names
    if not has_single:
        raise _no_weights(path)
    if shards := sorted(file.name for file in path.glob("model-*-of-*.safetensors")):
        raise ValueError(f"{path} has {WEIGHTS} beside {_some(shards)}; {_ONE_SET}")
    return {}, [WEIGHTS]


def _read_index(path: Path) -> dict[str, str]:
    """The name of each tensor's file according to the index; only files in the same folder are allowed."""
    placed = read_json_object(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ValueError(f"{path} is damaged: its weight_map is {quote(placed)}, not an object of file names")
    for name in placed.values():
        plain = isinstance(name, str) and name.endswith(".safetensors") and not set("/\\\0") & set(name)
        if not plain or len(name) > 200:
            raise ValueError(f"{path} names the file {quote(name)}; it must be a safetensors file in the same folder")
    return placed


def _no_weights(path: Path) -> Exception:
    pickles = sorted(file.name for ending in ("*.bin", "*.pt", "*.pth") for file in path.glob(ending))
    if pickles:
        return ValueError(
            f"{path} has its weights only as pickles ({_some(pickles)}), which may run code when read; "
            "convert them to safetensors first"
        )
    if advice := gguf_advice(path):
        return ValueError(advice)
    return FileNotFoundError(f"no {WEIGHTS} or {INDEX} in {path}")


def load_hf(
    path: Path | str, *, dtype: DtypeName | None = None, mesh: Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """A Hugging Face folder's architecture and weights, in the tree of `init_params`.

    Weights come from model.safetensors, or from the files that model.safetensors.index.json names; a folder with both
    is refused, unless the index names the former. Files of other names are not read. Each tensor is read once in full
    to check that it is finite and, if the file carries dcjax's checksums, undamaged; then each device's part is read
    and placed, one array at a time: the host holds one array and one tensor beside the params. The returned config's
    `precision.parameters` is the params' dtype, or the narrowest that holds all of them.

    Args:
      path: the folder; files in it may be links, as in Hugging Face's cache.
      dtype: the dtype of all params; None keeps each array's stored dtype (float32, bf16 or fp16).
      mesh: the mesh on which each array is placed by `sharding.rules`; None is JAX's default device.

    Raises:
      ValueError: the architecture is not supported; the checkpoint is damaged, is not finite, has its weights only as
        pickles, or does not have the tensors, shapes and dtypes of its config; or the mesh does not divide an array.
        The message is one line, which names the tensor.
      FileNotFoundError: the config or the weights are missing; the message names the path.
    """
    checkpoint = Checkpoint(local_path(path))
    places = {parameter: _sharding(parameter, mesh) for parameter in checkpoint.parameters}
    dtypes = {each: DTYPES[dtype] if dtype else checkpoint.dtype(each) for each in checkpoint.parameters}
    checkpoint.verify_tied_head()

    def load(parameter: Parameter) -> jax.Array:
        for name in parameter.tensor_names():
            checkpoint.tensors[name].read()
        return _place(checkpoint, parameter, dtypes[parameter], places[parameter])

    config = _with_parameters_in(checkpoint.config, dtypes.values())
    return config, parameter_tree(checkpoint.config, load)


def _with_parameters_in(config: ModelConfig, dtypes: Iterable[np.dtype]) -> ModelConfig:
    """The config with the narrowest dtype of parameters that holds all of these dtypes."""
    widest = jnp.result_type(*dtypes)
    name = next(name for name, dtype in DTYPES.items() if dtype == widest)
    return dataclasses.replace(config, precision=dataclasses.replace(config.precision, parameters=name))


def _sharding(parameter: Parameter, mesh: Mesh | None) -> Sharding:
    if mesh is None:
        return jnp.zeros(()).sharding
    spec = partition_spec(PartitionSpec(*parameter.stacked_axes))
    for dimension, (size, axes) in enumerate(zip(parameter.stacked_shape, spec, strict=True)):
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        if size % (parts := math.prod(mesh.shape[name] for name in names)):
            raise ValueError(
                f"params {'.'.join(parameter.path)} of shape {parameter.stacked_shape}: "
                f"mesh.{' and mesh.'.join(names)} {parts} does not divide dimension {dimension}, which is {size}; "
                "choose one that does"
            )
    return NamedSharding(mesh, spec)


def _place(checkpoint: Checkpoint, parameter: Parameter, dtype: np.dtype, place: Sharding) -> jax.Array:
    parts: dict[tuple, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        # devices that hold the same part share one copy on the host
        key = tuple((each.start, each.stop) for each in index)
        if key not in parts:
            parts[key] = checkpoint.read(parameter, index, dtype)
        return parts[key]

    array = jax.make_array_from_callback(parameter.stacked_shape, place, part, dtype=dtype)
    # transfers run in the background and keep the host's copies alive: without waiting, arrays would pile up
    return array.block_until_ready()
