"""The weights that are served: replaced as a whole while requests run, by newer ones of the same run."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable

from dcjax.errors import RunError
from dcjax.serving.sync import ServingParams

Newer = Callable[[int], tuple[int, ServingParams] | None]
"""(version that is served) -> a newer one and its weights, or None where there is none."""

WAITED_FOR = 0.02
"""Seconds between two looks for newer weights while a request waits for them."""


class Weights:
    """The serving params of the moment.

    JetStream's threads keep the params that they were started with, so they are given this in place of them.

    Args:
      version: of the first weights.
      params: them.
    """

    def __init__(self, version: int, params: ServingParams):
        self.version, self.params = version, params
        self._replaced = asyncio.Event()
        self.awaited = 0

    async def reach(self, version: int, seconds: float) -> None:
        """Waits for weights that are at least this new.

        Raises:
          TimeoutError: there were none within so many seconds.
        """
        if self.version >= version:
            return
        self.awaited += 1
        try:
            async with asyncio.timeout(seconds):
                while self.version < version:
                    await self._replaced.wait()
        finally:
            self.awaited -= 1

    def replace(self, version: int, params: ServingParams) -> None:
        """Serves others from now on; to be called in the event loop."""
        self.params, self.version = params, version
        self._replaced.set()
        self._replaced = asyncio.Event()


class Reloader:
    """Looks for newer weights in a thread of its own, and serves them once they are loaded.

    Args:
      weights: what they replace.
      newer: where they come from.
      every: seconds between two looks while nobody waits for newer weights.
      loop: where `weights` are waited for.
      replaced: called in the loop with each new version.
    """

    def __init__(
        self,
        weights: Weights,
        newer: Newer,
        *,
        every: float,
        loop: asyncio.AbstractEventLoop,
        replaced: Callable[[int], None],
    ):
        self._weights, self._newer, self._every, self._loop, self._told = weights, newer, every, loop, replaced
        self._stopped = threading.Event()
        # why newer weights could not be loaded, which is said once
        self._failed = ""
        self._thread = threading.Thread(target=self._watch, name="reloader", daemon=True)

    def __enter__(self) -> Reloader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        waited = 0.0
        while not self._stopped.wait(WAITED_FOR):
            waited += WAITED_FOR
            if not self._weights.awaited and waited < self._every:
                continue
            waited = 0.0
            try:
                found = self._newer(self._weights.version)
            except Exception as error:  # a thread that ended here would leave old weights served without a word
                told = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
                if told != self._failed:
                    print(f"dcjax: {told}; version {self._weights.version} is served on", file=sys.stderr)
                self._failed = told
                continue
            if found is not None and not self._stopped.is_set():
                self._loop.call_soon_threadsafe(self._replace, *found)

    def _replace(self, version: int, params: ServingParams) -> None:
        self._weights.replace(version, params)
        self._told(version)
