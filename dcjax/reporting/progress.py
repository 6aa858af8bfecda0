"""How far a run is, on the terminal or in a log file."""

import math
import sys
import time
from collections import deque
from types import TracebackType
from typing import Self, TextIO

_SECONDS_BETWEEN_LINES = 5.0
_STEPS_TIMED = 20
_ASCII_NAMES = {"δ̄": "gap", "λ": "lambda"}


def format_duration(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`, rounded to the second; days are counted as hours.

    Raises:
      ValueError: if `seconds` is negative or not finite.
    """
    if not 0 <= seconds < math.inf:
        raise ValueError(f"seconds is {seconds}; a duration is a finite number from 0")
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """A live bar where the stream is a terminal, elsewhere plain lines: the first, the last, one in 5 s between.

    `step 12/70  reward 0.69  δ̄ 0.0014/0.0010  λ 0.18  ETA 0:31` is a plain line, `step` being the description.
    The bar puts the time left before the values, since terminals cut at the right. The time left follows from the
    last 20 steps, so that neither compilation nor a slow start counts for long.

    Where the stream's encoding cannot carry δ̄ and λ (`LANG=C`), they are called `gap` and `lambda`, the bar is
    drawn in ASCII, and other characters that do not fit become question marks.
    """

    def __init__(self, total: int, *, initial: int, description: str, stream: TextIO | None = None):
        """Starts at step `initial` of `total`.

        Args:
          total: the last step's number.
          initial: the step reached already, as after a resume.
          description: the word before the step's number.
          stream: where to write; standard error if None.
        """
        self._total = total
        self._description = description
        self._stream = sys.stderr if stream is None else stream
        self._recent: deque[tuple[int, float]] = deque(maxlen=_STEPS_TIMED + 1)
        self._printed_at = -math.inf
        self._unprinted: str | None = None
        self._unicode = _carries(self._stream, "δ̄λ█")
        self._bar = self._open_bar(initial) if self._stream.isatty() else None

    def update(self, step: int, /, **shown: str) -> None:
        """Tells that `step` is done, with values to show: formatted strings by name, in order."""
        now = time.monotonic()
        self._recent.append((step, now))
        head = f"{self._description} {step}/{self._total}"
        values = [f"{self._name(name)} {value}" for name, value in shown.items()]
        remaining = f"ETA {self._remaining(step)}"
        if self._bar is not None:
            self._bar.set_description_str(self._fit("  ".join([head, remaining, *values])), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        self._unprinted = self._fit("  ".join([head, *values, remaining]))
        if step >= self._total or now - self._printed_at >= _SECONDS_BETWEEN_LINES:
            self._print(now)

    def close(self) -> None:
        """Shows the last step, if it was not shown yet, and ends the line; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()
        elif self._unprinted is not None:
            self._print(time.monotonic())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_bar(self, initial: int):
        from tqdm import tqdm

        return tqdm(
            total=self._total,
            initial=initial,
            desc=self._fit(f"{self._description} {initial}/{self._total}"),
            bar_format="|{bar:16}| {desc}",
            ascii=not self._unicode,
            dynamic_ncols=True,
            file=self._stream,
        )

    def _print(self, now: float) -> None:
        self._stream.write(f"{self._unprinted}\n")
        self._stream.flush()
        self._printed_at = now
        self._unprinted = None

    def _remaining(self, step: int) -> str:
        (first_step, started), (last_step, ended) = self._recent[0], self._recent[-1]
        if step >= self._total:
            return format_duration(0)
        if last_step <= first_step:
            return "?"
        return format_duration((ended - started) / (last_step - first_step) * (self._total - step))

    def _name(self, name: str) -> str:
        return name if self._unicode else _ASCII_NAMES.get(name, name)

    def _fit(self, text: str) -> str:
        """`text` with what the stream's encoding cannot carry replaced by question marks."""
        encoding = self._stream.encoding
        return text if encoding is None else text.encode(encoding, "replace").decode(encoding)


def _carries(stream: TextIO, text: str) -> bool:
    # A stream in memory has no encoding and takes any text.
    if stream.encoding is None:
        return True
    try:
        text.encode(stream.encoding)
    except UnicodeEncodeError:
        return False
    return True
