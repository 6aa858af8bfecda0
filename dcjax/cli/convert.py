"""`dcjax convert`: imports, exports and inspects Hugging Face checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from dcjax.cli.arguments import Parser, add_recipe_code_option
from dcjax.cli.session import jax_session

DTYPES = ("float32", "bf16", "fp16")


def add_parser(commands) -> None:
    """Adds the command and its three actions."""
    parser = commands.add_parser(
        "convert",
        help="import, export or inspect Hugging Face checkpoints",
        description="Converts weights between Hugging Face folders (config.json and safetensors) and runs, and from "
        "GGUF files. Supports Qwen3, Qwen3-MoE, Qwen2 and Llama models, DeepSeek-R1-Distill-Qwen and SmolLM2 included, "
        "unquantised in folders.",
    )
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION", parser_class=Parser)
    _add_import(actions)
    _add_export(actions)
    _add_inspect(actions)


def _add_import(actions) -> None:
    parser = actions.add_parser(
        "import",
        help="verify a Hugging Face folder or a GGUF file and write a checksummed folder",
        description="Reads every weight of a Hugging Face folder or of a GGUF file, and refuses what is damaged, "
        "incomplete or contains non-finite weights. Writes the same weights, each with a checksum, together with the "
        "tokenizer and a config.json that old and new versions of transformers read. Quantised weights of a GGUF file "
        "are dequantised, and its tokenizer is built anew. GGUF files need the extra gguf.",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="folder with config.json and safetensors of any dtype, or a GGUF file of architecture llama, qwen2, "
        "qwen3 or qwen3moe",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create; nothing is overwritten")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype to convert the weights to (default: as stored; of a GGUF file fp16 and bf16 as stored, and all "
        "else as float32, so that nothing is rounded again)",
    )
    parser.set_defaults(run=_run_import)


def _add_export(actions) -> None:
    parser = actions.add_parser(
        "export",
        help="write a run's policy as a Hugging Face folder",
        description="Writes the training policy of a checkpoint and the run's tokenizer as a folder that transformers "
        "(4.51 or later) and vLLM can load.",
    )
    parser.add_argument(
        "source", type=Path, metavar="RUN_OR_STEP", help="a run directory, or one checkpoint (RUN/checkpoints/STEP)"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create; nothing is overwritten")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the exported weights (default: as trained)")
    parser.add_argument(
        "--ema", action="store_true", help="export the moving average of the weights instead of the latest weights"
    )
    add_recipe_code_option(parser)
    parser.set_defaults(run=_run_export)


def _add_inspect(actions) -> None:
    parser = actions.add_parser(
        "inspect",
        help="describe a Hugging Face folder or a GGUF file without loading its weights",
        description="Prints the architecture, parameter counts, dtypes and files of a Hugging Face folder or a GGUF "
        "file, and whether it has checksums. Reads only config.json and the headers of the files.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a Hugging Face folder or a GGUF file")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    parser.set_defaults(run=_run_inspect)


def _run_import(options: argparse.Namespace) -> None:
    from dcjax.tools.convert import import_model

    with _tensor_progress() as progress_callback:
        import_model(options.source, options.out, dtype=options.dtype, told=progress_callback)
    print(f"imported: {options.out}")


def _run_export(options: argparse.Namespace) -> None:
    with jax_session(), _tensor_progress() as progress_callback:
        from dcjax.tools.convert import export_run

        step = export_run(
            options.source,
            options.out,
            dtype=options.dtype,
            averaged=options.ema,
            recipe_code=options.recipe_code,
            told=progress_callback,
        )
    print(f"exported: {options.out} (step {step})")


def _run_inspect(options: argparse.Namespace) -> None:
    from dcjax.tools.convert import inspect_model

    inspection = inspect_model(options.source)
    if options.json:
        print(json.dumps(dataclasses.asdict(inspection)))
        return
    config = inspection.config
    experts = f", {config.num_experts} experts, {config.num_experts_per_tok} per token"
    rows = {
        "architecture": config.family + (experts if config.num_experts else ""),
        "layers": f"{config.num_layers} of width {config.hidden_size}",
        "heads": f"{config.num_heads} of width {config.head_dim}, {config.num_kv_heads} for keys and values",
        "positions": f"{config.longest_sequence}, {config.described_rope}",
        "vocabulary": f"{config.vocab_size}, {'tied' if config.tie_embeddings else 'untied'} head",
        "parameters": f"{inspection.parameters:,}, active {inspection.active_parameters:,}",
        "dtypes": ", ".join(f"{name} ({count} tensors)" for name, count in inspection.dtypes.items()),
        "files": f"{inspection.files}, {inspection.bytes:,} bytes",
        "checksums": "yes" if inspection.checksums else "no",
    }
    for name, value in rows.items():
        print(f"{name:<14}{value}")


@contextlib.contextmanager
def _tensor_progress() -> Iterator[Callable[[int, int], None]]:
    """Yields a progress callback, of the tensors done and their total, which opens a progress bar at its first call."""
    from dcjax.reporting.progress import Progress

    with contextlib.ExitStack() as stack:
        bar: Progress | None = None

        def progress_callback(done: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                bar = stack.enter_context(Progress(total, initial=0, description="tensor"))
            bar.update(done)

        yield progress_callback
