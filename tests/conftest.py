"""Every test runs on eight fake CPU devices, with shapes and dtypes of functions checked at run time."""

import gc
import os
import shutil
import signal
import sys
import tempfile
import types
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# XLA's usual scheduler on CPU runs what is independent side by side, collectives in two loops among it: fake devices
# then meet in different orders, and wait for each other until they are aborted.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_enable_concurrency_optimized_scheduler=false"
)
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# compiled programs are kept between runs, for the processes that tests start too
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / "dcjax-test-compilation-cache")
# but for those that are compiled in less time than they take to write and to read
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"

import jax
import pytest
from beartype import beartype
from filelock import FileLock
from hypothesis import settings
from jaxtyping import install_import_hook
from packaging.version import Version


def check_functions(function):
    """Checks calls, but not how dataclasses are built: JAX rebuilds them around tracers, shapes, shardings and None."""
    return function if function.__name__ == "__init__" else beartype(function)


# the hook takes its checker by the name of something that can be imported
checker = types.ModuleType("dcjax_test_checker")
checker.check_functions = check_functions
sys.modules[checker.__name__] = checker
checked = [f"dcjax.{room}" for room in ("models", "rewards", "rl", "serving", "sharding", "types")]
install_import_hook(checked, f"{checker.__name__}.check_functions")

# libraries and traced programs are a million objects that stay, and to walk them again and again took an eighth of the
# time to import and collect the tests
gc.set_threshold(50_000, 20, 100)

# a shell's background job ignores interrupts, and so would the processes that tests start and interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("everyday", deadline=None, max_examples=30)
settings.register_profile("thorough", deadline=None)
settings.load_profile("thorough")


# nor cut into 32 pieces for as many threads, each of which costs time and memory mappings
UNOPTIMISED = " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if Version(version("jaxlib")) < Version("0.12"):
    # later ones have no other way, and end the process where they do not know a flag
    UNOPTIMISED += " --xla_cpu_use_fusion_emitters=false"


def pytest_configure(config):
    """What runs without the slow tests is compiled without optimisation, in a quarter of the time, on fewer examples.

    With the slow tests everything is compiled as for users.
    """
    if config.option.markexpr.startswith("not slow"):
        os.environ["XLA_FLAGS"] += UNOPTIMISED
        settings.load_profile("everyday")


def pytest_collection_finish():
    """What was imported stays, and is not walked by any collection again."""
    gc.collect()
    gc.freeze()


MAPPINGS = Path("/proc/self/maps")
MANY = 40_000
"""Of the 65,530 memory mappings that Linux lets a process have; every compiled program takes some for good."""


@pytest.fixture(scope="module", autouse=True)
def what_a_file_leaves_is_not_walked_again():
    """Traced programs are a million objects by and by, and each collection walks them.

    They are forgotten in time: a process that runs out of mappings crashes in whatever it compiles next.
    """
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MANY:
        gc.unfreeze()
        jax.clear_caches()
        gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """A file with the recipe of `finished_run`."""
    import tiny

    return tiny.write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.py")


@pytest.fixture(scope="session")
def finished_run(recipe, tmp_path_factory):
    """The directory of a run of `tiny.CONFIG` that nothing disturbed, by the command line; two iterations are profiled.

    The first worker that needs it makes it. Tests look at their worker's copy, and change copies of that.
    """
    from dcjax.cli import main

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    made = shared / "finished"
    with FileLock(shared / "finished.lock"):
        if not made.exists():
            assert main(["train", str(recipe), "--run-dir", str(made), "--profile", "2"]) == 0
    return shutil.copytree(made, tmp_path_factory.mktemp("runs") / "finished")
