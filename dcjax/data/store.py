"""Prepared data sets: written by TFDS on first use, into a cache, and read back without TensorFlow."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcjax.data.datasets import Example, find_dataset
from dcjax.data.select import share_of
from dcjax.data.sources import checksum, find_files


def default_cache() -> Path:
    """$XDG_CACHE_HOME/dcjax, or ~/.cache/dcjax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dcjax"


def prepare(name: str, data_dir: Path, *, cache_dir: Path | None = None) -> Path:
    """Prepares a data set on first use, and returns its folder in the cache, named by a hash of its source files.

    Several processes may prepare the same one at the same time: the first one that finishes counts.

    Args:
      name: a name in `datasets`.
      data_dir: the directory of the local copy, as `dcjax.data.sources.instructions` describes it.
      cache_dir: the cache; None is `default_cache()`.

    Raises:
      FileNotFoundError: there is no local copy; the message says what to put where.
      ValueError: there is no such data set, there are several copies, or its files have another schema.
    """
    from dcjax.data.builders import VERSION

    files = find_files(find_dataset(name), data_dir)
    contents = hashlib.sha256("".join(map(checksum, files)).encode()).hexdigest()
    cache = cache_dir or default_cache()
    folder = cache / f"{name}-{VERSION}-{contents[:16]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        written = _write(name, data_dir, Path(scratch))
        try:
            written.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder


def _write(name: str, data_dir: Path, scratch: Path) -> Path:
    """Prepares into `scratch`; returns the folder of the files."""
    import tensorflow_datasets as tfds

    from dcjax.data.builders import Math

    tfds.disable_progress_bar()
    # TFDS announces downloads on standard output, where a command's results go, though it downloads nothing
    with contextlib.redirect_stdout(io.StringIO()):
        builder = Math(config=name, data_dir=scratch, file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=data_dir))
    return Path(os.fspath(builder.data_path))


def read_metadata(folder: Path) -> dict[str, Any]:
    """What `prepare` recorded: the `sha256` of each source file, and the `counts` of `read_examples`."""
    import tensorflow_datasets as tfds

    return dict(tfds.builder_from_directory(folder).info.metadata)


def load_examples(
    name: str, data_dir: Path, subset: str = "all", *, cache_dir: Path | None = None
) -> Sequence[Example]:
    """A data set's examples in the order of the published rows, each question once; prepared on first use.

    Args:
      name: as `prepare`.
      data_dir: as `prepare`.
      subset: "all", or a share such as "25%" (see `share_of`).
      cache_dir: as `prepare`.

    Raises:
      FileNotFoundError, ValueError: as `prepare`, or `subset` is neither.
    """
    import tensorflow_datasets as tfds

    folder = prepare(name, data_dir, cache_dir=cache_dir)
    # pyrefly: ignore[bad-argument-type]  (it takes the decorated method for a function)
    source: Any = tfds.builder_from_directory(folder).as_data_source(find_dataset(name).split)
    rows = source.__getitems__(range(len(source)))
    examples = [Example(**{field: text.decode() for field, text in row.items()}, dataset=name) for row in rows]
    return share_of(examples, subset)
