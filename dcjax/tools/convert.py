"""Checkpoints between Hugging Face's layout and dcjax's runs, and from GGUF files: import, export, inspect."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dcjax.errors import RunError
from dcjax.models.config import DTYPES, DtypeName, ModelConfig
from dcjax.models.hf import Checkpoint
from dcjax.models.hf_config import read_end_tokens
from dcjax.models.hf_save import Pending, Told, check_vacant, save_hf, write_folder
from dcjax.models.parameters import active_params, count_params
from dcjax.paths import local_path
from dcjax.reporting.record import check_writable
from dcjax.serving.server.contract import CONTRACT_FILE
from dcjax.tools.gguf.config import read_config
from dcjax.tools.gguf.container import is_gguf, open_container
from dcjax.tools.gguf.tensors import pending_tensors
from dcjax.tools.gguf.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from dcjax.tools.open_model import OpenedModel


@dataclass(frozen=True)
class Inspection:
    """What a Hugging Face folder or a GGUF file holds, by its config.json or metadata and the headers of its files."""

    config: ModelConfig
    parameters: int
    """All parameters, a tied head counted once."""
    active_parameters: int
    """Those that one token passes through: of a layer's experts only num_experts_per_tok."""
    dtypes: dict[str, int]
    """How many tensors are stored in each dtype, by safetensors' names or llama.cpp's."""
    files: int
    bytes: int
    """The size of the files with the weights."""
    checksums: bool
    """Whether every tensor has dcjax's checksum."""


def import_model(source: Path, out: Path, *, dtype: DtypeName | None = None, told: Told | None = None) -> None:
    """Verifies a Hugging Face folder, or dequantises a GGUF file, and writes a checksummed folder.

    The folder has config.json in both styles, and says which ids end a response: of a folder these are verified and
    written as they are. The tensors of one file of the new folder are in memory at a time; no accelerator is touched.

    Args:
      source: a folder, as `load_hf` reads it, or a GGUF file.
      out: a folder to make.
      dtype: to convert to. None keeps what is stored; of a GGUF file, see `pending_tensors`.
      told: called after each tensor.

    Raises:
      RunError: what `load_hf`, `read_end_tokens` and `save_hf` refuse, or `open_container`, `read_config`,
        `pending_tensors` and `read_tokenizer` of `dcjax.tools.gguf`.
    """
    with _value_errors_as_run_errors():
        check_writable(check_vacant(out).parent)
        (_import_gguf if is_gguf(source) else _import_folder)(local_path(source), out, dtype, told)


def _import_folder(source: Path, out: Path, dtype: DtypeName | None, told: Told | None) -> None:
    checkpoint = Checkpoint(source)
    checkpoint.verify_tied_head()
    read_end_tokens(source)
    pending = []
    for parameter in checkpoint.parameters:
        as_dtype = DTYPES[dtype] if dtype else checkpoint.dtype(parameter)
        pending += [
            Pending(name, as_dtype, parameter.tensor_shape, checkpoint.tensors[name].read)
            for name in parameter.tensor_names()
        ]
    write_folder(out, checkpoint.config, pending, source, told=told)


def _import_gguf(source: Path, out: Path, dtype: DtypeName | None, told: Told | None) -> None:
    container = open_container(source)
    config = read_config(container)
    pending = pending_tensors(container, config, dtype)
    tokenizer = read_tokenizer(container, config.vocab_size)
    write_folder(out, config, pending, None, token_ids=tokenizer.token_ids, further_files=tokenizer.files, told=told)


def export_run(
    source: Path,
    out: Path,
    *,
    dtype: DtypeName | None = None,
    averaged: bool = False,
    recipe_code: bool = True,
    told: Told | None = None,
) -> int:
    """Writes a run's policy as a Hugging Face folder, with the run's tokenizer and the contract it is served under.

    Args:
      source: a run directory, for its newest checkpoint, or RUN/checkpoints/STEP.
      out: a folder to make.
      dtype: of the weights; None is as trained.
      averaged: the moving average of the weights in place of the last ones.
      recipe_code: whether code of the run's own may be executed where its sections are not all of dcjax.
      told: called after each tensor.

    Returns:
      The checkpoint's step.

    Raises:
      RunError: no such run or checkpoint, a damaged one, one without an average that was asked for, or what `save_hf`
        refuses.
    """
    # These take seconds to import, with JetStream, which an import and an inspection need not wait for.
    from dcjax.tools.open_model import open_model, require_run

    with _value_errors_as_run_errors():
        check_writable(check_vacant(out).parent)
        require_run(source, "dcjax convert import reads it")
        model = open_model(source, recipe_code=recipe_code)
        save_hf(
            out,
            model.config.model,
            model.average() if averaged else model.params(),
            dtype=dtype,
            tokenizer_from=model.directory / "tokenizer",
            token_ids=_token_ids(model),
            further_files={CONTRACT_FILE: model.contract().to_json()},
            told=told,
        )
    return model.version


def _token_ids(model: OpenedModel) -> dict[str, int | list[int]]:
    """The ids that a folder's configs name: all that end a response, and those of the tokenizer's other kinds."""
    kinds = ("bos_token_id", "eos_token_id", "pad_token_id")
    named: dict[str, int | list[int]] = {
        kind: number for kind in kinds if (number := getattr(model.tokenizer, kind)) is not None
    }
    ends = model.end_tokens
    return named | {"eos_token_id": ends if len(ends) > 1 else ends[0]}


def inspect_model(source: Path) -> Inspection:
    """What a Hugging Face folder or a GGUF file holds; only config.json and the files' headers are read.

    Raises:
      RunError: what `import_model` refuses of them.
    """
    with _value_errors_as_run_errors():
        return (_inspect_gguf if is_gguf(source) else _inspect_folder)(local_path(source))


def _inspect_folder(source: Path) -> Inspection:
    checkpoint = Checkpoint(source)
    tensors = checkpoint.tensors.values()
    files = {tensor.path for tensor in tensors}
    return Inspection(
        config=checkpoint.config,
        parameters=count_params(checkpoint.config),
        active_parameters=active_params(checkpoint.config),
        dtypes=dict(Counter(tensor.kind for tensor in tensors)),
        files=len(files),
        bytes=sum(file.stat().st_size for file in files),
        checksums=all(tensor.checksum is not None for tensor in tensors),
    )


def _inspect_gguf(source: Path) -> Inspection:
    container = open_container(source)
    config = read_config(container)
    return Inspection(
        config=config,
        parameters=count_params(config),
        active_parameters=active_params(config),
        dtypes=dict(Counter(tensor.kind.name for tensor in container.tensors.values())),
        files=1,
        bytes=source.stat().st_size,
        checksums=False,
    )


@contextlib.contextmanager
def _value_errors_as_run_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise RunError(str(error)) from error
