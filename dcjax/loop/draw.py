"""What is drawn in one iteration: prompts, their responses, and the rewards of these."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dcjax.data.task import Curriculum, Problem, Problems, encode_prompts
from dcjax.keys import as_key
from dcjax.loop.checkpoint import Cursor
from dcjax.loop.reward_collector import RewardCollector, Scores
from dcjax.loop.rollouts import Rollouts
from dcjax.loop.self_checks import SampleCheck
from dcjax.loop.setup import Setup
from dcjax.recipe.build import objective_of, reads_sampler
from dcjax.serving.scoring import Reading
from dcjax.sharding.hosts import Preemption
from dcjax.spans import span
from dcjax.types import Rollout
from dcjax.user_code import refusals_of

SAMPLING_ROUNDS = 5
"""The most rounds of sampling in one iteration where groups of equal rewards are sampled anew."""


@dataclass(frozen=True)
class Sampled:
    """An iteration's responses, G neighbouring ones a problem."""

    problems: Sequence[Problem]
    rollout: Rollout
    scores: Scores
    # every problem that the task gave for them, those of groups that were left out included, and which share of the
    # responses to it was right
    attempted: Sequence[tuple[Problem, float]]
    # that it took to sample and to reward them, of all rounds
    seconds: float
    # of all responses, where the objective reads the sampler's whole distributions
    reading: Reading | None = None
    # of a curriculum, as these problems were drawn
    levels: Mapping[str, float] = field(default_factory=dict)

    @property
    def prompts_taken(self) -> int:
        """How many prompts the task gave."""
        return len(self.attempted)

    @property
    def rewards(self) -> np.ndarray:
        """Of each response, float32 [N]."""
        return self.scores.rewards

    @property
    def group_size(self) -> int:
        """Responses a problem."""
        return len(self.rewards) // len(self.problems)

    def of_groups(self, groups: np.ndarray) -> Sampled:
        """The same of some problems, by their numbers."""
        rows = (groups[:, None] * self.group_size + np.arange(self.group_size)).reshape(-1)
        return replace(
            self,
            problems=[self.problems[group] for group in groups],
            rollout=jax.tree.map(lambda leaf: leaf[rows], self.rollout),
            scores=self.scores.of_rows(rows),
        )

    def metrics(self) -> dict[str, float]:
        """What is logged of it, by the names of metrics.jsonl."""
        levels = {f"curriculum/{name}": float(level) for name, level in self.levels.items()}
        return {"prompts_taken": self.prompts_taken} | self.scores.part_means() | levels

    @classmethod
    def joined(cls, parts: list[Sampled]) -> Sampled:
        """One after the other."""
        return cls(
            problems=[problem for part in parts for problem in part.problems],
            rollout=jax.tree.map(lambda *leaves: np.concatenate(leaves), *(part.rollout for part in parts)),
            scores=Scores.joined([part.scores for part in parts]),
            attempted=[each for part in parts for each in part.attempted],
            seconds=sum(part.seconds for part in parts),
        )


class Draw:
    """(what serves, cursor) -> (samples for the iteration that the cursor stands before, the cursor behind it).

    Args:
      setup: of the run.
      preemption: is asked while samples are drawn.
      rollouts: gives the responses.
    """

    def __init__(self, setup: Setup, preemption: Preemption, rollouts: Rollouts):
        self._setup, self._preemption, self._rollouts = setup, preemption, rollouts
        self._check = SampleCheck()

    def __call__(self, serving: Any, cursor: Cursor) -> tuple[Sampled, Cursor]:
        """Draws one iteration.

        Raises:
          RunError: a reward function that fails, no server that could sample, or samples that are not drawn anew.
          Stopped: a process was told to stop; nothing of the iteration is kept.
        """
        key, rollout_key = jax.random.split(as_key(jnp.array(cursor.rollout_key, jnp.uint32)))
        self._check.begins(cursor.step)
        problems, progress, levels = self._setup.problems, cursor.progress, {}
        curriculum = problems if isinstance(problems, Curriculum) else None
        if curriculum is not None:
            problems, levels = curriculum.at(progress), curriculum.levels(progress)
        sampled = self._once(serving, problems, cursor.data_cursor, rollout_key)
        if objective_of(self._setup.config).requires.mixed_groups:
            sampled = self._without_equal_groups(sampled, serving, problems, cursor.data_cursor, rollout_key)
        if self._setup.config.self_checks and not self._setup.config.mismatch.raw_logps:
            self._check.sampled(sampled.rollout, sampled.group_size)
        if reads_sampler(self._setup.config):
            with span("read") as ready:
                sampled = replace(sampled, reading=ready(self._rollouts.read(serving, sampled.rollout)))
        following = Cursor(
            step=cursor.step + 1,
            data_cursor=cursor.data_cursor + sampled.prompts_taken,
            rollout_key=jax.random.key_data(key).tolist(),
            progress=progress if curriculum is None else curriculum.after(progress, sampled.attempted),
        )
        return replace(sampled, levels=levels), following

    def _without_equal_groups(
        self, sampled: Sampled, serving: Any, problems: Problems, cursor: int, key: jax.Array
    ) -> Sampled:
        """Problems whose rewards differ within their group, of as many rounds as it takes (DAPO's dynamic sampling).

        What `SAMPLING_ROUNDS` cannot fill is filled with groups of equal rewards, which the objective drops.
        """
        wanted, rounds = len(sampled.problems), [sampled]
        while True:
            joined = Sampled.joined(rounds)
            grouped = joined.rewards.reshape(-1, joined.group_size)
            equal = grouped.max(axis=1) == grouped.min(axis=1)
            if (~equal).sum() >= wanted or len(rounds) == SAMPLING_ROUNDS:
                # stable: groups that differ first, each kind in the order in which it was sampled
                return joined.of_groups(np.argsort(equal, kind="stable")[:wanted])
            key_of_round = jax.random.fold_in(key, len(rounds))
            rounds.append(self._once(serving, problems, cursor + joined.prompts_taken, key_of_round))

    def _once(self, serving: Any, supply: Problems, cursor: int, key: jax.Array) -> Sampled:
        """One round: the responses to the next prompts, rewarded while others are still decoded."""
        setup, settings, engine = self._setup, self._setup.config.rollout, self._setup.engines["deployed"]
        began = time.perf_counter()
        if setup.config.self_checks:
            self._check.key(key)
        with span("data"):
            with refusals_of(setup.config.task, supply):
                problems = supply.problems("train", setup.config.seed, cursor, settings.prompts)
            prompts = encode_prompts(setup.tokenizer, problems)
        collector = RewardCollector(setup.rewards, setup.tokenizer, problems, samples_per_prompt=settings.group_size)
        sampling = self._rollouts.begin(serving, prompts, key)
        for ended in sampling.as_they_end(serving):
            with span("rewards"):
                collector.submit(ended)
            self._preemption.check(engine.mesh)
        rollout = sampling.rollout()
        with span("rewards"):
            scores = collector.result().of_all_processes(engine.mesh)
            with refusals_of(setup.config.task):
                solved = setup.config.task.solved(scores.graded)
            scores = replace(scores, rewards=scores.rewards + self._length_rewards(rollout))
        shares = np.mean(np.reshape(solved, (len(problems), -1)), axis=1).tolist()
        attempted = list(zip(problems, shares, strict=True))
        return Sampled(problems, rollout, scores, attempted, time.perf_counter() - began)

    def _length_rewards(self, rollout: Rollout) -> np.ndarray:
        config, lengths = self._setup.config, np.asarray(rollout.response_mask).sum(axis=1)
        with refusals_of(config.reward):
            return config.reward.length_rewards(lengths, max_response_length=config.rollout.max_response_length)
