"""JetStream 0.2.2's engine API and orchestrator, with what is wrong in the modules themselves mended at import.

What can be mended by overriding a method is mended where it is overridden, in `server.driver` and `server.service`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any


def _import_on_first_use(package: str, name: str) -> None:
    """Makes `from package import name` give a module that is executed when one of its attributes is asked for."""
    spec = importlib.util.find_spec(f"{package}.{name}")
    if spec is None or spec.loader is None or spec.name in sys.modules:
        return
    spec.loader = importlib.util.LazyLoader(spec.loader)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    setattr(importlib.import_module(package), name, module)


# it imports TensorFlow, which takes half a gigabyte and seconds, for tokenizers that dcjax does not use
_import_on_first_use("jetstream.engine", "token_utils")

from jetstream.engine import engine_api as engine_api  # noqa: E402

LOGGER = "jetstream"
"""What the orchestrator's messages are logged to."""


def import_orchestrator() -> ModuleType:
    """`jetstream.core.orchestrator`, mended.

    Importing it sets the root logger to DEBUG and makes it write to standard output; that is undone, and the module
    logs to a logger of its own. `release` takes the place of its `delete_pytree`; each Driver makes its own `Thread`s.
    """
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    from jetstream.core import orchestrator

    root.setLevel(level)
    root.handlers[:] = handlers
    module: Any = orchestrator
    module.logging = logging.getLogger(LOGGER)
    module.delete_pytree = release
    return orchestrator


def release(prefilled: Any) -> None:
    """Lets go of a prompt's caches once a sample has been started from them.

    JetStream's `delete_pytree` calls `jax.tree_map`, which JAX no longer has. It would also delete caches that other
    samples of the prompt still need; here the last reference frees them.
    """
    prefilled.prefix = None


class Thread(threading.Thread):
    """A thread of the Driver whose failure ends the server in order; JetStream's own kills the process by SIGKILL.

    Args:
      on_failure: called with what the thread raised.
      settings: of a thread.
    """

    def __init__(self, *, on_failure: Callable[[BaseException], None], **settings: Any):
        super().__init__(**settings)
        self._on_failure = on_failure

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:
            self._on_failure(error)
