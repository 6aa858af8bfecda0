"""Checks that a run makes of itself, and that end it where something is wired wrongly: docs/self_checks.md.

None of them looks at what a run may well do: the gap between the policies may grow by orders of magnitude, rewards may
fall, weights may be far from where they began.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from dcjax.errors import RunError
from dcjax.recipe.config import Config
from dcjax.recipe.rollout import IN_PROCESS
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.fingerprint import Comparison
from dcjax.serving.mismatch import NO_MISMATCH
from dcjax.serving.sync import ServingParams
from dcjax.types import Params, Rollout

SERVED_TOLERANCE = 1e-3
"""How far what is served may be from what its masters give, ‖ΔW‖ / ‖W‖: programs may differ in the last bit of a scale,
and a value on the edge between two then rounds to the other."""
FORMAT_TOLERANCE = 0.9
"""How far what a format gives may be from the masters. One bit a weight costs .6; of zeros, or of twice the scale,
it is 1."""
UNRELATED, JUMP = 0.25, 10.0
"""Mean |p − q| that only unrelated policies have, and the factor by which it has grown within one iteration."""
NEVER = 30.0
"""Nats: what has a smaller probability than exp(-30) in an iteration does not happen."""
DENOMINATOR_TOLERANCE = 1e-3
"""Of float32 sums of counts, or of shares of them."""


def fail(check: str, found: str, causes: str) -> NoReturn:
    """Ends the run, on one line."""
    raise RunError(
        f"self-check of {check}: {found}; the usual causes: {causes}; the last good checkpoint stays, and "
        "self_checks=false goes on without these checks"
    )


class WeightCheck:
    """(masters, what serves, version), after a sync: what serves is those masters in the engine's format.

    Args:
      engine: that the weights are for.
      training: the mesh of the masters.
    """

    def __init__(self, engine: Qwen3Engine, training: Mesh):
        self._compare, self._format = Comparison(engine.conversion, engine.mesh, training), engine.format.name

    def __call__(self, masters: Params, served: ServingParams, version: int) -> None:
        """Compares version and weights.

        Raises:
          RunError: they are of another version, or of other masters.
        """
        if (found := int(served.version)) != version:
            fail("served weights", f"they are of version {found}, expected {version}", "a sync that kept old weights")
        deviations = self._compare(masters, served, version)
        if (worst := deviations.served).size > SERVED_TOLERANCE:
            fail(
                "served weights",
                f"at version {version} {worst} is {worst.size:.2g} of its norm away from the trainer's in format "
                f"{self._format}, expected at most {SERVED_TOLERANCE:g}",
                "a layer left stale by a sync, experts or layers in another order, garbled values or scales",
            )
        if (worst := deviations.format).size > FORMAT_TOLERANCE and not self._compare.conversion.weight_noise:
            fail(
                "the serving format",
                f"{worst} in format {self._format} is {worst.size:.2g} of its norm away from the trainer's, expected "
                f"at most {FORMAT_TOLERANCE:g}",
                "an encode and a decode that do not fit each other, scales of the wrong axis",
            )

    def compile(self, masters: Params, served: ServingParams) -> None:
        """Compiles its programs, for abstract masters and what is served of them."""
        self._compare.compile(masters, served)


class SampleCheck:
    """What an iteration samples is drawn anew: with another key, and no long response twice for one prompt.

    That two samples of one prompt are equal has a probability, which the sampler's own log-probs say.
    """

    def __init__(self):
        self._step = -1
        # of the round and of the iteration before
        self._key: list[int] | None = None
        self._last: np.ndarray | None = None

    def begins(self, step: int) -> None:
        """An iteration is begun; one that was made before, or an earlier one, is compared with nothing."""
        if step <= self._step:
            self._key = self._last = None
        self._step = step

    def key(self, key: jax.Array) -> None:
        """A round of sampling begins with a key.

        Raises:
          RunError: the one before had the same.
        """
        data = np.asarray(jax.random.key_data(key)).tolist()
        if data == self._key:
            fail("random keys", f"two rounds of sampling in a row have the key {data}", "a seed that is constant")
        self._key = data

    def sampled(self, rollout: Rollout, group_size: int) -> None:
        """All that an iteration sampled, the responses to one prompt side by side.

        Raises:
          RunError: responses are equal that cannot be by chance.
        """
        tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.response_mask)
        rows = np.where(np.asarray(rollout.attention_mask), tokens, -1)
        surprise = -np.where(mask, rollout.rollout_logps, 0.0).sum(axis=1, dtype=np.float64)
        neighbours = np.arange(len(rows) - 1)[np.arange(1, len(rows)) % group_size > 0]
        pairs = {"two samples of one prompt": (rows[neighbours], rows[neighbours + 1], surprise[neighbours])}
        if self._last is not None and self._last.shape == rows.shape:
            pairs["a sample and that of the iteration before"] = (rows, self._last, surprise)
        for what, (these, those, nats) in pairs.items():
            equal = (these == those).all(axis=1) & (nats > NEVER + np.log(max(len(nats), 1)))
            if equal.any():
                fail(
                    "samples",
                    f"{what} are equal in {int(equal.sum())} of {len(equal)} places, expected none where a response "
                    f"has a probability of exp(-{nats[equal].min():.0f}) or less",
                    "a seed that is constant, keys that are shared between samples, prompts that do not move on",
                )
        self._last = rows


class StepCheck:
    """What an update reports of itself is what its settings mean."""

    def __init__(self, config: Config):
        # the gap is of numerics alone where the weights that sampled are those that are compared, under one transform
        mismatch = config.mismatch
        self._compares = config.rollout.engine == IN_PROCESS and not mismatch.staleness and not mismatch.raw_logps
        # what is added on purpose may be of any size
        self._adds = mismatch != NO_MISMATCH
        self._updates, self._ahead = config.optimizer.updates, config.rollout.async_level > 0
        # of the iteration before, None where this process did not make it
        self._gap: float | None = None
        self._moved = False

    def __call__(self, number: int, metrics: Mapping[str, float]) -> None:
        """An iteration, from 1, has these metrics, all finite, the learning rate's among them.

        Raises:
          RunError: they cannot be right.
        """
        self._check_gap(number, metrics["mismatch/prob_diff_mean"])
        self._check_ratio(number, metrics)
        if abs((found := metrics["check/denominator_share"]) - 1) > DENOMINATOR_TOLERANCE:
            fail(
                "the loss's normaliser",
                f"at step {number} it is {found:.3g} of the whole minibatch's, expected 1",
                "a denominator of each microbatch, or of each device",
            )

    def _check_gap(self, number: int, gap: float) -> None:
        """Policies that were related an iteration before are not unrelated now; what grows takes longer."""
        before = 0.0 if number == 1 and not self._adds else self._gap
        self._gap = gap
        if self._compares and before is not None and gap > max(UNRELATED, JUMP * before):
            fail(
                "sampled tokens",
                f"at step {number} their probabilities differ by {gap:.2g} between trainer and sampler, on average, "
                f"expected at most {max(UNRELATED, JUMP * before):.2g} after {before:.2g} in the iteration before",
                "a cache or positions that are not those of the prompt, experts in another order, weights of another "
                "policy",
            )

    def _check_ratio(self, number: int, metrics: Mapping[str, float]) -> None:
        """The ratio is 1 where old log-probs are those of the same pass, and leaves it where parameters have moved."""
        ratio, before = metrics["check/log_ratio"], self._moved
        self._moved = bool(metrics["learning_rate"] and metrics.get("grad_norm"))
        if "staleness/prob_diff_max" not in metrics:
            expected = "0, with one update on samples of the same parameters"
            right = ratio == 0
        else:
            expected = "more than 0, as the parameters have moved since; the clip cannot act"
            right = ratio > 0 or not ((self._moved and self._updates > 1) or (before and self._ahead))
        if not right:
            fail(
                "the clip",
                f"at step {number} the log-ratio that it sees is up to {ratio:.2g}, on average over responses, "
                f"expected {expected}",
                "old log-probs of other parameters than those that sampled, updates that 16-bit parameters round away",
            )
