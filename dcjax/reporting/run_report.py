"""One page about a run: its curves, its metrics, samples of what the model wrote, and the configuration."""

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dcjax.reporting.curves import (
    Drawing,
    Records,
    accuracy_interval,
    draw_curves,
    draw_panels,
    series,
    show_control_characters,
)
from dcjax.reporting.html import render_page
from dcjax.reporting.record import read_metrics, read_object, read_transcripts, write_atomically
from dcjax.reporting.statistics import welch_interval
from dcjax.reporting.times import PROFILE, TIMES, Times, read_times, times_title

_PAGE = Path(__file__).parent / "report_page"
_SAMPLES_SHOWN = 4
_ENDS = 5
"""Iterations at either end of a run whose rewards are compared."""
_ENVIRONMENT_KEYS = ("versions", "platform", "recipe", "directory")


class Headline(NamedTuple):
    """A row of the table of metrics; `best` picks the best value, and is None if no value is better than another."""

    key: str
    label: str
    best: Callable[..., float] | None


_HEADLINES = (
    Headline("reward", "Reward", max),
    Headline("eval/deployed_accuracy", "Held-out accuracy, deployed policy", max),
    Headline("eval/training_accuracy", "Held-out accuracy, training policy", max),
    Headline("eval/deployed_accuracy_ema", "Held-out accuracy, deployed policy, averaged weights", max),
    Headline("dual/discrepancy", "Discrepancy δ̄, mean over responses", min),
    Headline("mismatch/prob_diff_mean", "|p_train − p_infer|, mean over tokens", min),
    Headline("mismatch/prob_diff_max", "|p_train − p_infer|, largest", min),
    Headline("mismatch/log_ppl_abs_diff", "Absolute difference of log-perplexity, mean over responses (nats)", min),
    Headline("mismatch/prob_diff_p99", "|p_train − p_infer|, 99th percentile", min),
    Headline("mismatch/ess", "Effective share of the tokens as the training policy's samples", max),
    Headline("mismatch/k3", "KL(sampled ‖ training), k3 estimate (nats per token)", min),
    Headline("dual/multiplier", "Multiplier λ", None),
    Headline("dual/budget", "Budget c", None),
    Headline("response_length", "Response length (tokens)", None),
    Headline("entropy", "Entropy (nats per token)", None),
    Headline("grad_norm", "Gradient norm", None),
    Headline("learning_rate", "Learning rate", None),
    Headline("tokens_per_second", "Throughput (tokens/s)", max),
    Headline("rollout_tokens_per_second", "Throughput of the rollout alone (tokens/s)", max),
    Headline("update_tokens_per_second", "Throughput of the update alone (tokens/s)", max),
)

WIDEST_GAP = 0.1
"""|p_train − p_infer| from which on the colour of a token is full."""


class Token(NamedTuple):
    """A token of a sample, |p_train − p_infer|, and what both policies gave to it."""

    text: str
    gap: float
    train: float
    sampler: float


_FINAL_FIGURES = (
    ("eval/deployed_accuracy", "deployed accuracy"),
    ("eval/training_accuracy", "training accuracy"),
    ("reward", "reward"),
    ("dual/discrepancy", "discrepancy δ̄"),
    ("dual/multiplier", "multiplier λ"),
)


def write_report(run_dir: Path) -> tuple[Path, Path]:
    """Writes `report.png` and the self-contained `report.html` into a run directory.

    Args:
      run_dir: the run directory, with `metrics.jsonl` and, if the run wrote them, `config.json`, `samples.jsonl` and
        `profile/times.json`.

    Returns:
      The paths of the picture and of the page.

    Raises:
      FileNotFoundError: if there is no `metrics.jsonl`.
      ValueError: if that file has no complete line, or if any file is damaged; the message names the file.
    """
    run_dir = Path(run_dir)
    records = _load_metrics(run_dir)
    config_path, profile = run_dir / "config.json", run_dir / PROFILE
    config = read_object(config_path) if config_path.exists() else {}
    times = read_times(profile) if (profile / TIMES).exists() else None
    samples_path = run_dir / "samples.jsonl"
    samples = read_transcripts(samples_path) if samples_path.exists() else []
    name = run_dir.resolve().name
    picture_path, page_path = run_dir / "report.png", run_dir / "report.html"
    write_atomically(picture_path, draw_curves(records, name))
    page = _render(name, records, config, samples, draw_panels(records), times)
    # UTF-8 cannot encode a lone surrogate; it becomes a character reference, which a browser shows as �.
    write_atomically(page_path, page.encode("utf-8", "xmlcharrefreplace"))
    return picture_path, page_path


def _load_metrics(run_dir: Path) -> Records:
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        elsewhere = ", ".join(str(found.parent) for found in sorted(run_dir.glob("*/metrics.jsonl")))
        hint = f"one of {elsewhere}" if elsewhere else "such as runs/NAME"
        raise FileNotFoundError(f"no {path}; a report needs a run directory, which has that file: {hint}")
    records = read_metrics(path)
    if not records:
        raise ValueError(f"{path} has no complete line: the run stopped before it logged a step")
    return records


def _render(
    name: str,
    records: Records,
    config: dict[str, Any],
    samples: Records,
    drawings: list[Drawing],
    times: Times | None,
) -> str:
    from markupsafe import Markup

    # Everything that comes from a run is escaped, because a model's text may contain markup; the drawings are our own.
    body, style, script = ((_PAGE / file).read_text("utf-8") for file in ("body.html", "style.css", "script.js"))
    return render_page(
        body,
        style=style,
        script=script,
        filters={"number": _format_number, "visible": show_control_characters},
        title=f"{show_control_characters(name)}: report",
        name=name,
        last_step=records[-1]["step"],
        figures=_final_figures(records),
        drawings=[drawing._replace(svg=Markup(drawing.svg)) for drawing in drawings],
        rows=_headline_rows(records),
        times=times,
        times_title=times and times_title(times),
        samples_by_title=_first_and_last_samples(samples),
        widest_gap=WIDEST_GAP,
        settings=_flatten({key: value for key, value in config.items() if key not in _ENVIRONMENT_KEYS}),
        environment=_flatten({key: config[key] for key in _ENVIRONMENT_KEYS if key in config}),
    )


def _final_figures(records: Records) -> list[tuple[str, float, str]]:
    """(label, value, remark) of the run's main figures, each from the last line that has it."""
    figures = []
    for key, label in _FINAL_FIGURES:
        record = next((record for record in reversed(records) if key in record), None)
        if record is not None:
            remark = _gain(records) if key == "reward" else _remark(record, key)
            figures.append((label, record[key], f"step {record['step']}{remark}"))
    return figures


def _gain(records: Records) -> str:
    """How far the rewards of the last iterations lie above those of the first; "" where there are too few."""
    _, rewards = series(records, "reward")
    first, last = rewards[:_ENDS], rewards[-_ENDS:]
    if len(rewards) < 2 * _ENDS:
        return ""
    gain, (lower, upper) = statistics.fmean(last) - statistics.fmean(first), welch_interval(first, last)
    return f"; last {_ENDS} less first {_ENDS}: {gain:+.3f}, 95% {lower:+.3f} to {upper:+.3f}"


def _remark(record: Mapping[str, Any], key: str) -> str:
    if key.startswith("eval/") and "eval/prompts" in record:
        lower, upper = accuracy_interval(record, key)
        return f", 95% {lower:.3f} to {upper:.3f}"
    if key == "dual/discrepancy" and "dual/budget" in record:
        return f", budget {_format_number(record['dual/budget'])}"
    return ""


def _headline_rows(records: Records) -> list[dict[str, Any]]:
    """The label and the first, best and last (step, value) of each recorded metric; best may be None."""
    rows = []
    for headline in _HEADLINES:
        points = list(zip(*series(records, headline.key), strict=True))
        if points:
            best = headline.best(points, key=lambda point: point[1]) if headline.best else None
            rows.append({"label": headline.label, "first": points[0], "best": best, "last": points[-1]})
    return rows


def _first_and_last_samples(samples: Records) -> list[tuple[str, Records]]:
    """A title and some samples for the first and for the last sampled step: a few prompts, one response each."""
    steps = sorted({sample["step"] for sample in samples})
    if not steps:
        return []
    titles = {steps[0]: "Early"}
    titles.setdefault(steps[-1], "Late")
    return [(f"{title}: step {step}", _samples_of_step(samples, step)) for step, title in titles.items()]


def _samples_of_step(samples: Records, step: int) -> Records:
    by_prompt: dict[str, dict[str, Any]] = {}
    for sample in samples:
        if sample["step"] == step:
            by_prompt.setdefault(sample["prompt"], sample)
    return [sample | _told(sample) for sample in list(by_prompt.values())[:_SAMPLES_SHOWN]]


def _told(sample: Mapping[str, Any]) -> dict[str, Any]:
    """What a page shows of the tokens that probabilities are kept of: `told`, their mean `gap`, the `rest` behind."""
    told = [Token(text, abs(train - sampler), train, sampler) for text, train, sampler in sample.get("tokens", ())]
    if not told:
        return {"told": [], "gap": None, "rest": sample["response"]}
    text = "".join(token.text for token in told)
    rest = sample["response"].removeprefix(text) if sample["response"].startswith(text) else ""
    return {"told": told, "gap": statistics.fmean(token.gap for token in told), "rest": rest}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The leaves of nested dicts, as (dotted name, text) pairs."""
    leaves = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves += _flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            leaves.append((prefix + key, text))
    return leaves


def _format_number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
