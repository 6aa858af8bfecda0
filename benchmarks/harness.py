"""lm-eval's `local-completions` on a local task over `dcjax serve --protocol http`, beside the library's own numbers.

    python benchmarks/harness.py [--python PYTHON] [--problems 64]

The harness (lm-eval with its extra `api`, and transformers for the tokenizer) runs in an environment of its own, which
is made where none is given. It asks for two things of a task of arithmetic chains: which of four answers is the most
probable one (log-probs of echoed tokens), and what is sampled greedily. The library computes both from the same
checkpoint in this process: log-probs by `score_sequence`, samples by `sample_responses`. Every log-prob, choice and
text must agree; the exit status is 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import jax
import numpy as np
from serving_clients import served  # pyrefly: ignore[missing-import]  (beside this file)
from serving_load import options_of  # pyrefly: ignore[missing-import]
from serving_subject import Subject, tiny  # pyrefly: ignore[missing-import]

from dcjax.data.task import decode_responses, encode
from dcjax.recipe.build import build_engine
from dcjax.serving.rollout import sample_responses
from dcjax.serving.scoring import score_sequence

NEEDED = ("lm-eval[api]>=0.4.9,<0.5", "transformers>=5,<6")
CLOSE = 1e-4
"""Nats that the sum of a continuation's log-probs may differ by."""
LONGEST = 8
"""Tokens of a sampled answer."""
STOP = "}"
"""What ends a sampled answer for the harness."""
TASKS = {
    "choices": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}"},
    "samples": {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [STOP], "max_gen_toks": LONGEST, "temperature": 0},
    },
}
METRICS = {"choices": "acc", "samples": "exact_match"}


def problems_of(subject: Subject, count: int) -> list[dict[str, Any]]:
    """Chains with four answers each, of which one is right."""
    draw, problems = np.random.default_rng(0), []
    for _ in range(count):
        first, *others = draw.integers(1, 20, size=3).tolist()
        question = f"{first}+{others[0]}-{others[1]}="
        right = first + others[0] - others[1]
        answers = [right, *(right + draw.choice([-3, -2, -1, 1, 2, 3], size=3, replace=False)).tolist()]
        label = int(draw.integers(4))
        answers[0], answers[label] = answers[label], answers[0]
        choices = [f"\\boxed{{{answer}}}" for answer in answers]
        problems.append({"question": question, "choices": choices, "label": label, "answer": f"\\boxed{{{right}"})
    return problems


def write_tasks(folder: Path, problems: list[dict[str, Any]]) -> None:
    """The task files that the harness reads."""
    data = folder / "problems.jsonl"
    data.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    for name, settings in TASKS.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "doc_to_text": "{{question}}",
            "target_delimiter": "",
            "metric_list": [{"metric": METRICS[name]}],
            **settings,
        }
        # JSON is YAML
        (folder / f"{name}.yaml").write_text(json.dumps(task))


def run_harness(python: Path, port: int, subject: Subject, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What the harness logs of each problem, by task."""
    limits = subject.model.config.rollout
    model = {
        "model": subject.model.name,
        "base_url": f"http://127.0.0.1:{port}/v1/completions",
        "num_concurrent": 8,
        "tokenizer_backend": "huggingface",
        "tokenizer": str(subject.source / "tokenizer"),
        # a longer sequence is cut by the harness
        "max_length": limits.max_prompt_length + limits.max_response_length,
    }
    told = ",".join(f"{name}={value}" for name, value in model.items())
    command = [str(python), "-m", "lm_eval", "--model", "local-completions", "--model_args", told]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(folder), "--output_path", str(folder / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    subprocess.run([*command, "--log_samples"], check=True, env=os.environ | offline, stdout=subprocess.DEVNULL)
    logged = {}
    for name in TASKS:
        (path,) = (folder / "out").rglob(f"samples_{name}_*.jsonl")
        logged[name] = sorted(map(json.loads, path.read_text().splitlines()), key=lambda line: line["doc_id"])
    return logged


def own_numbers(subject: Subject, problems: list[dict[str, Any]]) -> tuple[list[list[float]], list[str]]:
    """Log-probs of all choices, and greedy answers, by the library."""
    model = subject.model
    engine = build_engine(model.config, model.mesh, model.end_tokens)
    params = engine.sync(model.params(), model.step or 0)
    prompts = encode(model.tokenizer, [problem["question"] for problem in problems])
    log_probs = []
    for problem, prompt in zip(problems, prompts, strict=True):
        wholes = encode(model.tokenizer, [problem["question"] + choice for choice in problem["choices"]])
        scores = [score_sequence(engine, params, whole, 1).logps[len(prompt) - 1 :] for whole in wholes]
        log_probs.append([float(logps.sum()) for logps in scores])
    rollout = sample_responses(engine, params, prompts, samples_per_prompt=1, temperature=0.0, key=jax.random.key(0))
    width = rollout.response_mask.shape[1]
    lengths = rollout.response_mask.sum(axis=1)
    responses = [row[-width:][: min(length, LONGEST)] for row, length in zip(rollout.tokens, lengths, strict=True)]
    texts = decode_responses(model.tokenizer, responses, (rollout.finished & (lengths <= LONGEST)).tolist())
    return log_probs, [text.split(STOP)[0] for text in texts]


def differences(logged: dict[str, list[dict[str, Any]]], log_probs: list[list[float]], texts: list[str]) -> list[str]:
    """What the harness found otherwise."""
    faults = []
    for line, own in zip(logged["choices"], log_probs, strict=True):
        theirs = [float(answer[0]) for answer in line["filtered_resps"]]
        if not np.allclose(theirs, own, atol=CLOSE):
            faults.append(f"problem {line['doc_id']}: log-probs {theirs}, not {own}")
        if line["acc"] != float(np.argmax(own) == line["doc"]["label"]):
            faults.append(f"problem {line['doc_id']}: acc {line['acc']} of log-probs {own}")
    for line, own in zip(logged["samples"], texts, strict=True):
        if line["filtered_resps"] != [own]:
            faults.append(f"problem {line['doc_id']}: {line['filtered_resps']}, not {own!r}")
        if line["exact_match"] != float(own == line["doc"]["answer"]):
            faults.append(f"problem {line['doc_id']}: exact_match {line['exact_match']} of {own!r}")
    return faults


def made(folder: Path) -> Path:
    """The Python of a new environment with the harness."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", *NEEDED], check=True)
    return python


def main() -> None:
    """Runs both and compares them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="of an environment with lm-eval (default: one is made)")
    parser.add_argument("--problems", type=int, default=64, help="of each task (default: 64)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subject = tiny(folder)
        python = made(folder / "environment") if args.python is None else args.python
        problems = problems_of(subject, args.problems)
        write_tasks(folder, problems)
        with served(subject.source, *options_of("http", subject)) as server:
            logged = run_harness(python, server.port, subject, folder)
        log_probs, texts = own_numbers(subject, problems)
    for task, metric in METRICS.items():
        print(f"{task}: {metric} {np.mean([line[metric] for line in logged[task]]):.4f} of {len(problems)} problems")
    if faults := differences(logged, log_probs, texts):
        sys.exit("\n".join(faults[:20]))
    print("every log-prob, choice and text is the library's own")


if __name__ == "__main__":
    main()
