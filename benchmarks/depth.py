"""Layers of the serving path, unrolled against looped over: what compiling costs, and what a step costs.

    python benchmarks/depth.py [--layers 2 8 30 36] [--formats float32 bf16 int8 ...] [--experts 8] [--json PATH]

Random weights of SmolLM2-135M's widths, its vocabulary too, on one core; CPU-seconds, the best of ROUNDS for a step.
`Qwen3Engine` chooses by these figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from timing import environment, pin  # pyrefly: ignore[missing-import]

from dcjax.models import ModelConfig, init_params
from dcjax.models.cache import stack_layers
from dcjax.serving.decoder import NO_EXCESS_PRECISION, Decoder
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.formats import formats
from dcjax.serving.sync import ServingParams, make_sync

WIDTHS = ModelConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3, head_dim=64, num_layers=30
)
PROMPT, RESPONSE, SLOTS, STEPS, ROUNDS = 16, 48, 8, 16, 4


def cpu_seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """What a call took of the processor, and gave."""
    started = time.process_time()
    given = jax.block_until_ready(call())
    return time.process_time() - started, given


def measure(decoder: Decoder, params: ServingParams) -> dict[str, float]:
    """Seconds to compile decode and prefill, and to decode one token in every slot and to prefill every slot."""
    state = jax.jit(Decoder.empty, static_argnums=(0, 1))(decoder, SLOTS)
    state = dataclasses.replace(state, active=np.ones(SLOTS, bool), positions=np.full(SLOTS, PROMPT, np.int32))
    prompts, lengths = np.zeros((SLOTS, PROMPT), np.int32), np.full(SLOTS, PROMPT, np.int32)
    programs = {
        "decode": (lambda params, state: decoder.steps(params, state, STEPS), (params, state), STEPS),
        "prefill": (decoder.prefill, (params, prompts, lengths), 1),
    }
    found = {}
    for name, (function, inputs, count) in programs.items():
        lowered = jax.jit(function, compiler_options=NO_EXCESS_PRECISION).lower(*inputs)
        found[f"compile_{name}"], program = cpu_seconds(lowered.compile)
        found[name] = min(cpu_seconds(lambda p=program, i=inputs: p(*i))[0] for _ in range(ROUNDS)) / count
    return found


def main() -> None:
    """Runs each comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 30, 36], help="depths (default: 2 30 36)")
    parser.add_argument("--formats", nargs="+", choices=formats, default=["float32", "bf16", "int8"])
    parser.add_argument("--experts", type=int, default=0, help="of each layer, two for a token (default: none)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there too")
    parser.add_argument("--cores", type=int, default=1, help="cores to stay on (default: 1, the least noisy)")
    args = parser.parse_args()
    pin(args.cores)
    jax.config.update("jax_enable_compilation_cache", False)
    experts: dict[str, Any] = {"num_experts": args.experts, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    rows = []
    print(
        f"{'layers':>6} {'format':<17} {'':<9} {'compile decode':>14} {'prefill':>8} {'step (ms)':>10} {'prefill':>8}"
    )
    for layers in args.layers:
        config = dataclasses.replace(WIDTHS, num_layers=layers, **experts if args.experts else {})
        for name in args.formats:
            sizes = {"slots": SLOTS, "max_prompt_length": PROMPT, "max_response_length": RESPONSE}
            engine = Qwen3Engine(config, format=name, end_tokens=[config.vocab_size], steps_per_call=STEPS, **sizes)
            masters = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
            unrolled = make_sync(config, engine.format)(masters, 0)
            looped = {**unrolled.weights, "layers": stack_layers(unrolled.weights["layers"])}
            for kind, params in {"unrolled": unrolled, "looped": ServingParams(looped, unrolled.version)}.items():
                found = measure(dataclasses.replace(engine.decoder, loops=kind == "looped"), params)
                rows.append({"layers": layers, "format": name, "kind": kind, **found})
                print(
                    f"{layers:6d} {name:<17} {kind:<9} {found['compile_decode']:14.1f} "
                    f"{found['compile_prefill']:8.1f} {found['decode'] * 1e3:10.1f} {found['prefill'] * 1e3:8.1f}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps({"environment": environment(args), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
