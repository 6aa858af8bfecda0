"""What travels as gRPC metadata beside JetStream's messages, which have no fields for it.

A request may carry the settings of `Asked`, an answer carries those of `Answer`. A client that knows none of them is
served with the defaults.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

PREFIX = "dcjax-"
CONTRACT = f"{PREFIX}contract"
"""The key of a HealthCheck's trailing metadata that holds the contract in JSON."""

VERSIONS, FINISH_REASON, LOG_PROBS = f"{PREFIX}weights-versions", f"{PREFIX}finish-reason", f"{PREFIX}log-probs-bin"
"""The keys of an answer's trailing metadata."""

MAX_METADATA = 2**24
"""Bytes of metadata that a client must accept where it asks for log-probs: four a token. gRPC's default is 8 KiB."""

Metadata = Sequence[tuple[str, str | bytes]]


def _integers(text: str) -> tuple[int, ...]:
    return tuple(_integer(number) for number in text.split(","))


def _integer(text: str) -> int:
    # Python would also take other scripts' digits, underscores, and thousands of digits
    if not (text.isascii() and text.removeprefix("-").isdigit() and len(text) <= 20):
        raise ValueError("it must be an integer")
    return int(text)


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("it must be true or false")
    return text == "true"


_READERS: dict[str, Callable[[str], Any]] = {
    "seed": _integer,
    "temperature": float,
    "top_k": _integer,
    "top_p": float,
    "stop_token_ids": _integers,
    "log_probs": _flag,
    "weights_version": _integer,
}


@dataclass(frozen=True)
class Asked:
    """The settings of a request; the key of a field is its name with hyphens behind `dcjax-`."""

    seed: int | None = None
    """The 64 bits of the sample's key, at least 0; None is a random one. Equal seeds give equal samples."""
    temperature: float | None = None
    """0 is greedy; None is the temperature of the contract, as for `top_k` and `top_p`."""
    top_k: int | None = None
    top_p: float | None = None
    stop_token_ids: tuple[int, ...] | None = None
    """Ids that end the response, separated by commas; None is the end tokens of the contract."""
    log_probs: bool = False
    """Whether the answer carries log-probs. A client that asks for them must accept `MAX_METADATA`."""
    weights_version: int = 0
    """The oldest weights that may begin the sample; a server whose weights are older waits for newer ones."""

    def to_metadata(self) -> Metadata:
        """What a client sends."""
        return [
            (_key(field.name), _written(value))
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
        ]

    @classmethod
    def from_metadata(cls, metadata: Iterable[tuple[str, Any]]) -> Asked:
        """What a server has received; other keys than dcjax's are left aside.

        Raises:
          ValueError: a key of dcjax's that is unknown or given twice, or a value that cannot be read.
        """
        known = {_key(name): name for name in _READERS}
        given: dict[str, Any] = {}
        for key, value in metadata:
            if not key.startswith(PREFIX):
                continue
            if (name := known.get(key)) is None:
                raise ValueError(f"metadata {key!r} is unknown; known are {', '.join(known)}")
            if name in given:
                raise ValueError(f"metadata {key!r} is given twice")
            try:
                given[name] = _READERS[name](value)
            except ValueError as error:
                raise ValueError(f"metadata {key!r} is {value[:80]!r}: {error}") from None
        asked = cls(**given)
        if not 0 <= (asked.seed or 0) < 2**64:
            raise ValueError(f"metadata 'dcjax-seed' is {asked.seed}; it must lie within [0, 2**64)")
        return asked


@dataclass(frozen=True)
class Answer:
    """What is known of a response's tokens once it has ended."""

    finish_reason: str
    versions: tuple[int, ...]
    """Of the weights that each token was sampled from."""
    log_probs: tuple[float, ...] | None
    """float32, natural, of each token under the distribution that it was drawn from; None unless asked for."""

    def to_metadata(self) -> Metadata:
        """What a server sends: versions as VERSION:TOKENS for neighbouring tokens of one version."""
        runs = ",".join(f"{version}:{len(list(run))}" for version, run in groupby(self.versions))
        metadata: list[tuple[str, str | bytes]] = [(FINISH_REASON, self.finish_reason), (VERSIONS, runs)]
        if self.log_probs is not None:
            metadata.append((LOG_PROBS, struct.pack(f"<{len(self.log_probs)}f", *self.log_probs)))
        return metadata

    @classmethod
    def from_metadata(cls, metadata: Iterable[tuple[str, Any]]) -> Answer:
        """What a client has received.

        Raises:
          ValueError: it is no answer of a dcjax server.
        """
        held = dict(metadata)
        try:
            runs = [run.split(":") for run in held[VERSIONS].split(",") if run]
            versions = tuple(int(version) for version, count in runs for _ in range(int(count)))
            packed = held.get(LOG_PROBS)
            log_probs = None if packed is None else struct.unpack(f"<{len(packed) // 4}f", packed)
            return cls(held[FINISH_REASON], versions, log_probs)
        except (KeyError, ValueError, struct.error):
            raise ValueError(f"the answer's metadata are not a dcjax server's: {sorted(held)}") from None


def _key(name: str) -> str:
    return PREFIX + name.replace("_", "-")


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
