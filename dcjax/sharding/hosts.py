"""Many hosts, one process each: how they join, what they exchange, and how they stop together.

Every process runs the same loop on the same numbers. It generates, scores and evaluates its own share of the prompts;
what they made is gathered, whole, by all of them, so that what follows is decided alike everywhere. Files and progress
are written by process 0.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from dcjax.errors import Interrupted, RunError
from dcjax.sharding.mesh import HOSTS, by_host

# not public: without it, whether there is a cluster shows only in how `initialize` fails
from jax._src.clusters import ClusterEnv  # isort: skip

HEARTBEAT = 30
"""Seconds without a sign of life, after which JAX stops the other processes."""

LEAVING = 60
"""Seconds in which all processes end, once the first has ended well."""

LAST = 3
"""Seconds in which other processes that fail like process 0 can say so."""

LOST = re.compile(r"Gloo|NCCL|[Bb]arrier|coordination service")
"""What JAX and Orbax say of a host that is gone, where they know at once."""

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run on many hosts find each other.

    By default as JAX detects it on TPU pods and under SLURM and Open MPI; elsewhere by the first three fields, and
    without those a process is alone.
    """

    coordinator: str | None = None
    """Address HOST:PORT of process 0, the same for every process."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Number of this process, from 0."""
    timeout: int = 300
    """Seconds to wait for the other processes to join."""

    def __post_init__(self):
        if self.timeout < 1:
            raise ValueError(f"distributed.timeout is {self.timeout}; it must be at least 1")
        if (self.coordinator, self.num_processes, self.process_id) == (None, None, None):
            return
        for name in ("coordinator", "num_processes", "process_id"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"distributed.{name} is not given; coordinator, num_processes and process_id go together"
                )
        if not re.fullmatch(r"\S+:\d+", self.coordinator or ""):
            raise ValueError(f"distributed.coordinator is {self.coordinator!r}; it must be HOST:PORT")
        if not 0 <= (self.process_id or 0) < (self.num_processes or 0):
            raise ValueError(
                f"distributed.process_id is {self.process_id}; "
                f"it must lie within 0 and num_processes - 1, which is {(self.num_processes or 0) - 1}"
            )


def join(config: DistributedConfig) -> None:
    """Waits for the other processes, if there are any; to be called before JAX touches a device.

    Raises:
      RunError: the launcher's variables cannot be read, or JAX refuses to join.
    """
    try:
        coordinator, count, number = _find(config)
        if coordinator is None or count == 1:
            return
        # `Preemption` takes SIGTERM: JAX's own protocol counts steps from 0, and misses notices to resumed runs
        jax.config.update("jax_enable_preemption_service", False)
        where = f"process {number} of {count} waited {config.timeout} s for the others at {coordinator}"
        # JAX would abort the process with a stack trace
        waiting = threading.Timer(config.timeout, _give_up, [where])
        waiting.daemon = True
        waiting.start()
        jax.distributed.initialize(
            coordinator,
            count,
            number,
            initialization_timeout=config.timeout + HEARTBEAT,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=LEAVING,
        )
        # all meet here once more, while devices are found
        multihost_utils.sync_global_devices("joined")
        waiting.cancel()
    except (RuntimeError, ValueError, OSError) as error:
        raise RunError(f"cannot join the other processes: {error}") from error


def _find(config: DistributedConfig) -> tuple[str | None, int | None, int | None]:
    """Coordinator, number of processes and own number; None where there is no cluster."""
    if config.coordinator is not None:
        return config.coordinator, config.num_processes, config.process_id
    return ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, config.timeout)[:3]


def _give_up(where: str) -> None:
    told = f"dcjax: error: {where}; not all have joined: start the same command once for each process_id"
    print(told, file=sys.stderr, flush=True)
    os._exit(Interrupted.status)


def is_main() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return jax.process_index() == 0


def check_divides(mesh: Mesh, *, serving: int, prompts: int, heldout: int) -> None:
    """That every process has devices of the mesh, as many training prompts as the others, and a held-out one.

    Args:
      mesh: that trains.
      serving: devices that only serve.
      prompts: of an iteration.
      heldout: prompts of an evaluation.

    Raises:
      RunError: one has not.
    """
    processes = jax.process_count()
    if processes > 1 and mesh.size + serving < jax.device_count():
        beside = f" and serving.devices is {serving}" if serving else ""
        raise RunError(
            f"the mesh has {mesh.size} devices{beside}; with {processes} processes all {jax.device_count()} are needed"
        )
    if prompts % processes:
        raise RunError(f"rollout.prompts is {prompts}; it must be a multiple of the number of processes, {processes}")
    if heldout < processes:
        raise RunError(f"evaluation.prompts is {heldout}; it must be at least the number of processes, {processes}")


def share(count: int) -> slice:
    """This process's part of `count` things in order; parts are equal where they can be."""
    number, processes = jax.process_index(), jax.process_count()
    return slice(count * number // processes, count * (number + 1) // processes)


def gather(tree: Tree, mesh: Mesh | None = None) -> Tree:
    """Host arrays of all processes, whole on each, one process's rows after another's; shapes must be equal.

    They travel between the devices of `mesh`, or of all: a thread that has devices of its own names these, since every
    device has to meet the same programs in the same order on all processes.
    """
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    hosts = by_host(jax.devices() if mesh is None else mesh.devices.flat)

    def gathered(leaf: np.ndarray) -> np.ndarray:
        shape = (len(leaf) * hosts.shape[HOSTS], *leaf.shape[1:])
        rows = jax.make_array_from_callback(shape, NamedSharding(hosts, PartitionSpec(HOSTS)), lambda index: leaf)
        return np.asarray(jax.device_put(rows, NamedSharding(hosts, PartitionSpec())).addressable_data(0))

    return jax.tree.map(gathered, tree)


def total(count: int, mesh: Mesh | None = None) -> int:
    """Sum over processes; within int32. Of the mesh, as `gather`."""
    return int(gather(np.array([count], np.int32), mesh).sum())


def threads_may_launch() -> bool:
    """Whether two threads of a process may each start programs, on devices of their own.

    XLA's client for CPUs starts a process's programs in one order, whatever devices they are for: several processes
    whose threads come in other orders would wait for each other.
    """
    return jax.process_count() == 1 or jax.default_backend() != "cpu"


def place(tree: Any, sharding: Sharding) -> Any:
    """Host arrays that every process has whole, as global arrays: each process feeds its own devices."""
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index]), tree
    )


def as_loss(error: Exception) -> Interrupted | None:
    """What to raise for an error that says that another process is gone; None for other errors."""
    if isinstance(error, RunError) or jax.process_count() == 1 or not LOST.search(str(error)):
        return None
    line = str(error).strip().splitlines()[0]
    return Interrupted(
        f"another of the {jax.process_count()} processes has stopped, and its output says why ({line}); "
        "the same command on every host goes on from the last checkpoint"
    )


def has_joined() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized()


def leave(status: int) -> NoReturn:
    """Ends a process of several that has failed.

    Ending as usual would wait for the others, which wait for this one. Process 0, without which JAX aborts the others,
    ends last.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main():
        time.sleep(LAST)
    os._exit(status)


class Stopped(Exception):
    """A process was told to stop in the middle of an iteration, of which nothing is kept."""


class Preemption:
    """Notes SIGTERM, with which launchers announce that they will stop a process.

    Outside of this context SIGTERM ends the process at once: there is nothing yet to save.
    """

    def __init__(self):
        self._noted = False

    def announced(self, mesh: Mesh) -> bool:
        """Whether any process has been told, which all processes ask at the same point. Of the mesh, as `gather`."""
        return total(self._noted, mesh) > 0

    def check(self, mesh: Mesh) -> None:
        """Raises Stopped if a stop was `announced`."""
        if self.announced(mesh):
            raise Stopped

    def __enter__(self) -> Preemption:
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
