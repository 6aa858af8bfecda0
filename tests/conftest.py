"""Every test runs on eight fake CPU devices, with shapes and dtypes of public functions checked at run time."""

import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# compiled programs are kept between runs, for the processes that tests start too
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / "dcjax-test-compilation-cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook(["dcjax.models", "dcjax.rl", "dcjax.serving", "dcjax.sharding", "dcjax.types"], "beartype.beartype")

settings.register_profile("dcjax", deadline=None)
settings.load_profile("dcjax")
