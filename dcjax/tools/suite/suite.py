"""`dcjax evaluate SOURCE --suite NAME`: benchmarks, with many samples per problem from both policies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

from dcjax.data.chat_task import ChatTask
from dcjax.data.datasets import Example
from dcjax.data.mathematics import MathTask
from dcjax.data.sources import require_files
from dcjax.data.store import load_examples
from dcjax.data.templates import Template, TemplateName, templates
from dcjax.errors import RunError
from dcjax.loop.checkpoint import fingerprint
from dcjax.loop.reward_collector import tell_unreadable
from dcjax.loop.run_directory import check_end_tokens_agree, check_shared
from dcjax.reporting.progress import Progress
from dcjax.rewards.pool import RewardPool
from dcjax.serving.formats import serving_format
from dcjax.serving.mismatch import NO_MISMATCH
from dcjax.sharding.hosts import DistributedConfig, as_loss, is_main, join, total
from dcjax.tools.open_model import OpenedModel, open_model
from dcjax.tools.suite.answers import sample_problems, to_problems
from dcjax.tools.suite.benchmarks import Benchmark, SuiteConfig, published_counts
from dcjax.tools.suite.engines import make_suite_engine
from dcjax.tools.suite.log import Conditions, SampleLog, SuitePolicy, SuiteProblem, read_samples
from dcjax.tools.suite.result import SuiteResult, score_benchmark, score_policy
from dcjax.types import Params
from dcjax.user_code import refusals_of

POLICIES: tuple[SuitePolicy, ...] = ("deployed", "training")

DETECTED = DistributedConfig()
"""With these settings hosts find each other as JAX detects it."""

WORKERS = 8
"""The most processes that score answers; there are no more than cores. They score some thousands per second."""


@dataclass(frozen=True)
class _Plan:
    """What to sample from one model, decided before the first sample."""

    model: OpenedModel
    config: SuiteConfig
    template: TemplateName
    asked: Template
    """The template, as problems are put by it."""
    params: Params
    weights: int
    """The fingerprint of `params`."""
    problems: dict[Benchmark, list[SuiteProblem]]
    unreadable: list[Example]
    """On process 0, the examples whose golds cannot be read."""
    max_prompt_length: int
    max_response_length: int
    notes: list[str]
    """How the evaluation differs from the papers'."""

    def format(self, policy: SuitePolicy) -> str:
        """The format that a policy is served in."""
        return serving_format(self.model.config.serving.format).name if policy == "deployed" else "float32"

    def missing(self, policy: SuitePolicy, log: SampleLog) -> int:
        """How many problems the log lacks of a policy."""
        parts = self.problems.items()
        return sum(len(log.missing(self.conditions(policy, benchmark), problems)) for benchmark, problems in parts)

    def conditions(self, policy: SuitePolicy, benchmark: Benchmark) -> Conditions:
        """What a policy's samples on a benchmark depend on."""
        serving, config = self.model.config.serving, self.config
        deployed = policy == "deployed"
        return Conditions(
            benchmark=benchmark.dataset,
            policy=policy,
            weights=self.weights,
            format=self.format(policy),
            kv_cache=serving.kv_cache if deployed else "auto",
            keep=list(serving.keep) if deployed else [],
            mismatch=asdict(self.model.config.mismatch if deployed else NO_MISMATCH),
            samples=config.samples_of(benchmark),
            seed=config.seed,
            temperature=config.temperature,
            top_p=config.top_p,
            max_response_length=self.max_response_length,
            stop_tokens=self.model.end_tokens,
            template=self.template,
            system_prompt=self.asked.system_prompt,
            thinking=self.asked.thinking,
            answer_start=self.asked.answer_start,
            chat_template=self.model.chat_template,
        )


def evaluate_suite(
    source: Path,
    config: SuiteConfig,
    *,
    data_dir: Path,
    out: Path | None = None,
    devices: int = 1,
    distributed: DistributedConfig = DETECTED,
    recipe_code: bool = True,
    **serving: Any,
) -> tuple[SuiteResult, Path] | None:
    """The accuracies of a model's deployed policy, in its format, and of its training policy, in float32.

    Hosts sample together, and share the scoring. Samples are logged problem by problem, and the next call with the same
    arguments does not sample them again, on any number of hosts.

    Args:
      source: a run directory, RUN/checkpoints/STEP, or a Hugging Face folder.
      config: how the suite is sampled.
      data_dir: the directory with the benchmarks' local copies.
      out: the directory where samples are logged; None is RUN/suite/STEP or ./suite/FOLDER.
      devices: how many devices share the weights and the samples; several hosts take all that they have.
      distributed: how hosts find each other.
      recipe_code: whether a run's own code may be executed, if its recipe has sections from outside dcjax.
      serving: fields of `ServingConfig` that replace the run's; None keeps the run's.

    Returns:
      The result and the directory; None on all hosts but the first.

    Raises:
      Interrupted: another host has stopped.
      RunError: the source or the data does not exist, or the model, the hardware or its memory cannot serve the
        settings.
      OSError: results cannot be written; nothing has been read or sampled then.
    """
    join(distributed)
    devices = jax.device_count() if jax.process_count() > 1 else devices
    model = open_model(source, devices=devices, recipe_code=recipe_code, serving=serving)
    check_end_tokens_agree(model.end_tokens)
    directory = model.directory_for("suite") / (model.name if model.step is None else str(model.step))
    directory = directory if out is None else out
    check_shared(directory)
    plan = _make_plan(model, config, data_dir)
    try:
        _sample(plan, directory)
        # No host reads before all have written their shares.
        total(0)
    except Exception as error:
        if (loss := as_loss(error)) is None:
            raise
        raise loss from error
    return (_result(plan, directory), directory) if is_main() else None


def _make_plan(model: OpenedModel, config: SuiteConfig, data_dir: Path) -> _Plan:
    template, asked = _template(model, config)
    with refusals_of():
        require_files([benchmark.dataset for benchmark in config.benchmarks], data_dir, option="--data-dir")
    problems, golds = {}, []
    for benchmark in config.benchmarks:
        with refusals_of():
            examples = load_examples(benchmark.dataset, data_dir)[: config.problems]
        problems[benchmark] = to_problems(model, asked, examples)
        golds += examples
    notes = _unlike_published(config, {benchmark: len(part) for benchmark, part in problems.items()})
    longest = max(len(problem.prompt) for part in problems.values() for problem in part)
    positions = model.config.model.longest_sequence
    if (room := positions - longest) < 1:
        raise RunError(f"the longest prompt takes {longest} tokens; {model.name} has {positions} positions")
    if room < config.max_response_length:
        notes.append(
            f"responses are cut at {room:,} tokens, not {config.max_response_length:,}: the model has {positions:,} "
            f"positions, and the longest prompt takes {longest:,}"
        )
    params = model.params()
    return _Plan(
        model=model,
        config=config,
        template=template,
        asked=asked,
        params=params,
        weights=fingerprint(params),
        problems=problems,
        unreadable=tell_unreadable(golds, asked.reward),
        max_prompt_length=longest,
        max_response_length=min(room, config.max_response_length),
        notes=notes,
    )


def _unlike_published(config: SuiteConfig, problems: Mapping[Benchmark, int]) -> list[str]:
    """A line on all benchmarks of which other numbers of problems or of samples are asked than the published ones."""
    others = []
    for benchmark, count in problems.items():
        samples, published = config.samples_of(benchmark), published_counts(benchmark)
        if count not in published or samples != benchmark.samples:
            whole = count if count in published else published[0]
            others.append(f"{benchmark.title} {count} × {samples}, not {whole} × {benchmark.samples}")
    return [f"not as published (problems × samples of each): {'; '.join(others)}"] if others else []


def _template(model: OpenedModel, config: SuiteConfig) -> tuple[TemplateName, Template]:
    """The template by which problems are put: as the run was trained, unless the suite says otherwise."""
    trained = model.config.task if isinstance(model.config.task, ChatTask) else MathTask()
    name = config.template or trained.template
    return name, replace(
        templates[name],
        system_prompt=trained.system_prompt,
        thinking=config.thinking or trained.thinking,
        answer_start=trained.answer_start if config.answer_start is None else config.answer_start,
    )


def _sample(plan: _Plan, directory: Path) -> None:
    """Samples what is not logged yet; each host scores and logs its share."""
    with SampleLog(directory, jax.process_index()) as log:
        missing = {policy: plan.missing(policy, log) for policy in POLICIES}
        left = sum(missing.values())
        # No host samples before all have read what was logged.
        if total(left) != left * jax.process_count():
            raise RunError(
                f"hosts read different samples in {directory}; give all of them one directory that they share"
            )
        if not left:
            return
        count = len(POLICIES) * sum(map(len, plan.problems.values()))
        done = count - left
        with (
            RewardPool(plan.asked.reward, workers=min(WORKERS, os.cpu_count() or 1)) as pool,
            _progress_shown(count, done) as show,
        ):
            for policy in (policy for policy in POLICIES if missing[policy]):
                for benchmark, more in _sample_policy(plan, policy, pool, log):
                    done += more
                    show(done, policy, benchmark)


@contextlib.contextmanager
def _progress_shown(count: int, done: int) -> Iterator[Callable[[int, SuitePolicy, Benchmark], None]]:
    """A callback that shows on process 0 how many problems are done, and does nothing on the others."""
    if not is_main():
        yield lambda done, policy, benchmark: None
        return
    with Progress(count, initial=done, description="problem") as progress:
        yield lambda done, policy, benchmark: progress.update(done, policy=policy, benchmark=benchmark.title)


def _sample_policy(
    plan: _Plan, policy: SuitePolicy, pool: RewardPool, log: SampleLog
) -> Iterator[tuple[Benchmark, int]]:
    """Samples one benchmark after another; yields which it is, and how many more of its problems are done."""
    engine = make_suite_engine(
        plan.model, policy, max_prompt_length=plan.max_prompt_length, max_response_length=plan.max_response_length
    )
    params = engine.sync(plan.params, plan.model.version)
    for benchmark, problems in plan.problems.items():
        scored = {
            "conditions": plan.conditions(policy, benchmark),
            "template": plan.asked,
            "pool": pool,
            "log": log,
        }
        for more in sample_problems(engine, params, plan.model, problems, **scored):
            yield benchmark, more


def _result(plan: _Plan, directory: Path) -> SuiteResult:
    """The result, from what all hosts have logged in the directory."""
    logged = read_samples(directory)
    policies = []
    for policy in POLICIES:
        scores = []
        for benchmark, problems in plan.problems.items():
            found = logged.get(plan.conditions(policy, benchmark).fingerprint, {})
            asked = [(problem.id, problem.answer) for problem in problems]
            if len(found.keys() & set(asked)) < len(problems):
                raise RunError(
                    f"other hosts' samples are not in {directory}; give all of them one directory that they share"
                )
            scores.append(score_benchmark(benchmark.dataset, [found[each] for each in asked]))
        policies.append(score_policy(policy, plan.format(policy), scores))
    settings = asdict(plan.config) | {
        "template": plan.template,
        "system_prompt": plan.asked.system_prompt,
        "thinking": plan.asked.thinking,
        "answer_start": plan.asked.answer_start,
        "chat_template": plan.model.chat_template,
        "max_response_length": plan.max_response_length,
        "stop_tokens": plan.model.end_tokens,
    }
    unreadable: dict[str, dict[str, str]] = {}
    for example in plan.unreadable:
        unreadable.setdefault(example.dataset, {})[example.id] = example.answer
    return SuiteResult(plan.model.name, plan.model.step, plan.config.suite, settings, policies, plan.notes, unreadable)
