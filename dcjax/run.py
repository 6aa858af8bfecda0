"""A run's directory: whose it is, and that only one process writes to it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np

from dcjax.config import Config, differences, flatten, from_dict, to_dict
from dcjax.distributed import gather, is_main
from dcjax.errors import RunError
from dcjax.record import write_atomically

VERSIONED = (
    "dcjax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "google-jetstream",
    "transformers",
)


@contextlib.contextmanager
def open_run(config: Config) -> Iterator[Path]:
    """Makes or re-enters `config.directory`, and holds it against other runs meanwhile; process 0 does it for all.

    Raises:
      RunError: the directory belongs to another configuration, or to another process.
    """
    directory = config.directory
    if not is_main():
        yield directory
        return
    if (directory / "config.json").exists():
        _check_same(config, directory)
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another process is training in {directory}; choose another --run-dir") from None
        recorded = to_dict(config) | {"versions": _versions(), "platform": platform.platform()}
        write_atomically(directory / "config.json", json.dumps(recorded, indent=2).encode())
        yield directory


def check_processes_agree(config: Config) -> None:
    """That all processes run one config on the same versions; each tells what differs.

    Raises:
      RunError: they do not.
    """
    described = flatten(to_dict(config) | {"versions": _versions()})
    # how each finds the others may differ
    described = {name: value for name, value in described.items() if not name.startswith("distributed.")}
    ours, *others = _of_all_processes(described)
    for number, theirs in enumerate(others, start=1):
        changed = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        if changed:
            listed = ", ".join(f"{name} {ours.get(name)!r} and {theirs.get(name)!r}" for name in sorted(changed))
            raise RunError(
                f"processes 0 and {number} differ in {listed}; "
                "start the same command with the same versions on every host"
            )


def _of_all_processes(described: dict) -> list[dict]:
    """One JSON object of each process, in order."""
    written = np.frombuffer(json.dumps(described).encode(), np.uint8)
    lengths = gather(np.array([len(written)], np.int32))
    padded = gather(np.pad(written, (0, lengths.max() - len(written)))[None])
    return [json.loads(row[:length].tobytes()) for row, length in zip(padded, lengths, strict=True)]


def _versions() -> dict[str, str]:
    return {name: version(name) for name in VERSIONED} | {"python": platform.python_version()}


def load_config(directory: Path) -> Config:
    """The configuration that a run was started with.

    Raises:
      RunError: the directory holds no run, or a damaged config.json.
    """
    return _parse(directory, _read(directory))


def locate(source: Path) -> tuple[Path, int | None]:
    """The run directory of a source, and the step of RUN/checkpoints/STEP; None where the run itself is given."""
    source = source.resolve()
    if source.name.isdecimal() and source.parent.name == "checkpoints":
        return source.parent.parent, int(source.name)
    return source, None


def _read(directory: Path) -> dict:
    path = directory / "config.json"
    try:
        recorded = json.loads(path.read_text())
        return {name: value for name, value in recorded.items() if name not in ("versions", "platform")}
    except FileNotFoundError:
        raise RunError(
            f"no run in {directory}: it has no config.json; give a directory that dcjax train made"
        ) from None
    except (ValueError, AttributeError):
        raise RunError(f"{path} is damaged: it is not a JSON object") from None


def _parse(directory: Path, recorded: dict) -> Config:
    try:
        return from_dict(recorded)
    except (TypeError, ValueError) as error:
        raise RunError(f"{directory / 'config.json'} is of another version of dcjax: {error}") from None


def _check_same(config: Config, directory: Path) -> None:
    changed = differences(to_dict(config), _read(directory))
    if changed:
        listed = ", ".join(f"{name} {ours!r} (there {theirs!r})" for name, (ours, theirs) in sorted(changed.items()))
        raise RunError(f"{directory} holds a run of another config: {listed}; choose another --run-dir or remove it")
