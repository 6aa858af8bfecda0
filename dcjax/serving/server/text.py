"""The text of a response while its tokens arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"
"""What tokenizers decode the first bytes of a character to, and bytes that are no text."""

HELD = 3
"""Tokens that may be the beginning of a character: it has four bytes at most, and a token one at least."""


class TextStream:
    """Decodes tokens as they come, without cutting a character in two.

    What a token decodes to may depend on the one before it, so that each piece is the difference between two decoded
    texts. These begin at the piece before, not at the beginning: the work for a token does not grow with the response.

    Args:
      decode: token ids -> text.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        # the tokens of the last piece, which is told, and those behind it, which are not
        self._told: list[int] = []
        self._new: list[int] = []

    def push(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """The text that some tokens add: what may be the beginning of a character waits, unless they are the last."""
        self._new += tokens
        before, most = self._decode(self._told), 0 if last else min(HELD, len(self._new))
        for held in range(most + 1):
            told = self._new[: len(self._new) - held]
            text = self._decode(self._told + told)
            if not text.endswith(INCOMPLETE) or held == most:
                break
        if told:
            self._told, self._new = told, self._new[len(told) :]
        return text[len(before) :] if told else ""
