"""Compiles for TPU slices without TPUs: their compiler runs on any x86-64 Linux.

A program that is lowered for a slice's devices compiles, and its memory and collectives can be read; it cannot run.
"""

from __future__ import annotations

import os

import jax
from jax.experimental import topologies

_NOT_ON_A_TPU_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",  # no cloud's metadata server to ask
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # of no host; the topology's name decides
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there are no chips that only one process may use
}


def slice_devices(name: str) -> list[jax.Device]:
    """The chips of a slice such as "v5p:4x4x4" or "v5e:4x4", to compile for: `make_mesh(config, devices)`.

    Libtpu reads environment variables when it is first loaded, so those that it needs are set here unless they are set
    already.

    Raises:
      ValueError: libtpu is missing (jax[tpu] installs it), or does not know the slice.
    """
    for variable, value in _NOT_ON_A_TPU_HOST.items():
        os.environ.setdefault(variable, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (jax.errors.JaxRuntimeError, ModuleNotFoundError, RuntimeError) as error:
        raise ValueError(
            f"TPU slice {name!r}: {error}; names are like v5p:4x4x4 and v5e:4x4, and libtpu is needed"
        ) from None
