"""What dcjax finds on a machine: versions, devices, variables, what is missing for which feature, and right numbers."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from packaging.requirements import Requirement

from dcjax.keys import make_key
from dcjax.models import ModelConfig, init_params, token_logps
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.rollout import sample_responses
from dcjax.sharding.mesh import memory_of
from dcjax.types import Rollout

FEATURES = {
    "TPUs": (("libtpu",), "tpu"),
    "NVIDIA GPUs": (("jax_cuda13_plugin",), "cuda"),
    "the policy over HTTP": (("fastapi", "uvicorn"), "serve"),
    "GGUF files": (("gguf",), "gguf"),
    "procedural tasks": (("reasoning_gym",), "tasks"),
}
"""What an extra of the package is for: the modules that it needs, and its name."""

VARIABLES = (
    "JAX_*",
    "XLA_*",
    "LIBTPU_INIT_ARGS",
    "TPU_*",
    "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
    "XDG_CACHE_HOME",
    "TMPDIR",
    "HF_*",
    "OMP_NUM_THREADS",
    "PYTHONHASHSEED",
    "SLURM_JOB_ID",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "http_proxy",
    "https_proxy",
)
"""Environment variables that change what a run does, how fast, or where it looks; `*` stands for any end."""

SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD|proxy")
"""Names of variables whose values are not shown."""

ROUNDING = 2.0**-24
"""Of float32, relative."""

WIDTH = 512
"""Of the product that is checked."""


@dataclass(frozen=True)
class Check:
    """A number that must not be larger than its bound."""

    name: str
    value: float
    bound: float
    # what to do where it is
    advice: str

    @property
    def passed(self) -> bool:
        """Whether it is not; NaN is."""
        return self.value <= self.bound


def examine() -> dict[str, Any]:
    """What is here, as JSON could hold it; `check_numerics` is apart, since it takes seconds."""
    return {
        "versions": versions(),
        "machine": machine(),
        "devices": [_device(device) for device in jax.devices()],
        "variables": variables(os.environ),
        "features": features(),
        "advice": advice(),
    }


def versions() -> dict[str, str]:
    """Of dcjax, Python and each package that dcjax needs; one that is missing or out of range says what would do."""
    found = {"dcjax": metadata.version("dcjax"), "python": platform.python_version()}
    for line in metadata.requires("dcjax") or ():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            found[needed.name] = f"missing: pip install '{needed.name}{needed.specifier}'"
            continue
        fits = needed.specifier.contains(version, prereleases=True)
        found[needed.name] = version if fits else f"{version}, and dcjax needs {needed.specifier}"
    return found


def machine() -> dict[str, Any]:
    """Its system, cores and memory (GiB)."""
    pages = os.sysconf("SC_PAGE_SIZE") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 0
    return {
        "system": platform.platform(),
        "cores": cores,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * pages, 1),
        "free_gib": round(free * pages, 1),
        "free_disk_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
    }


def _device(device: jax.Device) -> dict[str, Any]:
    return {
        "id": device.id,
        "platform": device.platform,
        "kind": device.device_kind,
        "process": device.process_index,
        "memory_gib": round(memory_of(device) / 2**30, 1) if device.process_index == jax.process_index() else None,
    }


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of `VARIABLES` that are set; of what may be secret only that it is."""
    patterns = [re.compile(name.replace("*", ".*")) for name in VARIABLES]
    return {
        name: "set" if SECRET.search(name) else value
        for name, value in sorted(environment.items())
        if any(pattern.fullmatch(name) for pattern in patterns)
    }


def features() -> dict[str, str]:
    """For each feature "ready", or how to get it."""
    found = {}
    for feature, (modules, extra) in FEATURES.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        found[feature] = f"{', '.join(missing)} missing: pip install 'dcjax[{extra}]'" if missing else "ready"
    return found


def advice() -> list[str]:
    """What is probably not meant."""
    platforms = {device.platform for device in jax.devices()}
    told = []
    if shutil.which("nvidia-smi") and "gpu" not in platforms:
        told.append(
            "there is an NVIDIA driver, and JAX uses no GPU; pip install 'dcjax[cuda]', or look at JAX_PLATFORMS"
        )
    if any(Path("/dev").glob("accel*")) and "tpu" not in platforms:
        told.append("there are TPU chips, and JAX uses none; pip install 'dcjax[tpu]', or look at JAX_PLATFORMS")
    if importlib.util.find_spec("jetstream") is None:
        told.append("without google-jetstream nothing samples; pip install 'google-jetstream==0.2.2'")
    return told


# --- numerics ---


def check_numerics() -> list[Check]:
    """Products, samples and log-probs on the first device, against NumPy and against each other."""
    return [_products(), *_policies()]


def _products() -> Check:
    """A float32 product against NumPy's in float64, in roundings of the sum of absolute values."""
    left, right = np.random.default_rng(0).standard_normal((2, WIDTH, WIDTH), np.float32)
    product = jnp.dot(left, right, precision="highest")
    exact = left.astype(np.float64) @ right.astype(np.float64)
    scale = np.abs(left).astype(np.float64) @ np.abs(right).astype(np.float64)
    worst = float(np.max(np.abs(np.asarray(product, np.float64) - exact) / scale)) / ROUNDING
    return Check(
        "float32 products (roundings)",
        worst,
        float(np.sqrt(WIDTH)),
        "products are rounded to fewer bits than float32 has; update the driver, or look at XLA_FLAGS",
    )


def _policies() -> list[Check]:
    """A tiny model that samples, reads what it has sampled, and samples again."""
    config = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
    )
    params = jax.jit(init_params, static_argnums=0)(config, make_key(0))
    engines = {name: _engine(config, name) for name in ("float32", "int8")}

    def sample(name: str) -> Rollout:
        engine, prompts = engines[name], [[1, 2, 3], [4, 5]]
        served = engine.sync(params, 0)
        return sample_responses(engine, served, prompts, samples_per_prompt=8, temperature=1.0, key=make_key(1))

    def gap(rollout: Rollout) -> float:
        told = {"response_length": rollout.response_mask.shape[1], "temperature": rollout.temperature}
        scores = token_logps(config, params, rollout.tokens, rollout.attention_mask, **told)
        apart = np.abs(np.exp(np.asarray(scores.logps)) - np.exp(rollout.rollout_logps))
        return float(np.max(apart[rollout.response_mask]))

    exact, again, rounded = sample("float32"), sample("float32"), sample("int8")
    equal = all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(exact), jax.tree.leaves(again), strict=True))
    faulty = "the trainer and the sampler disagree where nothing is quantised; please report this"
    return [
        Check("|p_train − p_served| in float32, the largest", gap(exact), 1e-5, faulty),
        Check("the same in int8", gap(rounded), 0.05, "int8 is further off than it should be; please report this"),
        Check("samples of one key that differ", float(not equal), 0.0, "sampling is not reproducible here"),
    ]


def _engine(config: ModelConfig, format: str) -> Qwen3Engine:
    sizes = {"slots": 16, "max_prompt_length": 4, "max_response_length": 12, "steps_per_call": 4}
    return Qwen3Engine(config, format=format, end_tokens=[0], **sizes)


# --- what is shown ---


def lines_of(found: Mapping[str, Any], checks: list[Check]) -> list[str]:
    """One screen of text."""
    versions, machine = dict(found["versions"]), found["machine"]
    head = " ".join(f"{name} {versions.pop(name)}" for name in ("dcjax", "python"))
    lines = [head, f"{machine['system']}, {machine['cores']} cores", _memory(machine), ""]
    lines += [_device_line(device) for device in found["devices"]]
    lines += ["", *_columns([f"{name} {version}" for name, version in versions.items()])]
    lines += _section("variables", [f"{name}={value}" for name, value in found["variables"].items()])
    lines += _section("features", [f"{name}: {state}" for name, state in found["features"].items()])
    lines += _section("numerics", [_check_line(check) for check in checks])
    return lines + _section("to do", [*found["advice"], *(check.advice for check in checks if not check.passed)])


def _memory(machine: Mapping[str, Any]) -> str:
    return (
        f"memory {machine['memory_gib']} GiB, {machine['free_gib']} free; disk {machine['free_disk_gib']} GiB free here"
    )


def _device_line(device: Mapping[str, Any]) -> str:
    memory = "" if device["memory_gib"] is None else f", {device['memory_gib']} GiB"
    return f"device {device['id']}: {device['platform']}, {device['kind']}{memory}"


def _check_line(check: Check) -> str:
    verdict = "" if check.passed else "   TOO LARGE"
    return f"{check.name}: {check.value:.2g} (at most {check.bound:.2g}){verdict}"


def _section(title: str, lines: list[str]) -> list[str]:
    return ["", f"{title}:", *(f"  {line}" for line in lines)] if lines else []


def _columns(words: list[str], width: int = 36) -> list[str]:
    """Three in a line; what needs more room has a line of its own."""
    short, long = [word for word in words if len(word) < width], [word for word in words if len(word) >= width]
    rows = ["".join(word.ljust(width) for word in short[at : at + 3]).rstrip() for at in range(0, len(short), 3)]
    return rows + long
