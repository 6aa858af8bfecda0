"""The engine alone: decode and prefill against what the hardware could do, and how a KV cache is laid out.

    python benchmarks/serving.py decode qwen3-0.6b --batches 1 32 256 --bandwidth 4800
    python benchmarks/serving.py prefill qwen3-0.6b --prompts 16 --length 1024 --peak 989
    python benchmarks/serving.py layout [--json PATH]
    python benchmarks/serving.py sync qwen3-8b --slice v5e:4x4 --tensor 8 --link 200

- decode: tokens a second with random weights in each format, every slot half full, and the share of BANDWIDTH (GB/s of
  the device) at which weights and keys and values were read.
- prefill: prompt tokens a second, and the share of PEAK (TFLOP/s of the device in bf16).
- layout: one layer's decode attention, written and read, on a contiguous cache, on one of pages behind a table, and on
  prompts' keys and values shared by the samples of a prompt; and what inserting a copy of a prompt costs instead.
- sync: from masters split over a TPU slice (fsdp) to serving params split over `tensor` of its chips, compiled for the
  slice (with libtpu, on any Linux): memory, what a chip receives in collectives, and how long that takes at LINK (GB/s
  that a chip's links carry together; a v5e's: 200).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import environment, measure, pin, ratio, row, table  # pyrefly: ignore[missing-import]

from dcjax.allocator import keep_freed_memory
from dcjax.models import ModelConfig, abstract_params, init_params, logical_axes, presets
from dcjax.models.cache import LayerCache, attend, init_cache, write
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.formats import FormatName, formats, serving_format
from dcjax.serving.parallel import serving_mesh
from dcjax.serving.sync import ServingParams, make_sync
from dcjax.sharding.mesh import MeshConfig, make_mesh
from dcjax.sharding.rules import shardings
from dcjax.sharding.topology import slice_devices

PROMPT, PAGE, GROUP_SIZE = 512, 128, 8
"""Tokens of a prompt and of a page, and samples of a prompt, in the comparison of layouts."""


def seconds_of(call: Callable[[], Any], rounds: int) -> float:
    """Median wall time, after one call that compiles."""
    jax.block_until_ready(call())
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


# --- decode and prefill ---


def make_engine(config: ModelConfig, format: FormatName, slots: int, prompt: int, response: int, steps: int):
    """An engine none of whose samples ends early."""
    return Qwen3Engine(
        config,
        format=format,
        slots=slots,
        max_prompt_length=prompt,
        max_response_length=response,
        end_tokens=[config.vocab_size],
        steps_per_call=steps,
    )


def random_params(engine: Qwen3Engine) -> ServingParams:
    """Of random masters, which are never kept."""
    return jax.jit(lambda key: engine.sync(init_params(engine.config, key), 0))(jax.random.key(0))


def bytes_of(tree) -> int:
    """Of all leaves."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def decode_rate(engine: Qwen3Engine, params: ServingParams, rounds: int) -> tuple[float, float]:
    """Tokens and bytes a second: each step reads all weights that are multiplied with, and of the cache, which is half
    full, the whole by XLA, or what is filled."""
    state, steps = engine.init_decode_state(), engine.steps_per_call
    half = jnp.full(engine.slots, engine.decoder.capacity // 2, jnp.int32)
    requests = jax.tree.map(jnp.asarray, engine.make_requests(np.zeros((engine.slots, 2))))
    holder = [dataclasses.replace(state, positions=half, active=half > 0, requests=requests)]
    cache = bytes_of(state.caches) // (1 if engine.decoder.attention == "xla" else 2)

    def call():
        # the same place again: the state is donated, and its positions must not run out
        holder[0], result = engine.generate(params, dataclasses.replace(holder[0], positions=half + 0))
        return result.data

    step = seconds_of(call, rounds) / steps
    weights = params.weights
    read = bytes_of(weights) - (0 if engine.config.tie_embeddings else bytes_of(weights["embed_tokens"]))
    return engine.slots / step, (read + cache) / step


def decode(args: argparse.Namespace) -> list[str]:
    """A line for each format and batch."""
    lines = []
    for format in args.formats:
        for batch in args.batches:
            engine = make_engine(presets[args.preset], format, batch, args.length // 2, args.length // 2, args.steps)
            tokens, read = decode_rate(engine, random_params(engine), args.rounds)
            share = f", {read / 1e9 / args.bandwidth:.1%} of {args.bandwidth:g} GB/s" if args.bandwidth else ""
            lines.append(f"{format:18s} batch {batch:4d}: {tokens:10,.0f} tokens/s, {read / 1e9:8.1f} GB/s read{share}")
    return lines


def prefill(args: argparse.Namespace) -> list[str]:
    """A line for each format."""
    lines, config = [], presets[args.preset]
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (args.prompts, args.length)).tolist()
    # two operations a weight that meets a token; the head meets none
    attention = config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    mlp = 3 * config.hidden_size * config.intermediate_size
    operations = 2 * args.prompts * args.length * config.num_layers * (attention + mlp)
    for format in args.formats:
        engine = make_engine(config, format, 1, args.length, 1, 1)
        taken = seconds_of(partial(engine.prefill_many, random_params(engine), prompts), args.rounds)
        share = f", {operations / taken / 1e12 / args.peak:.1%} of {args.peak:g} TFLOP/s" if args.peak else ""
        lines.append(f"{format:18s} {args.prompts * args.length / taken:10,.0f} prompt tokens/s{share}")
    return lines


# --- layout ---


def _inputs(config: ModelConfig, slots: int, capacity: int):
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    q, k, v = (
        jax.random.normal(key, (slots, 1, n, config.head_dim), jnp.bfloat16) for key, n in zip(keys, heads, strict=True)
    )
    positions = jnp.linspace(PROMPT, capacity - 1, slots).astype(jnp.int32)[:, None]
    return q, k, v, positions


def contiguous_step(cache: LayerCache, q, k, v, positions):
    """As the engine does it."""
    cache = write(cache, k, v, positions)
    return cache, attend(cache, q, positions)


def paged_step(pages: LayerCache, pages_of, q, k, v, positions):
    """Pages [N, K, PAGE, D] anywhere, read through a table [slots, pages of a slot]."""
    page = jnp.take_along_axis(pages_of, positions // PAGE, axis=1)
    at = (page, slice(None), positions % PAGE)
    pages = dataclasses.replace(pages, k=pages.k.at[at].set(k), v=pages.v.at[at].set(v))

    def gathered(held):
        slots, count = pages_of.shape
        return jnp.moveaxis(held[pages_of], 2, 1).reshape(slots, held.shape[1], count * PAGE, -1)

    whole = dataclasses.replace(pages, k=gathered(pages.k), v=gathered(pages.v))
    return pages, attend(whole, q, positions)


def shared_step(prefix: LayerCache, cache: LayerCache, rows, q, k, v, positions):
    """Prompts' keys and values are read where they are, one copy for GROUP_SIZE slots; responses are contiguous."""
    cache = write(cache, k, v, positions - PROMPT)

    def joined(shared, own):
        return jnp.concatenate([shared[rows], own], axis=2)

    whole = dataclasses.replace(cache, k=joined(prefix.k, cache.k), v=joined(prefix.v, cache.v))
    return cache, attend(whole, q, positions)


def insert(cache: LayerCache, prefix: LayerCache, slot: int):
    """Copies one prompt into a slot."""
    return jax.tree.map(lambda held, new: jax.lax.dynamic_update_slice(held, new[:1], (slot, 0, 0, 0)), cache, prefix)


def compare_layouts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """CPU- or device-milliseconds of one layer's step."""
    config, slots, capacity = presets[args.preset], args.slots, args.length
    q, k, v, positions = _inputs(config, slots, capacity)
    bf16, pages = jnp.dtype(jnp.bfloat16), capacity // PAGE
    shuffled = np.random.default_rng(0).permutation(slots * pages).reshape(slots, pages)
    held = {
        "contiguous": (jax.jit(contiguous_step, donate_argnums=0), init_cache(config, slots, capacity, bf16), ()),
        "pages": (
            jax.jit(paged_step, donate_argnums=0),
            init_cache(config, slots * pages, PAGE, bf16),
            (jnp.asarray(shuffled),),
        ),
        "shared prompts": (
            jax.jit(lambda cache, prefix, rows, *new: shared_step(prefix, cache, rows, *new), donate_argnums=0),
            init_cache(config, slots, capacity - PROMPT, bf16),
            (init_cache(config, -(-slots // GROUP_SIZE), PROMPT, bf16), jnp.arange(slots) // GROUP_SIZE),
        ),
    }
    caches = {name: cache for name, (_, cache, _) in held.items()}

    def step(name: str, _number: int):
        program, _, extra = held[name]
        caches[name], out = program(caches[name], *extra, q, k, v, positions)
        return out

    inserted, prefix = [init_cache(config, slots, capacity, bf16)], init_cache(config, 1, PROMPT, bf16)
    copy = jax.jit(insert, donate_argnums=0)

    def insert_one(number: int) -> None:
        # waited for here, as the next call donates it
        inserted[0] = jax.block_until_ready(copy(inserted[0], prefix, number % slots))

    programs = {name: partial(step, name) for name in held} | {"insert one prompt": insert_one}
    timed = measure("layout", programs, args.rounds)
    cpu = {name: of.cpu * 1e3 for name, of in timed.items()}
    rows = [row("contiguous", cpu["contiguous"], np.min)]
    rows += [
        row(name, cpu[name], np.min, ratio(cpu[name], cpu["contiguous"], "contiguous"))
        for name in ("pages", "shared prompts", "insert one prompt")
    ]
    notes = [f"{slots} slots of {capacity} tokens, prompts of {PROMPT}, pages of {PAGE}, a layer of {args.preset}"]
    return [{"title": "layout of the KV cache", "unit": "CPU-ms", "rows": rows, "notes": notes}]


# --- sync ---

COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


def received(program: str) -> dict[str, int]:
    """Bytes that a chip has from each kind of collective; no loop repeats any of them."""
    found: dict[str, int] = {}
    for result, kind in re.findall(rf"= (\(.*?\)|\S+) ({COLLECTIVES})(?:-start)?\(", program):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
        size = sum(BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in arrays)
        found[kind] = found.get(kind, 0) + size
    return found


def sync(args: argparse.Namespace) -> list[str]:
    """A line for each format."""
    config, chips = presets[args.preset], slice_devices(args.slice)
    training = make_mesh(MeshConfig(fsdp=len(chips)), chips)
    serving = serving_mesh(training, args.tensor)
    masters = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract_params(config),
        shardings(training, logical_axes(config)),
    )
    lines = []
    for format in map(serving_format, args.formats):
        sync: Any = make_sync(config, format, serving, training)
        outer, layers = ({name: leaf for name, leaf in masters.items() if name != "layers"}), masters["layers"]
        # each program with how often it runs
        programs = [(sync.outer.lower(outer, 0).compile(), 1)]
        programs += [(run.lower(layers, 0, 0, 0).compile(), sync.kinds.count(kind)) for kind, run in sync.layer.items()]
        moved: Counter[str] = Counter()
        served, temporary = 0, 0
        for program, times in programs:
            memory: Any = program.memory_analysis()
            served += times * memory.output_size_in_bytes
            temporary = max(temporary, memory.temp_size_in_bytes)
            moved.update({kind: times * size for kind, size in received(program.as_text()).items()})
        lines.append(
            f"{format.name}: served {served / 2**30:.2f} GiB a chip, temporaries {temporary / 2**30:.2f} GiB at most; "
            f"received {moved.total() / 2**30:.2f} GiB ("
            + ", ".join(f"{kind} {size / 2**30:.2f}" for kind, size in moved.items())
            + f"): at least {moved.total() / args.link / 1e6:.1f} ms at {args.link:g} GB/s"
        )
    return lines


# --- command line ---


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    served = ["bf16", "int8", "fp8"]

    def command(name: str, help: str, length: int) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help)
        added.add_argument("preset", nargs="?", default="qwen3-0.6b", choices=sorted(presets))
        added.add_argument("--length", type=int, default=length, help=f"tokens of a sequence (default: {length})")
        added.add_argument("--rounds", type=int, default=10, help="calls that are timed (default: 10)")
        return added

    decoding = command("decode", "tokens a second", 2048)
    decoding.add_argument("--formats", nargs="+", choices=formats, default=served)
    decoding.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256], help="slots (default: 1 32 256)")
    decoding.add_argument("--steps", type=int, default=16, help="tokens in each slot a call (default: 16)")
    decoding.add_argument("--bandwidth", type=float, help="GB/s of the device's memory (an H200's: 4800)")
    prompts = command("prefill", "prompt tokens a second", 1024)
    prompts.add_argument("--formats", nargs="+", choices=formats, default=served)
    prompts.add_argument("--prompts", type=int, default=16, help="prompts at once (default: 16)")
    prompts.add_argument("--peak", type=float, help="TFLOP/s of the device in bf16 (an H200's: 989)")
    layouts = command("layout", "contiguous, paged or shared", 2048)
    layouts.add_argument("--slots", type=int, default=16, help="sequences at once (default: 16)")
    layouts.add_argument("--json", type=Path, metavar="PATH", help="write the figures there too")
    layouts.add_argument("--cores", type=int, default=1, help="cores to stay on (default: 1, the least noisy)")
    syncing = commands.add_parser("sync", help="what it moves on a TPU slice")
    syncing.add_argument("preset", nargs="?", default="qwen3-8b", choices=sorted(presets))
    syncing.add_argument("--formats", nargs="+", choices=formats, default=["bf16", "int8"])
    syncing.add_argument("--slice", default="v5e:4x4", help="its kind and shape (default: v5e:4x4)")
    syncing.add_argument("--tensor", type=int, default=8, help="chips that share a serving copy (default: 8)")
    syncing.add_argument("--link", type=float, default=200, help="GB/s into a chip (default: 200, a v5e's)")
    return parser.parse_args()


def main() -> None:
    """Runs one of the four and prints it."""
    args = parse()
    keep_freed_memory()
    if args.what != "layout":
        where = args.slice if args.what == "sync" else jax.devices()[0].device_kind
        print(f"{args.preset} on {where}")
        print("\n".join({"decode": decode, "prefill": prefill, "sync": sync}[args.what](args)))
        return
    pin(args.cores)
    comparisons = compare_layouts(args)
    print(table(comparisons))
    if args.json:
        args.json.write_text(
            json.dumps({"environment": environment(args), "comparisons": comparisons}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
