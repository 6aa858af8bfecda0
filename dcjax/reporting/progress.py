"""The progress of a run, on the terminal or in a log file."""

import math
import sys
import time
from collections import deque
from types import TracebackType
from typing import Self, TextIO

_SECONDS_BETWEEN_LINES = 5.0
_TIMED_STEPS = 20
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
    """A live bar if the stream is a terminal, otherwise plain lines: the first, the last, and one every 5 s between.

    A plain line looks like `step 12/70  reward 0.69  δ̄ 0.0014/0.0010  λ 0.18  ETA 0:31`, where `step` is the
    description. The bar shows the remaining time before the values, because a narrow terminal cuts lines off at the
    right. The remaining time is estimated from the last 20 steps, so that compilation and a slow start are soon
    forgotten; behind the first step, from that one.

    Between steps `phase` says what is done: beside the step's number in the bar, and in plain lines until the first
    step is done.

    If the stream's encoding lacks δ̄ and λ (`LANG=C`), they are called `gap` and `lambda`, the bar is drawn in ASCII,
    and other characters that cannot be encoded become question marks.
    """

    def __init__(self, total: int, *, initial: int, description: str, stream: TextIO | None = None):
        """Starts at step `initial` of `total`.

        Args:
          total: the last step's number.
          initial: the last step that is done already; above 0 in a resumed run.
          description: the word before the step's number.
          stream: where to write; standard error if None.
        """
        self._total = total
        self._description = description
        self._stream = sys.stderr if stream is None else stream
        self._recent: deque[tuple[int, float]] = deque(maxlen=_TIMED_STEPS + 1)
        self._done, self._values = initial, []
        self._began = initial, time.monotonic()
        self._printed_at = -math.inf
        self._pending_line: str | None = None
        self._unicode = _can_encode(self._stream, "δ̄λ█")
        self._bar = self._open_bar(initial) if self._stream.isatty() else None

    def update(self, step: int, /, **values: str) -> None:
        """Shows that `step` is done, and formatted values by name, in the order given."""
        now = time.monotonic()
        self._recent.append((step, now))
        columns = [f"{self._display_name(name)} {value}" for name, value in values.items()]
        remaining = f"ETA {self._remaining_time(step)}"
        self._done, self._values = step, [remaining, *columns]
        if self._bar is not None:
            self._bar.set_description_str(self._line(*self._values), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        self._pending_line = self._line(*columns, remaining)
        if step >= self._total or now - self._printed_at >= _SECONDS_BETWEEN_LINES:
            self._print(now)

    def phase(self, name: str) -> None:
        """Shows what is done from now on, until a step is done or another phase begins."""
        if self._bar is not None:
            self._bar.set_description_str(self._line(name, *self._values))
        elif not self._recent:
            self._stream.write(f"{self._line(name)} {'…' if self._unicode else '...'}\n")
            self._stream.flush()

    def begin(self) -> None:
        """The first step begins now, rather than when this was made."""
        self._began = self._done, time.monotonic()

    def close(self) -> None:
        """Shows the last step if it has not been shown, and ends the line; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()
        elif self._pending_line is not None:
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
            desc=self._line(),
            bar_format="|{bar:16}| {desc}",
            ascii=not self._unicode,
            dynamic_ncols=True,
            file=self._stream,
        )

    def _line(self, *columns: str) -> str:
        return self._encodable("  ".join([f"{self._description} {self._done}/{self._total}", *columns]))

    def _print(self, now: float) -> None:
        self._stream.write(f"{self._pending_line}\n")
        self._stream.flush()
        self._printed_at = now
        self._pending_line = None

    def _remaining_time(self, step: int) -> str:
        first = self._recent[0] if len(self._recent) > 1 else self._began
        (first_step, started), (last_step, ended) = first, self._recent[-1]
        if step >= self._total:
            return format_duration(0)
        if last_step <= first_step:
            return "?"
        return format_duration((ended - started) / (last_step - first_step) * (self._total - step))

    def _display_name(self, name: str) -> str:
        return name if self._unicode else _ASCII_NAMES.get(name, name)

    def _encodable(self, text: str) -> str:
        """The text with question marks for the characters that the stream's encoding lacks."""
        encoding = self._stream.encoding
        return text if encoding is None else text.encode(encoding, "replace").decode(encoding)


def _can_encode(stream: TextIO, text: str) -> bool:
    # A stream in memory has no encoding and accepts any text.
    if stream.encoding is None:
        return True
    try:
        text.encode(stream.encoding)
    except UnicodeEncodeError:
        return False
    return True
