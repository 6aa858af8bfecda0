"""The loop: rollout → reward → step → log → checkpoint."""

from __future__ import annotations

from pathlib import Path

from dcjax.assemble import abstract_state, with_pretrained_model
from dcjax.checkpoint import Checkpoints
from dcjax.config import Config
from dcjax.errors import RunError
from dcjax.progress import Progress
from dcjax.record import MetricsLog, Transcripts
from dcjax.report import write_report
from dcjax.run import open_run
from dcjax.trainer import Trainer


def train(config: Config) -> tuple[Path, Path]:
    """Runs, or resumes from the last checkpoint in the run directory; returns the report's picture and page.

    Raises:
      RunError: the run cannot start or go on; what was checkpointed stays.
    """
    config = with_pretrained_model(config)
    trainer = Trainer(config)
    with (
        open_run(config) as directory,
        Checkpoints(directory / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
    ):
        _save_tokenizer(trainer, directory / "tokenizer")
        _loop(trainer, directory, checkpoints)
    return write_report(directory)


def _loop(trainer: Trainer, directory: Path, checkpoints: Checkpoints) -> None:
    config = trainer.config
    restored = checkpoints.restore_latest(abstract_state(config, trainer.mesh))
    last_step = restored[1].step if restored else None
    log, transcripts = _open_logs(directory, last_step)
    with log, transcripts:
        if restored:
            state, loop = restored
        else:
            state, loop = trainer.begin()
            log.write(0, trainer.evaluate(state))
            checkpoints.save(state, loop)
        with Progress(config.steps, initial=loop.step, description="step") as progress:
            while loop.step < config.steps:
                state, loop, metrics, sampled = trainer.iterate(state, loop)
                if _due(loop.step, config.evaluation.every, config.steps):
                    metrics |= trainer.evaluate(state)
                    sampled.write(transcripts, loop.step)
                # logged before it is saved, so that a resumed run finds every line up to its checkpoint
                log.write(loop.step, metrics)
                progress.update(loop.step, **_shown(metrics, trainer.deployed_accuracy))
                if _due(loop.step, config.checkpoint.every, config.steps):
                    checkpoints.save(state, loop)


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
