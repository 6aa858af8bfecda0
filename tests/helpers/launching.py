"""Real `dcjax train` processes that find each other on loopback."""

import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def fake_devices(count):
    """The environment of a process that has so many, and else the tests' own flags, and so their compiled programs."""
    flags = re.sub(r"(device_count)=\d+", rf"\1={count}", os.environ["XLA_FLAGS"])
    return os.environ | {"XLA_FLAGS": flags}


@contextlib.contextmanager
def processes(
    recipe, directory, *options, count=2, devices=1, only=None, each=lambda number: (), cwd=lambda number: None
):
    """`count` of them, or `only` some, with so many devices each; those that still run at the end are killed.

    `each` gives the options of one of them by its number, and `cwd` its working directory.
    """
    coordinator, started = f"127.0.0.1:{free_port()}", []
    for number in range(count) if only is None else only:
        joined = {"coordinator": coordinator, "num_processes": count, "process_id": number}
        flags = [f"distributed.{name}={value}" for name, value in joined.items()] if count > 1 else []
        command = [sys.executable, "-m", "dcjax", "train", str(recipe), "--run-dir", str(directory)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command += [*flags, *options, *each(number)]
        started.append(subprocess.Popen(command, env=fake_devices(devices), cwd=cwd(number), **streams))
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def complaints(errors):
    """Lines of stderr that tell neither what a command is on, nor how far it is, nor what Gloo says of connections."""
    quiet = ("platform: ", "training: ", "serving: ", "compiling ", "warm start ", "step ", "policy ", "[Gloo]")
    quiet += ("iterations: ", "evaluations: ", "checkpoints: ", "memory: ", "format ")
    quiet += ("where the time went: ", "  ", "meanwhile ", "trace and times: ")
    return [line for line in errors.splitlines() if not line.startswith(quiet)]


def ended(process, within=None):
    """Status, and what was told on stderr beside progress."""
    _, errors = process.communicate(timeout=within)
    return process.returncode, complaints(errors)


def send_sigterm_at(patch, owner, method, *, call):
    """To this process, when a method of a class is called for the so manyth time."""
    act, calls = getattr(owner, method), itertools.count(1)

    def told(self, *args):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return act(self, *args)

    patch.setattr(owner, method, told)
