"""The model alone: its speed against plain JAX and PyTorch, what it costs to compile, and the memory of log-probs.

    python benchmarks/models.py speed [--torch PYTHON] [--json PATH]
    python benchmarks/models.py compile
    python benchmarks/models.py memory
    python benchmarks/models.py full-size qwen3-0.6b --batch 8 --length 2048 --peak 989

- speed: forward (logits of every column) and forward + backward (gradients of the mean log-likelihood) in float32, in
  CPU-milliseconds, of `tiny` and of a model of four layers of width 128. PYTHON is an interpreter with torch and
  transformers; Hugging Face's model then runs the same weights, exported by dcjax, in a process of its own, in turns.
- compile: seconds to compile, and instructions of the program, at 4 and at 36 layers.
- memory: temporaries of the gradient of token log-probs over 4096 columns of 151,936 logits, as XLA plans them.
- full-size: tokens a second of forward + backward in bf16, with random weights, on whatever accelerator there is, and
  its share of PEAK (TFLOP/s of the device in bf16).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import plain_jax  # pyrefly: ignore[missing-import]  (beside this file)
from timing import Elsewhere, environment, measure, pin, ratio, row, table  # pyrefly: ignore[missing-import]

from dcjax.allocator import keep_freed_memory
from dcjax.models import ModelConfig, Precision, abstract_params, forward, init_params, presets, save_hf, token_logps

SHAPES = {"tiny": (presets["tiny"], 16, 61)}
"""Model, rows and columns of each comparison of speed."""
SHAPES["4 layers, d 128"] = (
    ModelConfig(vocab_size=512, hidden_size=128, intermediate_size=384, num_layers=4, head_dim=32),
    8,
    128,
)
LARGEST_DIFFERENCE = 1e-4
"""Between the losses of all sides."""


# --- speed ---


class Peer:
    """Hugging Face's model in another interpreter: `call("forward")` and `call("update")` time themselves there."""

    def __init__(self, python: str, config: ModelConfig, params, tokens: np.ndarray, cores: int, folder: Path):
        save_hf(folder / "model", config, params)
        np.save(folder / "tokens.npy", tokens)
        script = Path(__file__).with_name("torch_peer.py")
        command = [python, str(script), str(folder / "model"), str(folder / "tokens.npy"), str(cores)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._asked, self._answers = self._process.stdin, self._process.stdout
        self.loss = float("nan")

    def call(self, what: str, number: int) -> Elsewhere:
        """One run; its loss is kept."""
        del number
        print(what, file=self._asked, flush=True)
        if not (line := self._answers.readline()):
            raise SystemExit(f"the PyTorch process ended with status {self._process.wait()}; see what it printed above")
        answer = json.loads(line)
        self.loss = answer["loss"]
        return Elsewhere(answer["cpu"], answer["wall"])

    def close(self) -> None:
        """Ends the process."""
        self._asked.close()
        self._process.wait(timeout=60)


def dcjax_loss(config: ModelConfig, params, tokens):
    """Mean negative log-likelihood of every token but the first."""
    ones = jnp.ones(len(tokens), jnp.float32)
    return -jnp.mean(token_logps(config, params, tokens, response_length=tokens.shape[1] - 1, temperature=ones).logps)


def plain_forward(config: ModelConfig, params, tokens):
    """Logits, by hand."""
    mask = jnp.ones(tokens.shape, bool)
    return plain_jax.logits(config, params, plain_jax.hidden_states(config, params, tokens, mask, 0, False))


def plain_loss(config: ModelConfig, params, tokens):
    """The same loss, by hand."""
    logits = plain_forward(config, params, tokens[:, :-1])
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


def compare_speed(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """CPU-milliseconds of forward and of forward + backward, a table each."""
    config, rows, columns = SHAPES[name]
    params = jax.jit(partial(init_params, config))(jax.random.key(0))
    plain = plain_jax.unstack(config, params)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, columns)).astype(np.int32)
    programs: dict[str, tuple[Callable, Callable, Any]] = {
        "dcjax": (forward, dcjax_loss, params),
        "plain JAX": (plain_forward, plain_loss, plain),
    }
    ours = {
        side: (
            _bound(jax.jit(partial(run, config)), weights, tokens),
            _bound(jax.jit(jax.value_and_grad(partial(loss, config))), weights, tokens),
        )
        for side, (run, loss, weights) in programs.items()
    }
    losses = {side: float(update(0)[0]) for side, (_, update) in ours.items()}
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(args.torch, config, params, tokens, args.cores, Path(folder)) if args.torch else None
        if peer is not None:
            ours["PyTorch"] = (partial(peer.call, "forward"), partial(peer.call, "update"))
            peer.call("update", 0)
            losses["PyTorch"] = peer.loss
        if (spread := max(losses.values()) - min(losses.values())) > LARGEST_DIFFERENCE:
            raise SystemExit(f"{name}: losses differ by {spread:.1e}, more than {LARGEST_DIFFERENCE}: {losses}")
        tables = [
            _speed_table(f"{name}, {kind}", {side: both[number] for side, both in ours.items()}, args.rounds, spread)
            for number, kind in enumerate(("forward", "forward + backward"))
        ]
        if peer is not None:
            peer.close()
    return tables


def _bound(program: Callable, weights, tokens: np.ndarray) -> Callable[[int], Any]:
    return lambda number: program(weights, tokens)


def _speed_table(title: str, programs: dict[str, Callable], rounds: int, spread: float) -> dict[str, Any]:
    cpu = {side: of.cpu * 1e3 for side, of in measure(title, programs, rounds).items()}
    goals = {"plain JAX": "<= 1.1", "PyTorch": "< 1"}
    rows = [row(side, values, np.min) for side, values in cpu.items() if side != "dcjax"]
    rows.append(
        row("dcjax", cpu["dcjax"], np.min, *(ratio(cpu["dcjax"], cpu[s], s, goals[s]) for s in cpu if s in goals))
    )
    return {"title": title, "unit": "CPU-ms", "rows": rows, "notes": [f"losses agree to {spread:.1e}"]}


# --- compile ---


def compile_cost() -> list[str]:
    """Seconds to lower and compile, and instructions, of forward and forward + backward at two depths."""
    lines = [f"{'':22s}{'layers':>8s}{'compile s':>11s}{'instructions':>14s}"]
    for kind in ("forward", "forward + backward"):
        figures = {layers: _compile(kind, layers) for layers in (4, 36)}
        lines += [f"{kind:22s}{layers:8d}{figure[0]:11.2f}{figure[1]:14d}" for layers, figure in figures.items()]
        seconds, size = (figures[36][i] / figures[4][i] for i in (0, 1))
        lines.append(f"{kind:22s}{'36 / 4':>8s}{seconds:11.3f}{size:14.3f}   goal <= 1.15")
    return lines


def _compile(kind: str, layers: int) -> tuple[float, int]:
    config = dataclasses.replace(presets["qwen3-0.6b"], num_layers=layers, vocab_size=4096)
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    programs = {"forward": partial(forward, config), "forward + backward": jax.grad(partial(dcjax_loss, config))}

    def run() -> tuple[float, int]:
        jax.clear_caches()
        started = time.perf_counter()
        compiled = jax.jit(programs[kind]).lower(abstract_params(config), tokens).compile()
        return time.perf_counter() - started, len(
            re.findall(r"^\s+(?:ROOT )?%\S+ = ", compiled.as_text() or "", re.MULTILINE)
        )

    # the first warms up; the least of the others is the least disturbed
    return min([run() for _ in range(4)][1:])


# --- memory ---


def memory() -> list[str]:
    """Temporaries of the gradient of log-probs, chunked and whole."""
    config = ModelConfig(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=1024,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=64,
    )
    tokens = jax.ShapeDtypeStruct((1, 4097), jnp.int32)

    def naive(config, params, tokens):
        logps = jax.nn.log_softmax(forward(config, params, tokens[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1))

    programs = {
        f"token_logps, chunks of {size}": dataclasses.replace(config, head_chunk=size) for size in (128, 512, 2048)
    }
    lines = [f"{'V 151,936, T 4096, d 1024, float32':40s}{'temporaries':>14s}{'arguments':>12s}{'outputs':>12s}"]
    for name, loss in {
        **{n: partial(dcjax_loss, c) for n, c in programs.items()},
        "naive": partial(naive, config),
    }.items():
        stats: Any = (
            jax.jit(jax.value_and_grad(loss)).lower(abstract_params(config), tokens).compile().memory_analysis()
        )
        sizes = (stats.temp_size_in_bytes, stats.argument_size_in_bytes, stats.output_size_in_bytes)
        lines.append(
            f"{name:40s}" + "".join(f"{size / 2**20:{w}.0f} MiB" for size, w in zip(sizes, (10, 8, 8), strict=True))
        )
    return lines


# --- full size ---


def flops(config: ModelConfig, rows: int, columns: int) -> float:
    """Of forward + backward, recomputation left out: 6 a weight and token that meet in a product, 12 in attention."""
    c, tokens = config, rows * columns
    attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    sparse = sum(c.sparse_layers)
    mlp = 3 * c.hidden_size * c.intermediate_size * (c.num_layers - sparse)
    experts = sparse * c.hidden_size * (c.num_experts + 3 * c.num_experts_per_tok * c.moe_intermediate_size)
    weights = c.num_layers * attention + mlp + experts + c.vocab_size * c.hidden_size
    # a causal query sees half of the columns
    scores = c.num_layers * c.num_heads * c.head_dim * columns / 2
    return tokens * (6 * weights + 12 * scores)


def full_size(args: argparse.Namespace) -> list[str]:
    """Tokens a second and share of the peak, parameters, activations and products in bf16."""
    config = dataclasses.replace(
        presets[args.preset], precision=Precision(parameters="bf16", compute="bf16", head="bf16")
    )
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (args.batch, args.length)).astype(np.int32)
    params = jax.jit(partial(init_params, config))(jax.random.key(0))
    update = jax.jit(jax.value_and_grad(partial(dcjax_loss, config)))
    jax.block_until_ready(update(params, tokens))
    seconds = []
    for _ in range(args.rounds):
        started = time.perf_counter()
        jax.block_until_ready(update(params, tokens))
        seconds.append(time.perf_counter() - started)
    best, work = float(np.median(seconds)), flops(config, *tokens.shape)
    share = f", {work / best / args.peak / 1e12:.1%} of {args.peak:g} TFLOP/s" if args.peak else ""
    device = jax.devices()[0].device_kind
    return [
        f"{args.preset}, {args.batch} x {args.length} tokens, bf16, on {device}: {1e3 * best:.1f} ms (median of "
        f"{args.rounds}), {tokens.size / best:,.0f} tokens/s, {work / best / 1e12:.2f} TFLOP/s{share}"
    ]


# --- command line ---


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    speed = commands.add_parser("speed", help="against plain JAX and PyTorch")
    speed.add_argument("--torch", metavar="PYTHON", help="interpreter with torch and transformers (default: without)")
    speed.add_argument("--json", type=Path, metavar="PATH", help="write the figures there too")
    speed.add_argument("--rounds", type=int, default=31, help="runs of each program (default: 31)")
    speed.add_argument("--cores", type=int, default=1, help="cores to stay on (default: 1, the least noisy)")
    commands.add_parser("compile", help="flat in depth?")
    commands.add_parser("memory", help="of log-probs")
    full = commands.add_parser("full-size", help="tokens a second on an accelerator")
    full.add_argument("preset", choices=sorted(presets))
    full.add_argument("--batch", type=int, default=1, help="rows (default: 1)")
    full.add_argument("--length", type=int, default=2048, help="tokens a row (default: 2048)")
    full.add_argument("--peak", type=float, help="TFLOP/s of the device in bf16 (an H200's: 989)")
    full.add_argument("--rounds", type=int, default=10, help="runs after the first (default: 10)")
    return parser.parse_args()


def main() -> None:
    """Runs one of the four and prints it."""
    args = parse()
    keep_freed_memory()
    if args.what == "speed":
        pin(args.cores)
        comparisons = [comparison for name in SHAPES for comparison in compare_speed(name, args)]
        print(table(comparisons))
        if args.json:
            figures = {"environment": environment(args), "comparisons": comparisons}
            args.json.write_text(json.dumps(figures, indent=2) + "\n")
        return
    lines = {"compile": compile_cost, "memory": memory, "full-size": lambda: full_size(args)}[args.what]()
    print("\n".join(lines))


if __name__ == "__main__":
    main()
