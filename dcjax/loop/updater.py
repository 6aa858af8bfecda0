"""One iteration's update: the compiled step on a batch, with a look at what came out of it."""

from __future__ import annotations

import dataclasses
import math
import sys
from functools import partial

import jax
import numpy as np

from dcjax.allocator import return_freed_memory
from dcjax.errors import RunError
from dcjax.loop.draw import Sampled
from dcjax.loop.self_checks import StepCheck
from dcjax.loop.setup import Setup
from dcjax.recipe import build
from dcjax.serving.rollout import require_finite
from dcjax.sharding.hosts import is_main, place
from dcjax.sharding.rules import batch_sharding
from dcjax.spans import span
from dcjax.types import Batch, TrainState

ALARM = 10
"""Iterations with λ at its bound while the gap rises, before a warning."""

LOWER = "lower optimizer.learning_rate"


class Updater:
    """(state, samples) -> (state, metrics): the training step, and the settings that it ran with."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self._step = build.compile_train_step(setup.config, setup.mesh)
        self._packing = setup.config.packing()
        self._learning_rate = build.optimizer_of(setup.config).learning_rate
        self._budget = build.objective_of(setup.config).budget
        self._check = StepCheck(setup.config) if setup.config.self_checks else None

    def __call__(self, state: TrainState, sampled: Sampled) -> tuple[TrainState, dict[str, float]]:
        """One iteration; `state` is donated.

        Raises:
          RunError: a log-prob, the loss or another metric is not finite; the batch is left in bad_batch.npz. Or what
            the step says of itself cannot be right.
        """
        number = int(state.step) + 1
        batch = Batch.of(sampled.rollout, rewards=sampled.rewards, group_size=sampled.group_size)
        try:
            require_finite(sampled.rollout, self._setup.engines["deployed"])
        except ValueError as error:
            self._stop(number, batch, str(error), "choose another serving.format")
        with span("packing") as ready:
            packed = self._packing(batch)
            placed = ready(self._with_reading(place(packed, batch_sharding(self._setup.mesh)), packed, sampled))
        # sampling leaves blocks of other sizes
        return_freed_memory()
        with span("update") as ready:
            state, metrics = ready(self._step(state, placed))
            values = build.metrics_to_host(metrics)
            settings = self._settings(number - 1, values)
        values |= {"columns_filled": self._packing.filled(packed)}
        if (at := int(values.pop("nonfinite_at"))) >= 0:
            where = divmod(at, batch.response_mask.shape[1])
            self._stop(number, batch, f"the trainer's log-prob at response, token {where} is not finite", LOWER)
        if broken := [name for name, value in values.items() if not math.isfinite(value)]:
            self._stop(number, batch, f"{', '.join(broken)} not finite", LOWER)
        if self._check is not None:
            self._check(number, values | settings)
        values = {name: value for name, value in values.items() if not name.startswith("check/")}
        if values.get("dual/saturated") == ALARM:
            self._warn_of_saturation(number, values["dual/multiplier"])
        return state, values | settings | sampled.metrics()

    def _with_reading(self, placed: Batch, packed: Batch, sampled: Sampled) -> Batch:
        """The batch with what the sampler's distributions are made of, in the order of its rows."""
        if sampled.reading is None:
            return placed
        hidden, rows = sampled.reading.hidden, self._packing.rows_before(packed)
        if (rows != np.arange(len(rows))).any():
            hidden = _rows_of(hidden, rows, hidden.sharding)
        return dataclasses.replace(placed, sampler_hidden=hidden, sampler_head=sampled.reading.head)

    def _settings(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """The learning rate, and a given budget, which is drawn beside the gap even where no λ follows it."""
        scheduled = float(np.asarray(self._learning_rate(step * self._setup.config.optimizer.updates)))
        settings = {"learning_rate": scheduled * metrics["learning_rate_scale"]}
        if self._budget is not None:
            settings["dual/budget"] = self._budget
        return settings

    def _warn_of_saturation(self, number: int, multiplier: float) -> None:
        print(
            f"dcjax: step {number}: λ has been at its upper bound, {multiplier:g}, for {ALARM} iterations while the "
            "gap rises; the penalty does not close it",
            file=sys.stderr,
        )

    def _stop(self, number: int, batch: Batch, why: str, remedy: str) -> None:
        path = self._setup.config.directory / "bad_batch.npz"
        if is_main():
            np.savez(path, **{name: value for name, value in vars(batch).items() if value is not None})
        raise RunError(
            f"step {number}: {why}; the batch is in {path}, the last good checkpoint stays; {remedy} or look at the "
            "batch"
        )


@partial(jax.jit, static_argnums=2)
def _rows_of(values: jax.Array, rows: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(values[rows], sharding)
