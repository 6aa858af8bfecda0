"""A run's directory: whose it is, and that only one process writes to it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dcjax.data.problems import TEMPLATE
from dcjax.errors import RunError
from dcjax.loop.recipe_copy import COPY, changed_recipe, describe, kept_recipe
from dcjax.models.config import ModelConfig
from dcjax.models.hf_config import end_tokens_in, gguf_advice
from dcjax.recipe.config import Config
from dcjax.recipe.plain import classes_in, differences, flatten, from_dict, path_fields, to_dict
from dcjax.reporting.record import trial_file, write_atomically
from dcjax.sharding.hosts import is_main, of_all_processes, total
from dcjax.user_code import CodeFile, failure

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

FORMERLY = {"int8": "w8a8", "int8_weight_only": "int8_channel"}
"""What serving formats are called that were called otherwise in runs of an earlier version."""

BESIDE_CONFIG = ("versions", "platform", "data", "end_tokens", "recipe", "directory", "started")
"""What config.json holds beside the config."""


@contextlib.contextmanager
def open_run(
    config: Config,
    *,
    data: dict[str, str] | None = None,
    end_tokens: Sequence[int] = (),
    recipe: CodeFile | None = None,
    started: datetime | None = None,
) -> Iterator[Path]:
    """Makes or re-enters `config.directory`, and holds it against other runs meanwhile; process 0 does it for all.

    Args:
      config: of the run.
      data: the `Problems.fingerprint` of what it trains on; None where nothing is read.
      end_tokens: ids that end a response; none where only the tokenizer's own does.
      recipe: the file that the run keeps a copy of; None for a run without one.
      started: as `start_of` gives it; None is now.

    Raises:
      RunError: the directory belongs to another configuration or recipe, to a run on other data, or to another process,
        or it is on a file system without locks.
    """
    directory, data = config.directory, data or {}
    if not is_main():
        yield directory
        return
    began = {"recipe": describe(recipe), "directory": str(Path.cwd()), "started": _now(started)}
    if resumes := goes_on(config):
        _check_same_data(data, directory)
        _check_same_recipe(recipe, directory)
        began = {name: _read_all(directory).get(name) for name in began}
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another process is training in {directory}; choose another --run-dir") from None
        except OSError as error:
            raise RunError(
                f"{directory} cannot be locked: {error.strerror}; "
                "a run directory must be on a file system that has locks (docs/launching.md names some)"
            ) from None
        if recipe is not None and not resumes:
            write_atomically(directory / COPY, recipe.source)
        beside = {"versions": _versions(), "platform": platform.platform(), "data": data, "end_tokens": [*end_tokens]}
        described = to_dict(config) | beside | began
        write_atomically(directory / "config.json", json.dumps(described, indent=2).encode())
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


def start_of(config: Config) -> datetime:
    """When the run was started first, which is now unless it is resumed: local time, of process 0, to the second.

    Raises:
      RunError: `config.directory` holds a run of another config, or what is recorded there is no time.
    """
    recorded = recorded_start(config.directory) if goes_on(config) else None
    return datetime.fromisoformat(of_all_processes({"started": _now(recorded)})[0]["started"])


def recorded_start(directory: Path) -> datetime:
    """When the run in a directory was started first; of a run that does not say, now.

    Raises:
      RunError: as `load_config`, or what is recorded is no time.
    """
    recorded = _read_all(directory).get("started")
    try:
        return datetime.fromisoformat(_now() if recorded is None else recorded)
    except (ValueError, TypeError):
        raise RunError(
            f"{directory / 'config.json'}: started is {recorded!r}; it must be a time, such as {_now()!r}"
        ) from None


def identity(directory: Path) -> str:
    """What tells a run from others: its directory's name and when it was started first.

    Raises:
      RunError: as `recorded_start`.
    """
    return f"{directory.name} {recorded_start(directory).isoformat()}"


def _now(moment: datetime | None = None) -> str:
    return (moment or datetime.now()).isoformat(timespec="seconds")


def recorded_model(config: Config) -> ModelConfig | None:
    """The architecture of the run in `config.directory`; None where there is none.

    Raises:
      RunError: what is recorded there is damaged.
    """
    if not (config.directory / "config.json").exists():
        return None
    recorded = {name: value for name, value in _read(config.directory).items() if name == "model"}
    return _parse(config.directory, recorded, None, None).model


def check_shared(directory: Path) -> None:
    """Checks that each process can make a directory if it is missing, and files in it, and that all see the same one.

    Raises:
      OSError: process 0 cannot make it, or a file in it.
      RunError: another process cannot, or does not see there what process 0 has made.
    """
    directory, refused, made = Path(os.path.realpath(directory)), None, None
    with contextlib.ExitStack() as kept:
        try:
            made = os.path.relpath(kept.enter_context(trial_file(directory)), directory)
        except OSError as error:
            refused = error
        first = of_all_processes({"made": made})[0]["made"]
        seen = first is None or os.path.exists(os.path.normpath(directory / first))
        # process 0 keeps it until all have looked
        total(0)
    if refused is None and seen:
        return
    if refused is not None and is_main():
        raise refused
    told = f"{refused.filename}: {refused.strerror}" if refused else f"{directory} is not the directory of process 0"
    raise RunError(
        f"{told}; every process writes its own part there, so it must be on a file system that all of them share"
    )


def check_processes_agree(config: Config, recipe: CodeFile | None = None) -> None:
    """That all processes run one config of one recipe on the same versions; each says what differs.

    Raises:
      RunError: they do not.
    """
    checksum = None if recipe is None else recipe.sha256
    described = flatten(to_dict(config) | {"versions": _versions(), "recipe": {"sha256": checksum}})
    # how each finds the others may differ
    described = {name: value for name, value in described.items() if not name.startswith("distributed.")}
    _check_agree(described, "start the same command with the same versions on every host")


def check_data_agree(data: dict[str, str]) -> None:
    """That all processes have read the same files (`Problems.fingerprint`).

    Raises:
      RunError: they have not.
    """
    _check_agree(data, "give every host the same files in task.data_dir, and the same tokenizer")


def check_end_tokens_agree(end_tokens: Sequence[int]) -> None:
    """That for all processes the same tokens end a response.

    Raises:
      RunError: they do not.
    """
    advice = "give every host the same config.json, generation_config.json and tokenizer with the weights"
    _check_agree({"end tokens": list(end_tokens)}, advice)


def _check_agree(described: dict[str, Any], advice: str) -> None:
    ours, *others = of_all_processes(described)
    for number, theirs in enumerate(others, start=1):
        changed = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        if changed:
            listed = ", ".join(f"{name} {ours.get(name)!r} and {theirs.get(name)!r}" for name in sorted(changed))
            raise RunError(f"processes 0 and {number} differ in {listed}; {advice}")


def _versions() -> dict[str, str]:
    return {name: version(name) for name in VERSIONED} | {"python": platform.python_version()}


def load_config(directory: Path, *, recipe_code: bool = True) -> Config:
    """The configuration that a run was started with; its relative paths are of the directory that it was started in.

    A run whose sections are all of dcjax executes nothing. For others, a line on standard error says which code is
    executed. Another line says if the original of the run's recipe has changed since.

    Args:
      directory: of the run.
      recipe_code: False refuses to execute code from outside dcjax.

    Raises:
      RunError: the directory holds no run, a damaged config.json or recipe, a class that cannot be imported, or code
        that must not be executed.
    """
    recorded = _read(directory)
    outside = sorted({str(name) for name in classes_in(recorded) if not str(name).startswith("dcjax.")})
    recipe = None
    if outside:
        if not recipe_code:
            raise RunError(
                f"{directory / 'config.json'} names code outside dcjax, {', '.join(outside)}, which --no-recipe-code "
                "does not let run"
            )
        recipe = kept_recipe(directory)
        _say(f"runs the code of {', '.join(outside)}" + (f" in {recipe.path}" if recipe is not None else ""))
    if (changed := changed_recipe(directory)) is not None:
        _say(changed)
    started_in = Path(_read_all(directory).get("directory") or ".")
    return _parse(directory, recorded, recipe, started_in if started_in.is_dir() else None)


def _say(line: str) -> None:
    if is_main():
        print(f"dcjax: {line}", file=sys.stderr)


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
    """The config in config.json, with what is recorded beside it taken out, and formats by their present names."""
    recorded = {name: value for name, value in _read_all(directory).items() if name not in BESIDE_CONFIG}
    model, serving = recorded.get("model"), recorded.get("serving")
    # a config from before `int8` got another meaning has no field for scaled RoPE either
    if isinstance(model, dict) and isinstance(serving, dict) and "rope_scaling" not in model:
        name = str(serving.get("format"))
        if name in FORMERLY:
            recorded["serving"] = serving | {"format": FORMERLY[name]}
    return recorded


def _read_all(directory: Path) -> dict:
    path = directory / "config.json"
    try:
        recorded = dict(json.loads(path.read_text()).items())
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(
            gguf_advice(directory)
            or f"no run in {directory}: it has no config.json; give a directory that dcjax train made"
        ) from None
    except (ValueError, AttributeError):
        raise RunError(f"{path} is damaged: it is not a JSON object") from None
    if "model_type" in recorded or "architectures" in recorded:
        raise RunError(f"{directory} is a Hugging Face folder without safetensors, and no run of dcjax train")
    return recorded


def _parse(directory: Path, recorded: dict, recipe: CodeFile | None, started_in: Path | None) -> Config:
    try:
        return from_dict(recorded, recipe, started_in)
    except Exception as error:  # a section of the reader's own may raise anything
        own = "" if recipe is None else recipe.module_name
        told = error if isinstance(error, ValueError) else failure(error, own)
        raise RunError(f"{directory / 'config.json'} cannot be read: {told}") from error


def _check_same(config: Config, directory: Path) -> None:
    recorded, started_in = flatten(_read(directory)), Path(_read_all(directory).get("directory") or ".")
    ours = flatten(to_dict(config))
    for name in path_fields(config):
        ours[name] = str(Path.cwd() / ours[name])
        recorded[name] = str(started_in / str(recorded.get(name)))
    changed = differences(ours, recorded)
    if changed:
        listed = ", ".join(f"{name} {ours!r} (there {theirs!r})" for name, (ours, theirs) in sorted(changed.items()))
        raise RunError(f"{directory} holds a run of another config: {listed}; choose another --run-dir or remove it")


def _check_same_recipe(recipe: CodeFile | None, directory: Path) -> None:
    kept = kept_recipe(directory)
    if recipe is not None and kept is not None and kept.sha256 != recipe.sha256:
        raise RunError(
            f"{directory} holds a run of another recipe than {recipe.path}; dcjax train {directory} resumes it with "
            "its own, or choose another --run-dir"
        )


def _check_same_data(data: dict[str, str], directory: Path) -> None:
    recorded = _read_all(directory).get("data", {})
    changed = sorted(name for name in data | recorded if data.get(name) != recorded.get(name))
    if not changed:
        return
    listed = ", ".join(f"{name}: {data.get(name)}, there {recorded.get(name)}" for name in changed)
    back = {
        "the chat template that it began with back into the tokenizer's folder": TEMPLATE in changed,
        "the files that it began with back into task.data_dir": changed != [TEMPLATE],
    }
    raise RunError(
        f"{directory} holds a run on other data: {listed}; put {' and '.join(name for name in back if back[name])}, "
        "or choose another --run-dir"
    )
