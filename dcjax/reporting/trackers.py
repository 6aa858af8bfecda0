"""Weights & Biases and MLflow: copies of what a run writes for itself, for those who look there.

`metrics.jsonl` is authoritative. A run that is resumed goes on in the same run of the tracker, which is found by what
identifies the run here; steps that are trained again are written again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from dcjax.errors import RunError


class Tracker(Protocol):
    """One run in one tracker."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step."""

    def attach(self, page: Path) -> None:
        """Adds the page of the run's report."""

    def close(self, failed: bool) -> None:
        """Ends this process's part of the run."""


class Trackers:
    """The trackers of a run, none where none is asked for. A context manager.

    Args:
      wandb: a project of Weights & Biases; None is none.
      mlflow: an experiment of MLflow; None is none.
      directory: of the run.
      identity: what tells the run from others (`run_directory.identity`).
      config: the run's settings, as in config.json.

    Raises:
      RunError: a tracker is not installed, or does not start.
    """

    def __init__(
        self, *, wandb: str | None, mlflow: str | None, directory: Path, identity: str, config: Mapping[str, Any]
    ):
        self._trackers: list[Tracker] = []
        number = hashlib.sha256(identity.encode()).hexdigest()[:16]
        if wandb:
            self._trackers.append(_Wandb(wandb, directory, number, config))
        if mlflow:
            self._trackers.append(_MLflow(mlflow, directory, number, config))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step."""
        for tracker in self._trackers:
            tracker.write(step, metrics)

    def attach(self, page: Path) -> None:
        """Adds the page of the run's report."""
        for tracker in self._trackers:
            tracker.attach(page)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in self._trackers:
            tracker.close(failed=kind is not None)


class _Wandb:
    """`WANDB_MODE=offline` keeps the run in its directory, in `wandb/`, from where `wandb sync` takes it."""

    def __init__(self, project: str, directory: Path, number: str, config: Mapping[str, Any]):
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise _missing("wandb", error) from None
        self._html = wandb.Html
        try:
            self._run = wandb.init(
                project=project,
                id=number,
                name=directory.name,
                resume="allow",
                dir=directory,
                config=dict(config),
                settings=wandb.Settings(silent=True),
            )
            # the library's own count of steps never goes back, as a run that is resumed does
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # of the library, whatever it is
            raise RunError(f"tracking.wandb is {project!r}, and Weights & Biases does not start: {error}") from None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step} | dict(metrics))

    def attach(self, page: Path) -> None:
        self._run.log({"report": self._html(page.read_text("utf-8"), inject=False)})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _MLflow:
    """`MLFLOW_TRACKING_URI` says where; without it MLflow takes the working directory."""

    def __init__(self, experiment: str, directory: Path, number: str, config: Mapping[str, Any]):
        try:
            from mlflow.tracking import MlflowClient
        except ModuleNotFoundError as error:
            raise _missing("mlflow", error) from None
        try:
            self._client = MlflowClient()
            found = self._client.get_experiment_by_name(experiment)
            where = self._client.create_experiment(experiment) if found is None else found.experiment_id
            runs = self._client.search_runs([where], f"tags.dcjax = '{number}'")
            if runs:
                self._run = runs[0].info.run_id
                self._client.update_run(self._run, status="RUNNING")
            else:
                self._run = self._client.create_run(where, run_name=directory.name, tags={"dcjax": number}).info.run_id
                self._client.log_dict(self._run, dict(config), "config.json")
        except Exception as error:
            raise RunError(f"tracking.mlflow is {experiment!r}, and MLflow does not start: {error}") from None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def attach(self, page: Path) -> None:
        self._client.log_artifact(self._run, str(page))

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


def _missing(name: str, error: ModuleNotFoundError) -> RunError:
    return RunError(f"tracking.{name} needs {error.name}, which is not installed: pip install 'dcjax[{name}]'")
