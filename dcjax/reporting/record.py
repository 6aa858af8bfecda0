"""What a run writes besides its checkpoints: logs of JSON lines, each with its step, and TensorBoard events.

The JSON lines are authoritative and the events are a copy. A run that was killed resumes from its last checkpoint, so
each log drops the lines of later steps when it is opened.
"""

import contextlib
import json
import math
import operator
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, SupportsFloat


class StepLog:
    """An append-only file of JSON objects, one per line, whose first key is the `step` that they belong to."""

    def __init__(self, path: Path, *, last_step: int | None):
        """Opens `path` and keeps the lines of steps up to and including `last_step`.

        Args:
          path: the file; it and its directory are created if missing.
          last_step: the step after which the run resumes; None starts an empty file.

        Raises:
          ValueError: if a line is damaged that stands before a line to keep. Damage after the lines to keep is what a
            killed run leaves, and is dropped with the lines of later steps.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        resumes = last_step is not None and self.path.exists()
        kept = _intact_lines_up_to(self.path, last_step) if resumes else []
        write_atomically(self.path, b"".join(line + b"\n" for line in kept))
        self._file = open(self.path, "ab")  # noqa: SIM115 (`close` closes it)

    def append(self, step: int, fields: Mapping[str, Any]) -> None:
        """Writes one line and flushes it to the operating system, so that it survives the process.

        Raises:
          ValueError: if a field is called `step`, or holds a float that is not finite.
        """
        if "step" in fields:
            raise ValueError(f"{self.path.name}: a field is called 'step', which is the line's own key")
        for name, value in fields.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(
                    f"{self.path.name}: {name!r} is {value} at step {step}; only finite numbers are logged"
                )
        line = json.dumps({"step": operator.index(step), **fields}, ensure_ascii=False, allow_nan=False)
        # UTF-8 cannot encode a lone surrogate; "backslashreplace" makes it a JSON escape, which is read back unchanged.
        with named_in_errors(self.path):
            self._file.write(line.encode("utf-8", "backslashreplace") + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        with named_in_errors(self.path):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class MetricsLog(StepLog):
    """`<stem>.jsonl` in a run directory, one object of numbers per step; optionally TensorBoard events as well."""

    def __init__(self, run_dir: Path, stem: str, *, last_step: int | None, tensorboard: bool = False):
        """Opens `run_dir/<stem>.jsonl`, and event files in `run_dir/tensorboard` if `tensorboard`.

        Args:
          run_dir: the run's directory, created if missing.
          stem: `metrics` for reinforcement learning, `warm_start` for the supervised phase before it.
          last_step: the step after which the run resumes; later steps are dropped, and all steps if None.
          tensorboard: whether to write events as well. Earlier events after `last_step` are marked as purged.

        Raises:
          ValueError: as for `StepLog`.
        """
        super().__init__(Path(run_dir) / f"{stem}.jsonl", last_step=last_step)
        first_step = 0 if last_step is None else last_step + 1
        self._events = _TensorBoardEvents(Path(run_dir) / "tensorboard", first_step) if tensorboard else None

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Writes the metrics of one step; a float32 is widened to float64, which preserves its value.

        Args:
          step: the training step; 0 is the state before the first update.
          metrics: numbers by name: Python's, NumPy's or arrays without axes.

        Raises:
          TypeError: if a value is not a single number.
          ValueError: if a value is not finite, or a metric is called `step`.
        """
        numbers = {name: _as_number(name, value) for name, value in metrics.items()}
        self.append(step, numbers)
        if self._events is not None:
            self._events.write(step, numbers)

    def close(self) -> None:
        """Closes the file and the events; a second call does nothing."""
        super().close()
        if self._events is not None:
            self._events.close()


class TokenProbabilities(NamedTuple):
    """A token of a response, and what both policies gave to it."""

    text: str
    train: float
    sampler: float


class Transcripts(StepLog):
    """`samples.jsonl` in a run directory: prompts, responses and their rewards, one sample per line."""

    def __init__(self, run_dir: Path, *, last_step: int | None):
        """Opens `run_dir/samples.jsonl`; `last_step` and the errors are those of `StepLog`."""
        super().__init__(Path(run_dir) / "samples.jsonl", last_step=last_step)

    def write(
        self,
        step: int,
        *,
        prompt: str,
        response: str,
        reward: float,
        finished: bool,
        policy_version: int,
        parts: Mapping[str, float] | None = None,
        tokens: Sequence[TokenProbabilities] = (),
    ) -> None:
        """Writes one sample.

        Args:
          step: the training step that the sample was drawn for.
          prompt: the prompt's text.
          response: the response's text.
          reward: the response's reward.
          finished: whether the response ended with an end token rather than at the length limit.
          policy_version: version of the weights that sampled the response: the number of updates before them.
          parts: of the reward, by name; omitted where there are none.
          tokens: the response's first ones, each written as [text, p_train, p_infer]; omitted where there are none.

        Raises:
          ValueError: if `reward` is not finite.
        """
        fields: dict[str, Any] = {
            "prompt": prompt,
            "response": response,
            "reward": float(reward),
            "finished": bool(finished),
            "policy_version": int(policy_version),
        }
        if parts:
            fields["reward_parts"] = dict(parts)
        if tokens:
            fields["tokens"] = [(text, round(train, 6), round(sampler, 6)) for text, train, sampler in tokens]
        self.append(step, fields)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a `MetricsLog`, in the order written; an incomplete last line is ignored.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if another line is damaged; the message names the file and the line's number.
    """
    return _read_records(Path(path))


def read_transcripts(path: Path) -> list[dict[str, Any]]:
    """The lines of a `Transcripts` file; an incomplete last line and errors are handled as by `read_metrics`."""
    return _read_records(Path(path))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it holds something else; the message names the file.
    """
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is a {type(found).__name__}; it must be a JSON object")
    return found


@contextlib.contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Adds the path to an OSError raised by a write, which knows only a file descriptor."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def trial_file(directory: Path) -> Iterator[Path]:
    """A file that is made in a directory, or where that is missing in the nearest above it, and removed in the end.

    Raises:
      OSError: it cannot be made; the message names the directory where.
    """
    directory = Path(os.path.realpath(directory))
    nearest = next(path for path in (directory, *directory.parents) if path.exists())
    with contextlib.ExitStack() as kept:
        with named_in_errors(nearest):
            file = kept.enter_context(tempfile.NamedTemporaryFile(dir=nearest, prefix=".dcjax-"))
        yield Path(file.name)


def check_writable(directory: Path) -> None:
    """Checks that a directory can be made if it is missing, and files in it; raises as `trial_file`."""
    with trial_file(directory):
        pass


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces the content of `path`: a reader finds all of the old or all of the new content, even after a crash."""
    partial = path.with_name(f".{path.name}.partial")
    with named_in_errors(path), open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _read_records(path: Path) -> list[dict[str, Any]]:
    records = [_decode(line) for line in _lines(path)]
    if records and records[-1] is None:
        records.pop()
    whole = [record for record in records if record is not None]
    if len(whole) < len(records):
        raise _damaged_line_error(path, records.index(None) + 1)
    return whole


def _intact_lines_up_to(path: Path, last_step: int) -> list[bytes]:
    kept, first_damaged = [], None
    for number, line in enumerate(_lines(path), start=1):
        record = _decode(line)
        if record is None:
            first_damaged = first_damaged or number
        elif record["step"] <= last_step:
            if first_damaged is not None:
                raise _damaged_line_error(path, first_damaged)
            kept.append(line)
    return kept


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().removesuffix(b"\n").split(b"\n") if path.stat().st_size else []


def _decode(line: bytes) -> dict[str, Any] | None:
    """The object of a line, or None if the line is damaged, that is, not a JSON object with an integer `step`."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _damaged_line_error(path: Path, number: int) -> ValueError:
    return ValueError(
        f'{path}, line {number}: not a JSON object with an integer "step"; only the end of the file may be damaged'
    )


def _as_number(name: str, value: Any) -> int | float:
    try:
        return int(operator.index(value))
    except TypeError:
        pass
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"metric {name!r} is {value!r}, which is not a single number") from None


class _TensorBoardEvents:
    """A TensorBoard event file, written in the caller's thread: a full disk raises an error instead of a hang."""

    def __init__(self, directory: Path, first_step: int):
        """Starts a file in `directory` that replaces the events of earlier files from `first_step` on."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore[missing-module-attribute]
        from tensorboardX.proto.summary_pb2 import Summary  # pyrefly: ignore[missing-module-attribute]

        self._directory, self._event, self._summary = directory, Event, Summary
        directory.mkdir(parents=True, exist_ok=True)
        # Event files are named by the second and are overwritten: without a suffix of its own, a run that is resumed
        # within one second would erase the events that it resumes.
        with named_in_errors(directory):
            self._writer = EventsWriter(str(directory / "events"), f".{first_step:08d}")
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes and flushes the scalars of one step."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(self._event(step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        """Closes the file; an error is ignored, because `write` has raised it already."""
        with contextlib.suppress(OSError):
            self._writer.close()

    def _write(self, event) -> None:
        event.wall_time = time.time()
        with named_in_errors(self._directory):
            self._writer.write_event(event)
            self._writer.flush()
