"""What makes quantised serving formats far from the float32 trainer, taken apart for one model.

    python benchmarks/quantization FOLDER [--json PATH] [--picture PATH]
    python benchmarks/quantization --markdown [--json PATH]

The float32 engine samples a response to each of PROMPTS. The same tokens are then scored in one pass through
`forward_cached` by one way to serve the model after another, each against `dcjax.models.forward` in float32: |p − q| of
the sampled tokens, and the exact KL over the vocabulary. docs/quantization.md has what was found; `--markdown` prints
its tables.

- formats: each of the library's, with its own KV cache.
- parts: one kind of product quantised, and all else in bfloat16, KV cache too.
- caches: the KV cache alone.
- layers: the products of five layers quantised; and how far the residual stream is off behind each layer.
- outliers: what enters each product in float32, its largest channel against the token's root mean square.
- alternatives: what engines do besides, with a bfloat16 cache: rounding.py simulates what is not in the library.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from laboratory import sample  # pyrefly: ignore[missing-import]
from outliers import outliers, watch  # pyrefly: ignore[missing-import]
from report import draw, tables  # pyrefly: ignore[missing-import]
from sections import (  # pyrefly: ignore[missing-import]
    of_alternatives,
    of_caches,
    of_formats,
    of_layers,
    of_parts,
)

from dcjax.cli.session import jax_session
from dcjax.errors import RunError
from dcjax.tools.open_model import open_model

RESULTS = Path(__file__).parents[1] / "results"


def measure(folder: Path) -> dict[str, Any]:
    """All sections, as the JSON holds them.

    Raises:
      RunError: the folder holds no dense model with a tokenizer.
      ValueError: a format does not suit the model's widths.
    """
    model = open_model(folder)
    lab = sample(model)
    entered = watch(lab.config, lab.params, lab.text)
    return {
        "model": {"name": model.name, "layers": lab.config.num_layers},
        "responses": len(lab.text.mask),
        "tokens": int(lab.text.mask.sum()),
        "outliers": outliers(entered, lab.text, model.tokenizer.decode),
        "formats": of_formats(lab),
        "caches": of_caches(lab),
        "parts": of_parts(lab),
        "layers": of_layers(lab),
        "alternatives": of_alternatives(lab, entered),
    }


def shortened(tree: Any) -> Any:
    """The same with four digits of each number."""
    if isinstance(tree, dict):
        return {name: shortened(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [shortened(value) for value in tree]
    return float(f"{tree:.4g}") if isinstance(tree, float) else tree


def main() -> None:
    """Measures, writes, draws and prints; or prints what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, nargs="?", metavar="FOLDER", help="a Hugging Face folder of a dense model")
    add("--json", type=Path, default=RESULTS / "quantization.json", metavar="PATH", help="where the figures go")
    add("--picture", type=Path, default=RESULTS / "quantization.png", metavar="PATH", help="where they are drawn")
    add("--markdown", action="store_true", help="measure nothing, and print the tables of the figures that are there")
    args = parser.parse_args()
    if args.markdown == (args.folder is not None):
        parser.error("it takes either a FOLDER to measure, or --markdown")
    if not args.markdown:
        with jax_session():
            try:
                results = shortened(measure(args.folder))
            except (RunError, ValueError) as error:
                parser.error(str(error))
        args.json.write_text(json.dumps(results, indent=1) + "\n")
        draw(results, args.picture)
    print("\n\n".join(tables(json.loads(args.json.read_text())).values()))


if __name__ == "__main__":
    main()
