"""The engine that serves the deployed policy. Imports models, sharding and types; never rl.

`Qwen3Engine` is imported on first use: JetStream takes seconds.
"""

from typing import Any

__all__ = ["Qwen3Engine"]


def __getattr__(name: str) -> Any:
    if name != "Qwen3Engine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dcjax.serving.engine import Qwen3Engine

    return Qwen3Engine
