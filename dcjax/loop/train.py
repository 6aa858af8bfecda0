"""The loop: rollout → reward → step → log → checkpoint."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from dcjax.errors import Interrupted, RunError
from dcjax.loop.checkpoint import Checkpoints, LoopState
from dcjax.loop.environment import describe
from dcjax.loop.judging import open_scorer
from dcjax.loop.run_directory import check_data_agree, check_processes_agree, open_run
from dcjax.loop.trainer import Sampled, Trainer
from dcjax.recipe.build import abstract_state, with_pretrained_model
from dcjax.recipe.config import Config
from dcjax.reporting.progress import Progress
from dcjax.reporting.record import MetricsLog, Transcripts
from dcjax.reporting.run_report import write_report
from dcjax.sharding.hosts import Stopped, as_loss, is_main, join
from dcjax.types import TrainState


def train(config: Config) -> tuple[Path, Path] | None:
    """Runs, or resumes from the last checkpoint in the run directory; returns the report's picture and page.

    With several processes, the first draws the report, and the others return None.

    Raises:
      Interrupted: the launcher stops a process, or another one has gone; what was checkpointed stays.
      RunError: the run cannot start or go on; what was checkpointed stays.
    """
    join(config.distributed)
    check_processes_agree(config)
    config = with_pretrained_model(config)
    with open_scorer(config) as scorer:
        return _train(Trainer(config, scorer))


def _train(trainer: Trainer) -> tuple[Path, Path] | None:
    config = trainer.config
    check_data_agree(trainer.problems.fingerprint)
    with (
        open_run(config, data=trainer.problems.fingerprint, end_tokens=trainer.end_tokens) as directory,
        Checkpoints(directory / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
    ):
        try:
            if is_main():
                _save_tokenizer(trainer, directory / "tokenizer")
            _loop(trainer, directory, checkpoints)
        except Exception as error:
            if (loss := as_loss(error)) is None:
                raise
            raise loss from error
    return write_report(directory) if is_main() else None


def _loop(trainer: Trainer, directory: Path, checkpoints: Checkpoints) -> None:
    config = trainer.config
    restored = checkpoints.restore_latest(abstract_state(config, trainer.mesh))
    if is_main():
        print("\n".join(describe(config, trainer.mesh, trainer.engines["deployed"])), file=sys.stderr)
    state, loop = restored or trainer.begin()
    last_step = restored[1].step if restored else None
    with trainer.rollouts, _told(trainer, directory, last_step) as tell, trainer.preemption as preemption:
        if not restored:
            tell(0, trainer.evaluate(state), None)
            checkpoints.save(state, loop)
        while loop.step < config.steps:
            try:
                state, loop, metrics, sampled = trainer.iterate(state, loop)
            except Stopped:
                _stop(checkpoints, state, loop)
            if _due(loop.step, config.evaluation.every, config.steps):
                metrics |= trainer.evaluate(state)
            # logged before it is saved, so that a resumed run finds every line up to its checkpoint
            tell(loop.step, metrics, sampled)
            if preemption.announced(trainer.mesh):
                _stop(checkpoints, state, loop)
            if _due(loop.step, config.checkpoint.every, config.steps):
                checkpoints.save(state, loop)


def _stop(checkpoints: Checkpoints, state: TrainState, loop: LoopState) -> NoReturn:
    # which does nothing where the step is saved already
    checkpoints.save(state, loop)
    checkpoints.wait()
    raise Interrupted(f"stopped by SIGTERM; step {loop.step} is saved, and the same command goes on from it")


@contextlib.contextmanager
def _told(
    trainer: Trainer, directory: Path, last_step: int | None
) -> Iterator[Callable[[int, dict[str, float], Sampled | None], None]]:
    """What logs a step's metrics and samples and shows them; on process 0 only."""
    if not is_main():
        yield lambda step, metrics, sampled: None
        return
    config = trainer.config
    log, transcripts = _open_logs(directory, last_step)
    with log, transcripts, Progress(config.steps, initial=last_step or 0, description="step") as progress:

        def tell(step: int, metrics: dict[str, float], sampled: Sampled | None) -> None:
            if sampled is not None and _due(step, config.evaluation.every, config.steps):
                sampled.write(transcripts, trainer.tokenizer, step)
            log.write(step, metrics)
            if sampled is not None:
                progress.update(step, **_shown(metrics, trainer.deployed_accuracy))

        yield tell


def _save_tokenizer(trainer: Trainer, directory: Path) -> None:
    try:
        trainer.tokenizer.save_pretrained(directory)
    except Exception as error:  # the library's own, in Rust, is no OSError
        raise RunError(f"cannot write {directory}: {error}") from error


def _open_logs(directory: Path, last_step: int | None) -> tuple[MetricsLog, Transcripts]:
    path = directory / "metrics.jsonl"
    if last_step is not None and not path.exists():
        raise RunError(
            f"{path} is gone, of a run that has a checkpoint of step {last_step}; put it back, or remove both"
        )
    try:
        log = MetricsLog(directory, "metrics", last_step=last_step, tensorboard=True)
        return log, Transcripts(directory, last_step=last_step)
    except ValueError as error:
        raise RunError(f"{error}; mend that line, or choose another --run-dir to start anew") from error


def _due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def _shown(metrics: dict[str, float], deployed_accuracy: float | None) -> dict[str, str]:
    return {
        "reward": f"{metrics['reward']:.2f}",
        "deployed": "-" if deployed_accuracy is None else f"{deployed_accuracy:.2f}",
        "δ̄": f"{metrics['dual/discrepancy']:.4f}/{metrics['dual/budget']:.4f}",
        "λ": f"{metrics['dual/multiplier']:.3f}",
        "length": f"{metrics['response_length']:.1f}",
        "tok/s": f"{metrics['tokens_per_second']:.0f}",
    }
