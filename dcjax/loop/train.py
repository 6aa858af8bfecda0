"""The loop: sample, update, evaluate, log, save."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import numpy as np

from dcjax.errors import Interrupted, RunError
from dcjax.loop.checkpoint import Checkpoints, Cursor
from dcjax.loop.draw import Draw, Sampled
from dcjax.loop.early import join_others
from dcjax.loop.environment import describe, outline
from dcjax.loop.evaluate import evaluate_state
from dcjax.loop.logs import RunLog
from dcjax.loop.profiler import Profiler
from dcjax.loop.rollouts import Rollouts, open_rollouts
from dcjax.loop.run_directory import check_data_agree, identity, open_run
from dcjax.loop.sampler import Asynchronous, InTurns, Sampler
from dcjax.loop.setup import Checked, Setup, begin, check, set_up
from dcjax.loop.transcripts import transcribe
from dcjax.loop.updater import Updater
from dcjax.models.hf_config import GENERATION_CONFIG
from dcjax.recipe.build import abstract_state
from dcjax.recipe.config import Config
from dcjax.recipe.plain import to_dict
from dcjax.reporting.run_report import write_report
from dcjax.reporting.trackers import Trackers
from dcjax.sharding.hosts import Preemption, Stopped, as_loss, gather, is_main, threads_may_launch
from dcjax.spans import span
from dcjax.types import TrainState
from dcjax.user_code import CodeFile


def train(config: Config, recipe: CodeFile | None = None, *, profile: int | None = None) -> tuple[Path, Path] | None:
    """Runs, or resumes from the last checkpoint in the run directory; returns the report's picture and page.

    With several processes, the first draws the report, and the others return None.

    Args:
      config: of the run.
      recipe: the file that made it, which the run keeps a copy of; where None, the file of its sections' classes is
        kept, unless all are of dcjax or of installed packages.
      profile: how many of the iterations that this process makes first are profiled; None is none.

    Raises:
      Interrupted: the launcher stops a process, or another one has gone; what was checkpointed stays.
      RunError: the run cannot start or go on; what was checkpointed stays.
    """
    recipe = join_others(config, recipe)
    checked = check(config)
    check_data_agree(checked.problems.fingerprint)
    with open_run(
        checked.config,
        data=checked.problems.fingerprint,
        end_tokens=checked.end_tokens,
        recipe=recipe,
        started=checked.started,
    ) as directory:
        if not is_main():
            _train(checked, directory, recipe, profile, None)
            return None
        with _trackers(checked.config, directory) as trackers:
            _train(checked, directory, recipe, profile, trackers)
            picture, page = write_report(directory)
            trackers.attach(page)
    return picture, page


def _trackers(config: Config, directory: Path) -> Trackers:
    tracking = config.tracking
    told = {"directory": directory, "identity": identity(directory), "config": to_dict(config)}
    return Trackers(wandb=tracking.wandb, mlflow=tracking.mlflow, **told)


def _train(
    checked: Checked, directory: Path, recipe: CodeFile | None, profile: int | None, trackers: Trackers | None
) -> None:
    """Trains in a run's directory, which this process holds."""
    with (
        checked.rewards as rewards,
        Checkpoints(directory / "checkpoints", keep=checked.config.checkpoint.keep) as checkpoints,
        Profiler(directory, profile) as profiler,
    ):
        setup = set_up(checked, rewards, recipe)
        try:
            if is_main():
                _save_tokenizer(setup, directory / "tokenizer")
            _loop(setup, checkpoints, profiler, trackers)
        except Exception as error:
            if (loss := as_loss(error)) is None:
                raise
            raise loss from error


def _loop(setup: Setup, checkpoints: Checkpoints, profiler: Profiler, trackers: Trackers | None) -> None:
    config, preemption = setup.config, Preemption()
    restored = checkpoints.restore_latest(abstract_state(config, setup.mesh))
    if is_main():
        done = restored[1].step if restored else 0
        told = describe(config, setup.mesh, setup.engines["deployed"]) + outline(config, setup.mesh, done)
        print("\n".join(told), file=sys.stderr)
    updater = Updater(setup)
    state, cursor = restored or begin(setup)
    last_step = cursor.step if restored else None
    with (
        open_rollouts(setup) as rollouts,
        make_sampler(setup, preemption, rollouts) as sampler,
        RunLog(setup, last_step, trackers) as log,
        preemption,
    ):
        if not restored:
            log.phase("evaluation")
            log.write(0, evaluate_state(setup, state))
            checkpoints.save(state, cursor)
        while cursor.step < config.steps:
            with profiler.iteration(cursor.step + 1):
                stopwatch = Stopwatch(setup)
                log.phase("sampling")
                try:
                    sampled, following = sampler(state, cursor)
                except Stopped:
                    _stop(checkpoints, state, cursor)
                stopwatch.sampled()
                samples, evaluates = [], _due(following.step, config.evaluation.every, config.steps)
                if evaluates:
                    with span("transcripts"):
                        samples = transcribe(setup, state, sampled)
                log.phase("update")
                stopwatch.update_begins()
                state, metrics = updater(state, sampled)
                cursor = following
                metrics |= stopwatch.updated(sampled)
                if evaluates:
                    log.phase("evaluation")
                    sampler.settle()
                    with span("evaluation"):
                        metrics |= evaluate_state(setup, state)
                # logged before it is saved, so that a resumed run finds every line up to its checkpoint
                with span("log"):
                    log.write(cursor.step, metrics, samples)
                if preemption.announced(setup.mesh):
                    _stop(checkpoints, state, cursor)
                if _due(cursor.step, config.checkpoint.every, config.steps):
                    log.phase("checkpoint")
                    with span("checkpoint"):
                        checkpoints.save(state, cursor)


def make_sampler(setup: Setup, preemption: Preemption, rollouts: Rollouts) -> Sampler:
    """The sampler of a run: in turns with training, or asynchronous if `rollout.async_level` is above 0."""
    draw, level = Draw(setup, preemption, rollouts), setup.config.rollout.async_level
    if not level:
        return InTurns(draw, rollouts.sync)
    return Asynchronous(draw, rollouts.sync, level=level, steps=setup.config.steps, in_thread=threads_may_launch())


class Stopwatch:
    """Times one iteration, and counts the answers whose rewards were cut off meanwhile."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self._cut_off = self._counted()
        self._began = time.perf_counter()
        self._rollout = 0.0

    def sampled(self) -> None:
        """The samples are there."""
        self._rollout = time.perf_counter() - self._began

    def update_begins(self) -> None:
        """The update starts now; the time since the samples were there counts as neither."""
        self._began = time.perf_counter()

    def updated(self, sampled: Sampled) -> dict[str, float]:
        """Seconds, tokens a second and counts, by the names of metrics.jsonl."""
        update, tokens = time.perf_counter() - self._began, int(sampled.rollout.response_mask.sum())
        return {
            "time/rollout": self._rollout,
            "time/update": update,
            "tokens_per_second": tokens / (self._rollout + update),
            "rollout_tokens_per_second": tokens / sampled.seconds,
            "update_tokens_per_second": tokens / update,
            **{name: count - self._cut_off[name] for name, count in self._counted().items()},
        }

    def _counted(self) -> dict[str, int]:
        """How many answers of all processes have been cut off so far."""
        if self._setup.rewards.counters is None:
            return {}
        counters = asdict(self._setup.rewards.counters)
        totals = gather(np.array([[*counters.values()]], np.int32), self._setup.mesh).sum(axis=0)
        return {f"reward/{name}": int(count) for name, count in zip(counters, totals, strict=True)}


def _stop(checkpoints: Checkpoints, state: TrainState, cursor: Cursor) -> NoReturn:
    # which does nothing where the step is saved already
    checkpoints.save(state, cursor)
    checkpoints.wait()
    raise Interrupted(f"stopped by SIGTERM; step {cursor.step} is saved, and the same command goes on from it")


def _save_tokenizer(setup: Setup, directory: Path) -> None:
    """Writes the tokenizer, and for exports the configs of the model's folder as they were when the run was started."""
    try:
        setup.tokenizer.save_pretrained(directory)
        if (folder := setup.config.pretrained) is not None:
            for name in ("config.json", GENERATION_CONFIG):
                if (folder / name).is_file() and not (directory / name).exists():
                    shutil.copyfile(folder / name, directory / name)
    except Exception as error:  # the library's own, in Rust, is no OSError
        raise RunError(f"cannot write {directory}: {error}") from error


def _due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last
