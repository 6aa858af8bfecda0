"""What is heavy is imported where it is used."""

import os
import statistics
import subprocess
import sys

import pytest

pytestmark = pytest.mark.heavy

ROUNDS = 3


def user_seconds(*arguments):
    """Of a fresh interpreter."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime


def medians(*commands):
    """Of some rounds, in which the commands take turns: whatever else the machine does then falls on all of them."""
    rounds = [[user_seconds(*command) for command in commands] for _ in range(ROUNDS)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def test_importing_the_package_and_help_cost_little_beyond_importing_jax():
    jax, package, help = medians(("-c", "import jax"), ("-c", "import dcjax"), ("-m", "dcjax", "--help"))
    assert package <= 1.3 * jax
    assert help <= jax + 1.3


def test_a_config_loads_neither_the_engine_nor_what_it_brings():
    """They take seconds, which a command that is refused need not wait for."""
    loaded = (
        "import sys, dcjax.recipe.config; print([n for n in sys.modules if n.startswith(('tensorflow', 'jetstream'))])"
    )
    assert subprocess.check_output([sys.executable, "-c", loaded], text=True).strip() == "[]"


def test_training_and_serving_load_no_tensorflow():
    """JetStream imports it for tokenizers; it is half a gigabyte in every process."""
    loaded = "import sys, dcjax.loop.train, dcjax.tools.serve, dcjax.tools.suite; print('tensorflow' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", loaded], text=True).split()[-1] == "False"
