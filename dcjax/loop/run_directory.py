"""A run's directory: whose it is, and that only one process writes to it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dcjax.errors import RunError
from dcjax.models.hf_config import end_tokens_in
from dcjax.recipe.config import Config
from dcjax.recipe.plain import differences, flatten, from_dict, to_dict
from dcjax.reporting.record import write_atomically
from dcjax.sharding.hosts import gather, is_main

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


BESIDE_CONFIG = ("versions", "platform", "data", "end_tokens")
"""What config.json holds beside the config."""


@contextlib.contextmanager
def open_run(config: Config, *, data: dict[str, str] | None = None, end_tokens: Sequence[int] = ()) -> Iterator[Path]:
    """Makes or re-enters `config.directory`, and holds it against other runs meanwhile; process 0 does it for all.

    Args:
      config: of the run.
      data: the `Problems.fingerprint` of what it trains on; None where nothing is read.
      end_tokens: ids that end a response; none where only the tokenizer's own does.

    Raises:
      RunError: the directory belongs to another configuration, to a run on other data, or to another process.
    """
    directory, data = config.directory, data or {}
    if not is_main():
        yield directory
        return
    if goes_on(config):
        _check_same_data(data, directory)
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another process is training in {directory}; choose another --run-dir") from None
        beside = {"versions": _versions(), "platform": platform.platform(), "data": data, "end_tokens": [*end_tokens]}
        write_atomically(directory / "config.json", json.dumps(to_dict(config) | beside, indent=2).encode())
        yield directory


def goes_on(config: Config) -> bool:
    """Whether `config.directory` holds the run already.

    Raises:
      RunError: it holds a run of another configuration.
    """
    if not (config.directory / "config.json").exists():
        return False
    _check_same(config, config.directory)
    return True


def check_processes_agree(config: Config) -> None:
    """That all processes run one config on the same versions; each tells what differs.

    Raises:
      RunError: they do not.
    """
    described = flatten(to_dict(config) | {"versions": _versions()})
    # how each finds the others may differ
    described = {name: value for name, value in described.items() if not name.startswith("distributed.")}
    _check_agree(described, "start the same command with the same versions on every host")


def check_data_agree(data: dict[str, str]) -> None:
    """That all processes have read the same files (`Problems.fingerprint`).

    Raises:
      RunError: they have not.
    """
    _check_agree(data, "give every host the same files in task.data_dir")


def check_end_tokens_agree(end_tokens: Sequence[int]) -> None:
    """That for all processes the same tokens end a response.

    Raises:
      RunError: they do not.
    """
    advice = "give every host the same config.json, generation_config.json and tokenizer with the weights"
    _check_agree({"end tokens": list(end_tokens)}, advice)


def _check_agree(described: dict[str, Any], advice: str) -> None:
    ours, *others = _of_all_processes(described)
    for number, theirs in enumerate(others, start=1):
        changed = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        if changed:
            listed = ", ".join(f"{name} {ours.get(name)!r} and {theirs.get(name)!r}" for name in sorted(changed))
            raise RunError(f"processes 0 and {number} differ in {listed}; {advice}")


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


def recorded_end_tokens(directory: Path, config: Config) -> list[int]:
    """The ids that were recorded as ends of a response when a run was started; none in older runs.

    Raises:
      RunError: as `load_config`, or what is recorded are no ids of the run's vocabulary.
    """
    recorded, where = _read_all(directory), str(directory / "config.json")
    try:
        return end_tokens_in(recorded, where, vocab_size=config.model.vocab_size, name="end_tokens")
    except ValueError as error:
        raise RunError(str(error)) from None


def locate(source: Path) -> tuple[Path, int | None]:
    """The run directory of a source, and the step of RUN/checkpoints/STEP; None where the run itself is given."""
    source = source.resolve()
    if source.name.isdecimal() and source.parent.name == "checkpoints":
        return source.parent.parent, int(source.name)
    return source, None


def _read(directory: Path) -> dict:
    """The config in config.json, with what is recorded beside it taken out."""
    return {name: value for name, value in _read_all(directory).items() if name not in BESIDE_CONFIG}


def _read_all(directory: Path) -> dict:
    path = directory / "config.json"
    try:
        return dict(json.loads(path.read_text()).items())
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


def _check_same_data(data: dict[str, str], directory: Path) -> None:
    recorded = _read_all(directory).get("data", {})
    changed = [name for name in data | recorded if data.get(name) != recorded.get(name)]
    if changed:
        listed = ", ".join(f"{name}: {data.get(name)}, there {recorded.get(name)}" for name in sorted(changed))
        raise RunError(
            f"{directory} holds a run on other data: {listed}; "
            "put the files that it began with back into task.data_dir, or choose another --run-dir"
        )
