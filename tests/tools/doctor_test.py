"""`dcjax doctor`: what it finds is what is there, what is secret stays so, and wrong numbers are found."""

import importlib.util
import json
from importlib import metadata

import jax
import jax.numpy as jnp
import pytest

from dcjax.cli import main
from dcjax.tools import doctor

pytestmark = pytest.mark.heavy


@pytest.mark.slow
def test_it_fits_on_a_screen_and_says_the_same_as_json(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_onednn=false")
    assert main(["doctor"]) == 0
    screen = capsys.readouterr().out.splitlines()
    assert main(["doctor", "--json"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed)
    assert len(screen) <= 60 and max(map(len, screen)) <= 120
    assert "hf_0123" not in "\n".join(screen) + printed
    assert found["variables"]["HF_TOKEN"] == "set"
    assert found["variables"]["XLA_FLAGS"] == "--xla_cpu_use_onednn=false"
    for name, version in found["versions"].items():
        if name != "python":
            assert version == metadata.version(name)
    for name in ("jax", "flax", "optax", "google-jetstream"):
        assert f"{name} {found['versions'][name]}" in "\n".join(screen)
    assert len(found["devices"]) == jax.device_count() and found["devices"][0]["platform"] == "cpu"
    assert all(check["passed"] for check in found["numerics"]) and len(found["numerics"]) == 4
    # int8 is no float32
    assert found["numerics"][2]["value"] > 100 * found["numerics"][1]["value"] > 0


def test_products_of_fewer_bits_are_found_and_are_an_error(monkeypatch, capsys):
    dot = jnp.dot

    def rounded(left, right, precision):
        return dot(jnp.asarray(left, jnp.bfloat16), jnp.asarray(right, jnp.bfloat16)).astype(jnp.float32)

    monkeypatch.setattr(doctor.jnp, "dot", rounded)
    monkeypatch.setattr(doctor, "_policies", list)
    assert main(["doctor"]) == 2
    told = capsys.readouterr()
    assert "TOO LARGE" in told.out and "products are rounded to fewer bits" in told.out
    assert "numbers are wrong on this machine: float32 products" in told.err


def test_not_a_number_does_not_pass():
    assert not doctor.Check("any", float("nan"), 1.0, "").passed


def test_what_is_missing_or_out_of_range_says_what_would_do(monkeypatch):
    find, version = importlib.util.find_spec, metadata.version
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else find(name))
    assert doctor.features()["the policy over HTTP"] == "fastapi missing: pip install 'dcjax[serve]'"
    assert doctor.features()["GGUF files"] == "ready"

    def other(name):
        if name == "optax":
            raise metadata.PackageNotFoundError
        return {"flax": "0.1"}.get(name) or version(name)

    monkeypatch.setattr(doctor.metadata, "version", other)
    found = doctor.versions()
    assert found["optax"].startswith("missing: pip install 'optax") and found["flax"].startswith(
        "0.1, and dcjax needs "
    )
    assert found["jax"] == version("jax") and "fastapi" not in found


def test_values_of_variables_that_may_be_secret_are_not_shown():
    given = {
        "HF_HOME": "/x",
        "HF_TOKEN": "a",
        "JAX_SOME_KEY": "b",
        "https_proxy": "http://me:word@host",
        "HOME": "/root",
    }
    assert doctor.variables(given) == {"HF_HOME": "/x", "HF_TOKEN": "set", "JAX_SOME_KEY": "set", "https_proxy": "set"}
