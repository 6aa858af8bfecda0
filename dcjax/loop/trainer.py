"""What one iteration of the loop does, with everything it needs assembled once."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerFast

from dcjax.data.task import Problem, encode_prompts
from dcjax.errors import RunError
from dcjax.loop.checkpoint import LoopState
from dcjax.loop.compile_ahead import compiled_beside
from dcjax.loop.end_tokens import starting_end_tokens
from dcjax.loop.evaluate import Accuracy, Policy, evaluate, make_engines, open_problems, responses
from dcjax.loop.judging import Judging, check_golds
from dcjax.loop.rollouts import Rollouts
from dcjax.loop.run_directory import check_end_tokens_agree
from dcjax.loop.warm_start import warm_start
from dcjax.recipe import build as assemble
from dcjax.recipe.config import Config
from dcjax.recipe.optimizer import make_optimizer, make_schedule
from dcjax.reporting.record import Transcripts
from dcjax.rewards.scorer import Scorer
from dcjax.rewards.shaping import soft_overlong_punishment
from dcjax.rl.averaging import averaged_params
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.rollout import Ended, require_finite, sample_responses
from dcjax.serving.sync import ServingParams
from dcjax.sharding.hosts import Preemption, check_divides, gather, is_main, place, threads_may_launch
from dcjax.sharding.rules import batch_sharding
from dcjax.types import Batch, Params, Rollout, TrainState

TRANSCRIPTS = 4
"""Prompts whose first response is kept at each evaluation."""

SAMPLING_ROUNDS = 5
"""At most so many in one iteration, where groups of equal rewards are sampled anew."""

LOWER = "lower optimizer.learning_rate"

ALARM = 10
"""Iterations with λ at its bound while the gap rises, before a warning."""


@dataclass(frozen=True)
class Sampled:
    """An iteration's responses, G neighbouring ones a problem."""

    problems: Sequence[Problem]
    rollout: Rollout
    rewards: np.ndarray
    # prompts that the task gave for them, those of groups that were left out included
    prompts_taken: int

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
            rewards=self.rewards[rows],
        )

    @classmethod
    def joined(cls, parts: list[Sampled]) -> Sampled:
        """One after the other."""
        return cls(
            problems=[problem for part in parts for problem in part.problems],
            rollout=jax.tree.map(lambda *leaves: np.concatenate(leaves), *(part.rollout for part in parts)),
            rewards=np.concatenate([part.rewards for part in parts]),
            prompts_taken=sum(part.prompts_taken for part in parts),
        )

    def write(self, transcripts: Transcripts, tokenizer: PreTrainedTokenizerFast, step: int) -> None:
        """Records the first response of some prompts."""
        rows = np.arange(len(self.problems))[:TRANSCRIPTS] * self.group_size
        texts = responses(tokenizer, jax.tree.map(lambda leaf: leaf[rows], self.rollout))
        for row, text in zip(rows, texts, strict=True):
            transcripts.write(
                step,
                prompt=self.problems[row // self.group_size].prompt,
                response=text,
                reward=float(self.rewards[row]),
                finished=bool(self.rollout.finished[row]),
                policy_version=int(self.rollout.versions[row, 0]),
            )


class Trainer:
    """The run's machinery: mesh, tokenizer, engines and the compiled step.

    Args:
      config: of the run.
      scorer: judges responses, as `open_scorer` gives it.

    Raises:
      RunError: the mesh needs more devices than there are, the vocabulary does not fit the model, or the ids that end a
        response are not in it.
    """

    def __init__(self, config: Config, scorer: Scorer):
        self.config, self._scorer = config, scorer
        try:
            self.tokenizer = config.task.build_tokenizer(config.pretrained)
            self.problems = open_problems(config, self.tokenizer)
            for split in ("train", "heldout"):
                self.problems.problems(split, config.seed, 0, 1)
            check_golds(config, self.problems)
            self.mesh = assemble.training_mesh(config)
        except ValueError as error:
            raise RunError(str(error)) from None
        if len(self.tokenizer) > config.model.vocab_size:
            raise RunError(f"model.vocab_size is {config.model.vocab_size}; the tokenizer needs {len(self.tokenizer)}")
        check_divides(
            self.mesh,
            serving=config.serving.devices,
            prompts=config.rollout.prompts,
            heldout=config.evaluation.prompts,
        )
        self.end_tokens = starting_end_tokens(config, self.tokenizer)
        check_end_tokens_agree(self.end_tokens)
        self.engines = make_engines(config, self.mesh, self.end_tokens)
        self.rollouts = Rollouts(
            self._sample,
            self.engines["deployed"].sync,
            ahead=config.rollout.ahead,
            steps=config.steps,
            in_thread=config.rollout.ahead > 0 and threads_may_launch(),
        )
        self.preemption = Preemption()
        self.deployed_accuracy: float | None = None
        self._step = assemble.compile_train_step(config, self.mesh)
        self._schedule = make_schedule(config)

    def begin(self) -> tuple[TrainState, LoopState]:
        """The state before RL: fresh parameters, warmed up."""
        with compiled_beside(self.config, self.mesh, self.engines):
            params = warm_start(self.config, self.mesh, self.tokenizer)
        key = jax.random.fold_in(jax.random.key(self.config.seed), 1)
        loop = LoopState(step=0, data_cursor=0, rollout_key=jax.random.key_data(key).tolist())
        tx, kept = make_optimizer(self.config), assemble.PastParams.needed_by(self.config)
        return assemble.initial_state(self.config, self.mesh, tx, params, kept), loop

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Held-out accuracies of both policies, by the names of metrics.jsonl."""
        rows = self._accuracies(self.engines, state.params, int(state.step))
        measured = {f"eval/{row.policy}_accuracy": row.accuracy for row in rows}
        if self.config.optimizer.ema_decay:
            average = averaged_params(state.opt_state, state.params)
            deployed: dict[Policy, Qwen3Engine] = {"deployed_ema": self.engines["deployed"]}
            (row,) = self._accuracies(deployed, average, int(state.step))
            measured["eval/deployed_accuracy_ema"] = row.accuracy
        self.deployed_accuracy = measured["eval/deployed_accuracy"]
        return measured | {"eval/prompts": self.config.evaluation.prompts}

    def _accuracies(self, engines: dict[Policy, Qwen3Engine], params: Params, version: int) -> list[Accuracy]:
        settings = (self.config, self.tokenizer, self.problems, self._scorer, engines, params, version)
        return self.rollouts.between(lambda: evaluate(*settings))

    def iterate(self, state: TrainState, loop: LoopState) -> tuple[TrainState, LoopState, dict[str, float], Sampled]:
        """One RL iteration; `state` is donated.

        Raises:
          RunError: a log-prob, the loss or another metric is not finite; the batch is left in bad_batch.npz.
          Stopped: a process was told to stop while samples were drawn; `state` and `loop` are what they were.
        """
        started = time.perf_counter()
        stopped = self._stopped_answers()
        sampled, following = self.rollouts.take(state, loop)
        rolled_out = time.perf_counter()
        state, metrics = self._update(state, loop, sampled)
        ended = time.perf_counter()

        tokens = int(sampled.rollout.response_mask.sum())
        metrics |= {
            "time/rollout": rolled_out - started,
            "time/update": ended - rolled_out,
            "tokens_per_second": tokens / (ended - started),
        }
        metrics |= {name: count - stopped[name] for name, count in self._stopped_answers().items()}
        return state, following, metrics, sampled

    def _sample(self, serving: ServingParams, loop: LoopState) -> tuple[Sampled, LoopState]:
        key, rollout_key = jax.random.split(jax.random.wrap_key_data(jnp.array(loop.rollout_key, jnp.uint32)))
        sampled = self._sample_once(serving, loop.data_cursor, rollout_key)
        if self.config.objective.zero_variance == "resample":
            sampled = self._without_equal_groups(sampled, serving, loop.data_cursor, rollout_key)
        following = LoopState(
            step=loop.step + 1,
            data_cursor=loop.data_cursor + sampled.prompts_taken,
            rollout_key=jax.random.key_data(key).tolist(),
        )
        return sampled, following

    def _without_equal_groups(self, sampled: Sampled, serving: ServingParams, cursor: int, key: jax.Array) -> Sampled:
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
            rounds.append(
                self._sample_once(serving, cursor + joined.prompts_taken, jax.random.fold_in(key, len(rounds)))
            )

    def _sample_once(self, serving: ServingParams, cursor: int, key: jax.Array) -> Sampled:
        config, engine = self.config, self.engines["deployed"]
        problems = self.problems.problems("train", config.seed, cursor, config.rollout.prompts)
        judging = Judging(self._scorer, self.tokenizer, problems, samples_per_prompt=config.rollout.group_size)

        def on_ended(ended: Ended) -> None:
            judging.begin(ended)
            self.preemption.check(engine.mesh)

        rollout = sample_responses(
            engine,
            serving,
            encode_prompts(self.tokenizer, problems),
            samples_per_prompt=config.rollout.group_size,
            temperature=config.rollout.temperature,
            top_k=config.rollout.top_k,
            top_p=config.rollout.top_p,
            key=key,
            on_ended=on_ended,
        )
        rewards = gather(judging.result(), engine.mesh) + self._length_rewards(rollout)
        return Sampled(problems, rollout, rewards, len(problems))

    def _length_rewards(self, rollout: Rollout) -> np.ndarray | float:
        """What responses earn for their length (DAPO's overlong shaping), at most 0."""
        settings = self.config.reward
        if not settings.overlong_buffer:
            return 0.0
        return soft_overlong_punishment(
            np.asarray(rollout.response_mask).sum(axis=1),
            max_length=self.config.rollout.max_response_length,
            buffer=settings.overlong_buffer,
            factor=settings.overlong_factor,
        )

    def _stopped_answers(self) -> dict[str, int]:
        """How many answers the scorers of all processes have stopped so far, by the names of metrics.jsonl."""
        if self._scorer.counters is None:
            return {}
        counters = asdict(self._scorer.counters)
        totals = gather(np.array([[*counters.values()]], np.int32), self.mesh).sum(axis=0)
        return {f"reward/{name}": int(count) for name, count in zip(counters, totals, strict=True)}

    def _update(self, state: TrainState, loop: LoopState, sampled: Sampled) -> tuple[TrainState, dict[str, float]]:
        config, rollout, rewards = self.config, sampled.rollout, sampled.rewards
        batch = Batch.of(rollout, rewards=rewards, group_size=config.rollout.group_size)
        try:
            require_finite(rollout, self.engines["deployed"])
        except ValueError as error:
            self._stop(loop, batch, str(error), "choose another serving.format")
        state, metrics = self._step(state, place(batch, batch_sharding(self.mesh)))
        metrics = assemble.metrics_to_host(metrics)
        if (at := int(metrics.pop("nonfinite_at"))) >= 0:
            where = divmod(at, batch.response_mask.shape[1])
            self._stop(loop, batch, f"the trainer's log-prob at response, token {where} is not finite", LOWER)
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            self._stop(loop, batch, f"{', '.join(broken)} not finite", LOWER)
        if metrics.get("dual/saturated") == ALARM:
            bound = config.objective.max_multiplier
            print(
                f"dcjax: step {loop.step + 1}: λ has been at objective.max_multiplier, {bound}, for {ALARM} iterations "
                "while the gap rises; the penalty does not close it",
                file=sys.stderr,
            )
        return state, self._with_settings(loop, metrics) | {"prompts_taken": sampled.prompts_taken}

    def _with_settings(self, loop: LoopState, metrics: dict[str, float]) -> dict[str, float]:
        """The same with the learning rate, and with a given budget drawn beside the gap even where no λ follows it."""
        scheduled = float(np.asarray(self._schedule(loop.step * self.config.optimizer.updates)))
        settings = {"learning_rate": scheduled * metrics["learning_rate_scale"]}
        budget = self.config.objective.budget
        if not isinstance(budget, str):
            settings["dual/budget"] = budget
        return metrics | settings

    def _stop(self, loop: LoopState, batch: Batch, why: str, remedy: str) -> None:
        path = self.config.directory / "bad_batch.npz"
        if is_main():
            np.savez(path, **{name: value for name, value in vars(batch).items() if value is not None})
        raise RunError(
            f"step {loop.step + 1}: {why}; the batch is in {path}, the last good checkpoint stays; "
            f"{remedy} or look at the batch"
        )
