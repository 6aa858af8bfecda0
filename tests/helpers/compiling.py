"""Programs of tests: compiled once and run a few times, so that compiling them is what takes time."""

from functools import partial
from importlib.metadata import version

import jax
from packaging.version import Version

OLDER = {"xla_cpu_use_fusion_emitters": False} if Version(version("jaxlib")) < Version("0.12") else {}
"""From 0.12 on, XLA has the newer way alone, and no such option."""

UNOPTIMISED = {"xla_backend_optimization_level": 0, **OLDER}
"""Compiler options: without optimisation, and without the newer of XLA's two ways to emit code. Together they compile a
training step in a quarter of the time; each alone saves less."""

jit = partial(jax.jit, compiler_options=UNOPTIMISED)
