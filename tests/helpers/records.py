"""What runs leave, as tests make and compare it."""

import json
import math

import numpy as np

from dcjax.reporting.record import MetricsLog, Transcripts

PROMPTS = 128
"""Held-out ones that accuracies are of."""


def untimed(records):
    """Metrics of steps without those that measure the machine."""
    return [
        {
            name: value
            for name, value in record.items()
            if not name.startswith("time/") and not name.endswith("tokens_per_second")
        }
        for record in records
    ]


def evaluation(progress):
    return {
        "eval/deployed_accuracy": round(PROMPTS * (0.3 + 0.4 * progress)) / PROMPTS,
        "eval/training_accuracy": round(PROMPTS * (0.35 + 0.4 * progress)) / PROMPTS,
        "eval/prompts": PROMPTS,
    }


def update(progress, noise):
    return {
        "reward": 0.3 + 0.4 * progress + 0.02 * noise,
        "response_length": 24.0 + 8 * progress + noise,
        "entropy": 1.0 - 0.5 * progress,
        "mismatch/prob_diff_mean": 0.002 * math.exp(-progress),
        "grad_norm": 0.5 + 0.05 * noise,
        "grad_norm_smoothed": 0.5,
        "tokens_per_second": 8123.4,
    }


def dual(progress, noise):
    return {
        "dual/multiplier": 0.1 + 0.2 * progress,
        "dual/budget": 0.001,
        "dual/discrepancy": 0.002 * math.exp(-progress) + 1e-4 * noise,
    }


def records_of_a_run(*, steps=40, constrained=True):
    noise = np.random.default_rng(0).standard_normal(steps + 1)
    records = [{"step": 0, **evaluation(0.0)}]
    for step in range(1, steps + 1):
        record = {"step": step, **update(step / steps, noise[step])}
        if constrained:
            record |= dual(step / steps, noise[step])
        if step % 10 == 0:
            record |= evaluation(step / steps)
        records.append(record)
    return records


def write_run(run_dir, records, *, samples=(), config=None):
    with MetricsLog(run_dir, "metrics", last_step=None) as log:
        for record in records:
            log.write(record["step"], {key: value for key, value in record.items() if key != "step"})
    if samples:
        with Transcripts(run_dir, last_step=None) as transcripts:
            for sample in samples:
                transcripts.write(**sample)
    if config is not None:
        (run_dir / "config.json").write_text(json.dumps(config))


def sample(step, prompt, response="42", **more):
    return {
        "step": step,
        "prompt": prompt,
        "response": response,
        "reward": 1.0,
        "finished": True,
        "policy_version": step,
        **more,
    }
