"""What a server serves, and how it is reached, whatever it speaks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerFast

from dcjax.errors import RunError
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.server.contract import Contract
from dcjax.serving.server.weights import Newer
from dcjax.serving.sync import ServingParams


@dataclass(frozen=True)
class ServerConfig:
    """How a server is reached, and what it takes."""

    host: str = "127.0.0.1"
    """The address that it listens at."""
    port: int = 9000
    """The port; 0 is any that is free."""
    metrics_port: int | None = None
    """The port of Prometheus' metrics over HTTP; None serves none."""
    waiting: int = 512
    """Requests that may wait for a slot."""
    grace: float = 60.0
    """Seconds that running requests have to end once the server is told to stop."""
    reload_every: float = 2.0
    """Seconds between two looks for a newer checkpoint."""
    token: str | None = None
    """What clients must know, over HTTP; None lets everybody in who reaches the address."""

    request_seconds: float = 600.0
    """Seconds that a request may take, over HTTP."""
    log: Literal["none", "requests", "prompts"] = "requests"
    """What is logged of requests over HTTP: nothing, a line of JSON each, or that with its prompt."""

    def __post_init__(self):
        for name in ("port", "metrics_port"):
            if not 0 <= (getattr(self, name) or 0) < 2**16:
                raise RunError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must lie within [0, 65536)")
        for name in ("waiting", "grace", "reload_every", "request_seconds"):
            if not getattr(self, name) >= 0:
                raise RunError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 0")


Trainer = Callable[[Sequence[int]], tuple[int, list[float]]]
"""Tokens -> the version of the training policy's weights, and the natural logs that it gives to all tokens but the
first, at temperature 1 and over all tokens."""


@dataclass(frozen=True)
class Served:
    """What is served."""

    name: str
    engine: Qwen3Engine
    version: int
    params: ServingParams
    tokenizer: PreTrainedTokenizerFast
    contract: Contract
    # where newer weights come from; None where there can be none
    newer: Newer | None
    # prompts whose caches are kept, over gRPC; over HTTP one for each slot
    prompts: int = 1
    # None where it is not kept
    trainer: Trainer | None = None
