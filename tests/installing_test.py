"""docs/installing.md leaves out of the lean installation what it says, and nothing else."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "installing.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_lean_installation_has_every_dependency_but_two():
    everything = set(PROJECT["dependencies"])
    block = PAGE[PAGE.index('pip install "jax') : PAGE.index("pip install --no-deps")]
    named = set(re.findall(r'"([^"]+)"', block))
    left_out = everything - named
    assert named < everything
    assert {re.split("[=><]", line)[0] for line in left_out} == {"google-jetstream", "tensorflow-datasets"}
    (jetstream,) = [line for line in left_out if line.startswith("google-jetstream")]
    assert f"pip install --no-deps {jetstream} dcjax" in PAGE


def test_every_extra_is_explained():
    named = {name for row in re.findall(r"^\| (`[^|]+) \|", PAGE, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == set(PROJECT["optional-dependencies"])
