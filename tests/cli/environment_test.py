"""Settings of JAX that a shell or a cluster brings along: what is pinned, and which devices there are not."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from launching import complaints
from records import untimed

from dcjax.cli.session import PINNED, _pin_settings
from dcjax.keys import IMPLEMENTATION, as_key, make_key, require_key
from dcjax.reporting.record import read_metrics
from dcjax.serving.formats import formats
from dcjax.serving.rollout import sample_keys
from dcjax.serving.sampling import gumbel_noise
from dcjax.serving.sync import make_sync

pytestmark = pytest.mark.heavy

SETTINGS = {
    "JAX_ENABLE_X64": "1",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_DEFAULT_PRNG_IMPL": "unsafe_rbg",
}
SHORT = ["steps=1", "warm_start.steps=2"]


def dcjax(*arguments, **environment):
    command = [sys.executable, "-m", "dcjax", *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)


def without_times(run):
    return untimed(read_metrics(run / "metrics.jsonl"))


def test_what_would_change_or_stop_a_run_is_set_back_and_said(capsys):
    before = {name: getattr(jax.config, name) for name in PINNED}
    odd = {"jax_enable_x64": True, "jax_numpy_rank_promotion": "raise"}
    try:
        for name, value in odd.items():
            jax.config.update(name, value)
        _pin_settings()
        assert {name: getattr(jax.config, name) for name in PINNED} == PINNED
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "dcjax: JAX_ENABLE_X64 is True; dcjax sets it to False",
        "dcjax: JAX_NUMPY_RANK_PROMOTION is raise; dcjax sets it to allow",
    ]


@pytest.mark.parametrize("default", ["rbg", "unsafe_rbg"])
def test_samples_do_not_depend_on_the_default_implementation_of_keys(default):
    def drawn():
        keys = sample_keys(make_key(5), np.arange(3))
        return np.asarray(gumbel_noise(keys, np.arange(3), 7)), np.asarray(unit_noise())

    def unit_noise():
        return (
            make_sync(tiny.DENSE, formats["float32"], weight_noise=0.1)(tiny.masters(tiny.DENSE), 1)
            .weights["embed_tokens"]
            .codes
        )

    expected = drawn()
    with jax.default_prng_impl(default):
        found = drawn()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_a_run_samples_and_computes_the_same_whatever_the_environment_sets(recipe, tmp_path):
    plain = dcjax("train", recipe, "--run-dir", tmp_path / "plain", *SHORT)
    odd = dcjax("train", recipe, "--run-dir", tmp_path / "odd", *SHORT, **SETTINGS)
    assert (plain.returncode, odd.returncode) == (0, 0), odd.stderr
    assert complaints(plain.stderr) == []
    pinned = sorted(line.split(" is ")[0] for line in complaints(odd.stderr))
    assert pinned == sorted(f"dcjax: {name}" for name in SETTINGS if name != "JAX_DEFAULT_PRNG_IMPL")
    assert without_times(tmp_path / "odd") == without_times(tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["evaluate", "probe", "export", "train"])
def test_a_run_is_opened_whatever_the_environment_sets(finished_run, tmp_path, command):
    arguments = {
        "export": ["convert", "export", finished_run, tmp_path / "out"],
        "probe": ["probe", finished_run, "--prompts", "4", "--out", tmp_path / "probe"],
    }.get(command, [command, finished_run])
    finished = dcjax(*arguments, **SETTINGS)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(
    ("command", "platform"), [("train", "cuda"), pytest.param("evaluate", "nonsense", marks=pytest.mark.slow)]
)
def test_a_platform_that_is_not_there_is_one_line(finished_run, command, platform):
    finished = dcjax(command, finished_run, JAX_PLATFORMS=platform)
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith("dcjax: error: no device could be used: ") and f"JAX_PLATFORMS is '{platform}'" in line


def test_keys_are_of_one_implementation_and_others_are_refused():
    assert str(jax.random.key_impl(make_key(3))) == IMPLEMENTATION
    raw = jax.random.key_data(make_key(3))
    assert (jax.random.key_data(as_key(raw)) == raw).all()
    require_key(make_key(3))
    with pytest.raises(ValueError, match=r"the key is of rbg; make it by dcjax\.keys\.make_key\(seed\)"):
        require_key(jax.random.key(3, impl="rbg"))
