"""Programs of tests: compiled once and run a few times, so that compiling them is what takes time."""

from functools import partial

import jax

UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""Compiler options: without optimisation, and without the newer of XLA's two ways to emit code. Together they compile a
training step in a quarter of the time; each alone saves less."""

jit = partial(jax.jit, compiler_options=UNOPTIMISED)
