"""Many hosts, one process each: how they join, what they exchange, and how they stop together.

Every process runs the same loop on the same numbers. It generates, scores and evaluates its own share of the prompts;
all processes then gather all results, so that all take the same decisions from there on. Process 0 writes the files and
shows the progress.
"""

from __future__ import annotations

import json
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
from dcjax.sharding.mesh import HOSTS, by_host, start_devices

# not public: without it, whether there is a cluster shows only in how `initialize` fails
from jax._src.clusters import ClusterEnv  # isort: skip

HEARTBEAT = 30
"""Seconds without a heartbeat from one process after which JAX stops the others."""

LEAVING = 60
"""Seconds within which all processes must end once the first has ended successfully."""

LAST = 3
"""Seconds that process 0 waits before it ends on an error, so that others with the same error can report it."""

LOST = re.compile(r"Gloo|NCCL|[Bb]arrier|coordination service")
"""Matches the errors with which JAX and Orbax report a lost host, if they notice at once."""

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run on many hosts find each other.

    By default JAX detects this on TPU pods and under SLURM and Open MPI. Elsewhere the first three fields are needed;
    without them a process runs alone.

    Raises:
      ValueError: a field is out of range, or only some of the first three are given.
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
    """Waits for the other processes, if there are any, once; must be called before JAX uses a device.

    Raises:
      RunError: the launcher's environment variables cannot be read, JAX fails to join, or as `start_devices`.
    """
    if has_joined():
        return
    try:
        coordinator, count, number = _find(config)
        if coordinator is None or count == 1:
            start_devices()
            return
        # `Preemption` takes SIGTERM: JAX's own protocol counts steps from 0, and misses notices to resumed runs
        jax.config.update("jax_enable_preemption_service", False)
        where = f"process {number} of {count} waited {config.timeout} s for the others at {coordinator}"
        # without this timer JAX would abort the process with a stack trace
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
        start_devices()
        if jax.default_backend() == "cpu":
            # The first process alone finds its programs there, and Gloo waits half a minute for those that compile.
            jax.config.update("jax_enable_compilation_cache", False)
        # all processes synchronise here once more, when devices are found
        multihost_utils.sync_global_devices("joined")
        waiting.cancel()
    except (RuntimeError, ValueError, OSError) as error:
        raise RunError(f"cannot join the other processes: {error}") from error


def _find(config: DistributedConfig) -> tuple[str | None, int | None, int | None]:
    """The coordinator, the number of processes and this one's own number; all None if there is no cluster."""
    if config.coordinator is not None:
        return config.coordinator, config.num_processes, config.process_id
    return ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, config.timeout)[:3]


def _give_up(where: str) -> None:
    message = f"dcjax: error: {where}; not all have joined: start the same command once for each process_id"
    print(message, file=sys.stderr, flush=True)
    os._exit(Interrupted.status)


def is_main() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return jax.process_index() == 0


def check_divides(mesh: Mesh, *, serving: int, prompts: int, heldout: int) -> None:
    """Checks that all processes have devices of the mesh, equally many training prompts, and a held-out one.

    Args:
      mesh: the mesh that trains.
      serving: the number of devices that only serve.
      prompts: the number of prompts in an iteration.
      heldout: the number of prompts in an evaluation.

    Raises:
      RunError: a process does not.
    """
    processes = jax.process_count()
    if processes > 1 and mesh.size + serving < jax.device_count():
        beside = f" and serving.devices is {serving}" if serving else ""
        raise RunError(
            f"the mesh has {mesh.size} devices{beside}; with {processes} processes all {jax.device_count()} are needed"
        )
    check_prompts(processes, prompts=prompts, heldout=heldout)


def check_prompts(processes: int, *, prompts: int, heldout: int) -> None:
    """Checks that so many processes have equally many training prompts, and a held-out one.

    Raises:
      RunError: a process does not.
    """
    if prompts % processes:
        raise RunError(f"rollout.prompts is {prompts}; it must be a multiple of the number of processes, {processes}")
    if heldout < processes:
        raise RunError(f"evaluation.prompts is {heldout}; it must be at least the number of processes, {processes}")


def share(count: int) -> slice:
    """This process's contiguous part of `count` items; the parts of all processes are as equal as possible."""
    number, processes = jax.process_index(), jax.process_count()
    return slice(count * number // processes, count * (number + 1) // processes)


def gather(tree: Tree, mesh: Mesh | None = None) -> Tree:
    """Concatenates host arrays of all processes along their rows, on every process; shapes must be equal.

    The arrays travel through the devices of `mesh`, or through all devices. A thread that has devices of its own must
    name them, since every device has to run the same programs in the same order as those of other processes.
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
    """The sum of a count over all processes, which must fit in int32; `mesh` is as for `gather`."""
    return int(gather(np.array([count], np.int32), mesh).sum())


def of_all_processes(described: dict, mesh: Mesh | None = None) -> list[dict]:
    """One JSON object of each process, in order; `mesh` is as for `gather`."""
    written = np.frombuffer(json.dumps(described).encode(), np.uint8)
    lengths = gather(np.array([len(written)], np.int32), mesh)
    padded = gather(np.pad(written, (0, lengths.max() - len(written)))[None], mesh)
    return [json.loads(row[:length].tobytes()) for row, length in zip(padded, lengths, strict=True)]


def threads_may_launch() -> bool:
    """Whether two threads of a process may each start programs, on devices of their own.

    XLA's client for CPUs starts a process's programs in one order, whatever devices they are for: several processes
    whose threads start programs in different orders would wait for each other.
    """
    return jax.process_count() == 1 or jax.default_backend() != "cpu"


def place(tree: Any, sharding: Sharding) -> Any:
    """Turns host arrays that every process has whole into global arrays: each process fills its own devices."""
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index]), tree
    )


def as_loss(error: BaseException) -> Interrupted | None:
    """The exception to raise for an error that means that another process is gone; None for other errors."""
    if isinstance(error, RunError) or not LOST.search(str(error)) or jax.process_count() == 1:
        return None
    line = str(error).strip().splitlines()[0]
    return Interrupted(
        f"another of the {jax.process_count()} processes has stopped, and its output says why ({line}); "
        "the same command on every host resumes from the last checkpoint"
    )


def has_joined() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized()


def leave(status: int) -> NoReturn:
    """Ends a process of several that has failed.

    The usual way to end would wait for the others, which wait for this one. Process 0 ends last, because JAX aborts the
    others without it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main():
        time.sleep(LAST)
    os._exit(status)


class Stopped(Exception):
    """A process was asked to stop in the middle of an iteration, which is discarded."""


class Preemption:
    """Records SIGTERM, with which launchers announce that they will stop a process; SIGINT raises KeyboardInterrupt.

    Outside of this context both end the process at once, since there is nothing to save yet (`dcjax.signals`).
    """

    def __init__(self):
        self._noted = False

    def announced(self, mesh: Mesh) -> bool:
        """Whether any process has received SIGTERM; all must call it at the same point, with `mesh` as in `gather`."""
        return total(self._noted, mesh) > 0

    def check(self, mesh: Mesh) -> None:
        """Raises Stopped if a stop was `announced`."""
        if self.announced(mesh):
            raise Stopped

    def __enter__(self) -> Preemption:
        handlers = {signal.SIGTERM: self._note, signal.SIGINT: signal.default_int_handler}
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
