"""What one GPU does, in at most eight minutes: for a card that is lent, or rented by the minute.

    python benchmarks/gpu.py [--seconds N] [--json PATH] [--dry-run]

Each part is a process of its own, whose figures are written when it ends. A part that there is no time left for is left
out, and the same command goes on with what is missing or failed.

- train: forward and backward pass in bf16, tokens a second, and the share of the card's peak. Operations are six for
  each parameter that multiplies a token, and attention's under a causal mask.
- decode: tokens a second, and the share of the memory's bandwidth, as `serving.py decode` measures them.
- ragged: the same by `model.attention=ragged`, which reads only what is filled, once it was seen to agree with
  attention on the whole cache. Where it is faster, choose it.
- quickstart: `dcjax train quickstart`, its accuracies before and after, and its seconds.
- mismatch: `dcjax probe` on that run, on the card and on the CPU: the gap of every format.

The nearest published figure is of prime-rl: 11,900 tokens a second in the trainer of Qwen3-0.6B at 16k, on one H100.
With --dry-run, everything is tiny, for a machine without a card; there the ragged kernel is interpreted and compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import serving  # pyrefly: ignore[missing-import]
from timing import environment  # pyrefly: ignore[missing-import]

from dcjax.models import ModelConfig, cache, count_params, init_params, presets, token_logps
from dcjax.models.config import Precision
from dcjax.models.ragged_gpu import ragged_attention
from dcjax.reporting.progress import Progress
from dcjax.serving.formats import Format, FormatName, cache_dtype, serving_format

RESULTS = Path(__file__).parent / "results" / "gpu.json"
PEAK, BANDWIDTH = 989.0, 4800.0
"""TFLOP/s in bf16 and GB/s of an H200."""
FORMATS: tuple[FormatName, ...] = ("bf16", "int8", "fp8")


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is computed, on a card or in a dry run."""

    presets: tuple[str, ...] = ("qwen3-0.6b", "qwen3-8b")
    # tokens of the sequences that train, one at a time
    length: int = 16_384
    batches: tuple[int, ...] = (32, 256)
    # tokens that a slot holds
    capacity: int = 2048
    rounds: int = 5
    # of the quickstart and the probe
    arguments: tuple[str, ...] = ()
    prompts: int = 128


DRY = Scale(
    presets=("tiny",),
    length=64,
    batches=(2,),
    capacity=32,
    rounds=1,
    arguments=("--steps", "1", "--warm_start.steps", "2", "--evaluation.prompts", "8", "--rollout.prompts", "4"),
    prompts=2,
)


def train(preset: str, scale: Scale) -> dict[str, Any]:
    """The gradient of a sequence's log-probs."""
    precision = Precision(parameters="bf16", compute="bf16", head="bf16")
    config = dataclasses.replace(presets[preset], precision=precision, remat="full", head_chunk=1024)
    params = jax.jit(partial(init_params, config))(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, scale.length + 1)).astype(np.int32)

    def loss(params):
        return -jnp.sum(
            token_logps(config, params, tokens, response_length=scale.length, temperature=jnp.ones(1)).logps
        )

    seconds = serving.seconds_of(partial(jax.jit(jax.grad(loss)), params), scale.rounds)
    achieved = operations(config, scale.length) / seconds / 1e12
    return {
        "tokens_per_second": scale.length / seconds,
        "tflops": achieved,
        "share_of_peak": achieved / PEAK,
    } | device()


def operations(config: ModelConfig, length: int) -> float:
    """Of the forward and backward pass of one sequence, without what is computed again."""
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    attention = config.num_layers * config.num_heads * config.head_dim * length
    return 6.0 * length * (count_params(config) - looked_up + attention)


def decode(config: ModelConfig, format: FormatName, scale: Scale) -> dict[str, Any]:
    """By batch: every slot half full."""
    figures = {}
    for batch in scale.batches:
        engine = serving.make_engine(config, format, batch, scale.capacity // 2, scale.capacity // 2, 8)
        tokens, read = serving.decode_rate(engine, serving.random_params(engine), scale.rounds)
        figures[str(batch)] = {"tokens_per_second": tokens, "share_of_bandwidth": read / 1e9 / BANDWIDTH}
    return figures | device()


def ragged(preset: str, format: FormatName, scale: Scale) -> dict[str, Any]:
    """Decoding by the ragged kernel, once it was compared; without a card it is only compared.

    Raises:
      ValueError: it differs by more than two roundings to bf16, of results and of weights near 1.
    """
    config, bound = dataclasses.replace(presets[preset], attention="ragged"), 2 * 2.0**-8
    error = largest_difference(config, serving_format(format), scale.capacity)
    if not error <= bound:
        raise ValueError(f"ragged attention differs by {error:.2g} of 1 + |expected|; it must be at most {bound:.2g}")
    found = device() if jax.default_backend() == "cpu" else decode(config, format, scale)
    return {"largest_difference": error} | found


def largest_difference(config: ModelConfig, format: Format, capacity: int) -> float:
    """Between ragged attention and attention on the whole cache, in units of 1 + |expected|, at lengths up to all."""
    rng, slots = np.random.default_rng(0), 8

    def drawn(tokens: int, heads: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=(slots, tokens, heads, config.head_dim)), format.activations)

    k, v = (drawn(capacity, config.num_kv_heads) for _ in range(2))
    places = np.tile(np.arange(capacity, dtype=np.int32), (slots, 1))
    held = cache.write(cache.init_cache(config, slots, capacity, cache_dtype(format, "auto")), k, v, places)
    q, last = drawn(1, config.num_heads), np.linspace(0, capacity - 1, slots).astype(np.int32)
    attend = jax.jit(partial(ragged_attention, interpret=jax.default_backend() == "cpu"))
    found = attend(q, held.k, held.v, last + 1, held.k_scale, held.v_scale)
    expected = jax.jit(cache.attend)(held, q, last[:, None])
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    return float(np.max(np.abs(found - expected) / (1 + np.abs(expected))))


def device() -> dict[str, str]:
    """What JAX computed on. A process that asks takes most of a GPU's memory, so that no other part should."""
    return {"device": jax.devices()[0].device_kind}


def dcjax(*arguments: str, platform: str | None = None) -> str:
    """What a command of dcjax prints."""
    chosen = {} if platform is None else {"JAX_PLATFORMS": platform}
    command = [sys.executable, "-m", "dcjax", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | chosen).stdout


def quickstart(run: Path, scale: Scale) -> dict[str, float]:
    """From an empty run directory."""
    shutil.rmtree(run, ignore_errors=True)
    started = time.perf_counter()
    dcjax("train", "quickstart", "--run-dir", str(run), *scale.arguments)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [record["eval/deployed_accuracy"] for record in records if "eval/deployed_accuracy" in record]
    return {"seconds": time.perf_counter() - started, "before": evaluated[0], "after": evaluated[-1]}


def mismatch(run: Path, scale: Scale) -> dict[str, Any]:
    """Of every format, on the default platform and on the CPU."""

    def probed(name: str, platform: str | None) -> Any:
        asked = ("probe", str(run), "--prompts", str(scale.prompts), "--json", "--out", str(run / f"probe-{name}"))
        return json.loads(dcjax(*asked, platform=platform))["formats"]

    return {"here": probed("here", None), "cpu": probed("cpu", "cpu")}


def parts(scale: Scale, run: Path) -> dict[str, tuple[float, Callable[[], Any]]]:
    """By name: seconds that a part needs at most on an H200, by estimate, and what computes its figures."""
    found: dict[str, tuple[float, Callable[[], Any]]] = {}
    for preset in scale.presets:
        found[f"train {preset}"] = 60, partial(train, preset, scale)
        for name in FORMATS:
            found[f"decode {preset} {name}"] = 40, partial(decode, presets[preset], name, scale)
    # in a process of its own each, as a kernel that fails takes the card's other work with it
    found |= {
        f"ragged {scale.presets[0]} {name}": (40, partial(ragged, scale.presets[0], name, scale)) for name in FORMATS
    }
    found["quickstart"] = 120, partial(quickstart, run, scale)
    found["mismatch"] = 120, partial(mismatch, run, scale)
    return found


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="that all parts may take (default: 480)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where figures go, and which ones there are")
    parser.add_argument("--dry-run", action="store_true", help="tiny models, to see that everything runs")
    parser.add_argument("--only", metavar="PART", help="compute this part here, and print its figures")
    return parser.parse_args()


def main() -> None:
    """Runs the parts that are missing, each in a process of its own."""
    args, started = parse(), time.monotonic()
    run = args.json.with_suffix("") / "quickstart"
    planned = parts(DRY if args.dry_run else Scale(), run)
    if args.only:
        print(json.dumps(planned[args.only][1]()))
        return
    report = json.loads(args.json.read_text()) if args.json.exists() else {"dry_run": args.dry_run, "parts": {}}
    if report["dry_run"] != args.dry_run:
        raise SystemExit(f"{args.json} is of {'a dry run' if report['dry_run'] else 'a card'}; name another file")
    missing = [name for name in planned if "error" in report["parts"].get(name, {"error": None})]
    with Progress(len(missing), initial=0, description="gpu") as progress:
        for count, name in enumerate(missing, 1):
            left = args.seconds - (time.monotonic() - started)
            if left < planned[name][0]:
                print(f"{name} is left out: {left:.0f} s are left, and it may take {planned[name][0]:.0f}")
                continue
            report["parts"][name] = of_part(name, args, left)
            write(args.json, report)
            print(f"{name}: {json.dumps(report['parts'][name])}")
            progress.update(count)


def of_part(name: str, args: argparse.Namespace, seconds: float) -> Any:
    """A part's figures, or what kept it from having any. One that takes too long is ended with all that it started."""
    command = [sys.executable, __file__, "--only", name, "--json", str(args.json), *["--dry-run"] * args.dry_run]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        told, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return {"error": f"it was ended after {seconds:.0f} s"}
    return json.loads(told.splitlines()[-1]) if process.returncode == 0 else {"error": f"exit {process.returncode}"}


def write(path: Path, report: dict[str, Any]) -> None:
    """The figures so far, with the versions."""
    about = environment(argparse.Namespace(cores=0, rounds=0))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report | about, indent=2) + "\n")


if __name__ == "__main__":
    main()
