"""Samples of a suite's problems by one policy, scored while the next ones are drawn."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax

from dcjax.data.datasets import Example
from dcjax.data.task import encode
from dcjax.data.templates import Template
from dcjax.errors import RunError
from dcjax.keys import make_key
from dcjax.loop.evaluate import responses
from dcjax.loop.reward_collector import one_line, tell_timeouts
from dcjax.rewards.pool import Pending, RewardPool
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.rollout import require_finite, sample_responses
from dcjax.serving.sync import ServingParams
from dcjax.sharding.hosts import share
from dcjax.tools.open_model import OpenedModel
from dcjax.tools.suite.log import Conditions, ProblemSamples, SampleLog, SuiteProblem
from dcjax.types import Rollout

SAMPLES_A_CALL = 256
"""The most samples that one call of the engine draws: many, since slots become empty at the end of a call, but no more
than may be lost to an interruption."""


@dataclass(frozen=True)
class _HostShare:
    """This host's share of a batch, whose scores are awaited; the lists have an item for each sample."""

    problems: list[SuiteProblem]
    answers: list[str | None]
    lengths: list[int]
    finished: list[bool]
    scores: Pending


def to_problems(model: OpenedModel, template: Template, examples: Sequence[Example]) -> list[SuiteProblem]:
    """A benchmark's problems, in order, as the model gets them.

    Raises:
      RunError: the model's tokenizer cannot spell one of them.
    """
    prompts = encode(model.tokenizer, [template.prompt(model.tokenizer, example.question) for example in examples])
    unknown = model.tokenizer.unk_token_id
    for example, prompt in zip(examples, prompts, strict=True):
        if unknown is not None and unknown in prompt:
            raise RunError(
                f"the tokenizer of {model.name} cannot spell problem {example.id} of {example.dataset}; "
                "a suite needs a model whose tokenizer covers any text"
            )
    pairs = zip(examples, prompts, strict=True)
    return [SuiteProblem(example.id, prompt, example.answer) for example, prompt in pairs]


def sample_problems(
    engine: Qwen3Engine,
    params: ServingParams,
    model: OpenedModel,
    problems: Sequence[SuiteProblem],
    *,
    conditions: Conditions,
    template: Template,
    pool: RewardPool,
    log: SampleLog,
) -> Iterator[int]:
    """Samples what the log lacks of one benchmark, and logs this host's share; yields how many more problems are done.

    The keys of a problem's samples depend on its place in the benchmark, on the number of samples per problem, and on
    the seed, but not on the slots, on the hosts, or on what was logged before.

    Args:
      engine: the engine of the policy.
      params: the policy's weights, as its engine serves them.
      model: its tokenizer reads the responses.
      problems: the benchmark's problems, from the first one on.
      conditions: what the samples depend on.
      template: it finds the answers in the responses.
      pool: it scores the answers, by the template's reward.
      log: the log of this process.

    Raises:
      RunError: the engine does not accept a prompt, or log-probs are not finite.
    """
    key = jax.random.fold_in(make_key(conditions.seed), zlib.crc32(conditions.benchmark.encode()))
    size = max(1, SAMPLES_A_CALL // conditions.samples)
    awaited: tuple[_HostShare, list[SuiteProblem]] | None = None
    for number, start in enumerate(range(0, len(problems), size)):
        batch = list(problems[start : start + size])
        if not (missing := log.missing(conditions, batch)):
            continue
        rollout = _sample(engine, params, batch, conditions, jax.random.fold_in(key, number))
        mine = _begin_scoring(batch, rollout, model, template, pool)
        if awaited is not None:
            yield _log_scored(*awaited, conditions, log)
        awaited = mine, missing
    if awaited is not None:
        yield _log_scored(*awaited, conditions, log)


def _sample(
    engine: Qwen3Engine, params: ServingParams, batch: list[SuiteProblem], conditions: Conditions, key: jax.Array
) -> Rollout:
    try:
        rollout = sample_responses(
            engine,
            params,
            [problem.prompt for problem in batch],
            samples_per_prompt=conditions.samples,
            temperature=conditions.temperature,
            top_p=conditions.top_p,
            key=key,
        )
        require_finite(rollout, engine)
    except ValueError as error:
        raise RunError(str(error)) from None
    return rollout


def _begin_scoring(
    batch: list[SuiteProblem], rollout: Rollout, model: OpenedModel, template: Template, pool: RewardPool
) -> _HostShare:
    """Hands this host's share of a batch to the pool."""
    mine, samples = share(len(batch)), len(rollout.finished) // len(batch)
    problems, rows = batch[mine], slice(mine.start * samples, mine.stop * samples)
    rollout = jax.tree.map(lambda leaf: leaf[rows], rollout)
    texts, finished = responses(model.tokenizer, rollout), rollout.finished.tolist()
    return _HostShare(
        problems=problems,
        answers=[template.extract(text) if ended else None for text, ended in zip(texts, finished, strict=True)],
        lengths=rollout.response_mask.sum(axis=1).tolist(),
        finished=finished,
        scores=pool.submit(texts, [problem.answer for problem in problems for _ in range(samples)], finished),
    )


def _log_scored(mine: _HostShare, missing: list[SuiteProblem], conditions: Conditions, log: SampleLog) -> int:
    """Logs what was missing of a share, once its scores are complete; returns how many all hosts were missing.

    Raises:
      RunError: the pool cannot score.
    """
    try:
        rewards = mine.scores.result().tolist()
    except RuntimeError as error:
        raise RunError(one_line(error)) from error
    tell_timeouts(mine.scores.timeouts, len(rewards))
    for place, problem in enumerate(mine.problems):
        if problem not in missing:
            continue
        rows = slice(place * conditions.samples, (place + 1) * conditions.samples)
        samples = ProblemSamples(
            problem=problem.id,
            gold=problem.answer,
            answers=mine.answers[rows],
            rewards=rewards[rows],
            lengths=mine.lengths[rows],
            finished=mine.finished[rows],
        )
        log.append(conditions, samples)
    return len(missing)
