"""A response as it arrives: its text without cut characters and stop strings, and its tokens with their log-probs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dcjax.serving.server.contract import STOP
from dcjax.serving.server.http.engine_thread import Piece, Scored
from dcjax.serving.server.text import TextStream


@dataclass
class Delta:
    """What is new of a response."""

    text: str = ""
    tokens: list[Scored] = field(default_factory=list)
    # where the text of each begins, in the whole response's
    offsets: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def extend(self, later: Delta) -> None:
        """Adds what comes behind."""
        self.text += later.text
        self.tokens += later.tokens
        self.offsets += later.offsets
        self.finish_reason = later.finish_reason


class Answer:
    """One response. Its end token is one of its tokens and no part of its text, nor is the stop string that ends it.

    Args:
      decode: token ids -> text, without special tokens.
      stops: strings that end it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str]):
        self._text, self._stops = TextStream(decode), stops
        # characters that were told, and text that may be the beginning of a stop string
        self._length, self._held = 0, ""

    def push(self, piece: Piece) -> Delta:
        """What a piece adds. Once it ends by a stop string, what comes later is to be let go of."""
        delta = Delta()
        for place, scored in enumerate(piece.tokens):
            reason = piece.finish_reason if place == len(piece.tokens) - 1 else None
            delta.tokens.append(scored)
            delta.offsets.append(self._length + len(self._held))
            self._held += self._text.push([] if reason == STOP else [scored.token], last=reason is not None)
            found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
            cut = min(found) if found else len(self._held) - (0 if reason else self._may_begin_a_stop())
            delta.text += self._held[:cut]
            self._length, self._held = self._length + cut, self._held[cut:]
            delta.finish_reason = STOP if found else reason
            if found:
                break
        return delta

    def _may_begin_a_stop(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
