"""The gap of every format on the model, as the benchmark that writes the README's table measures it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import fake_devices

from dcjax.serving.formats import formats

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "smollm2.py"
