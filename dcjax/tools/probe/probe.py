"""Where the gap between the policies comes from: the same tokens, scored by one policy after another."""

from __future__ import annotations

import math
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Any

import jax
import numpy as np

from dcjax.errors import RunError
from dcjax.keys import make_key
from dcjax.models.parallel.forward import check_model
from dcjax.recipe.build import objective_of, params_shardings
from dcjax.recipe.config import Config
from dcjax.recipe.forward import Chunks, Scored
from dcjax.reporting.progress import Progress
from dcjax.rl.discrepancy import DistributionGap
from dcjax.rl.dual import CALIBRATION_FACTOR
from dcjax.serving.formats import Format, KVCacheName, formats, serving_format
from dcjax.serving.sync import stored_parameters
from dcjax.sharding.mesh import MeshConfig, make_mesh
from dcjax.tools.probe.gaps import (
    Gap,
    Logps,
    Stage,
    bucketed,
    by_layer,
    changed_experts,
    decompose,
    gap,
    position_edges,
    worst_tokens,
)
from dcjax.tools.probe.ladder import RAW_LOGPS, Rung, Served, ladder
from dcjax.tools.probe.policies import Policies
from dcjax.tools.probe.source import Source
from dcjax.types import Rollout

PROBABILITIES = (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)
"""The edges of the buckets by the training policy's probability."""


@dataclass(frozen=True)
class Probe:
    """What was measured, and written as JSON; docs/probe.md explains how to read it."""

    source: str
    step: int | None
    format: str
    kv_cache: KVCacheName
    responses: int
    max_response_length: int
    """The longest response that was allowed, in tokens."""
    tokens: int
    stages: list[Stage]
    total: Gap
    """The gap that training sees, which `mismatch/*` in metrics.jsonl measures."""
    recommended_budget: float | None
    formats: dict[str, dict[str, Any]]
    """For each format, by name, the gap on the same tokens and the bytes of the weights, or why there is none."""
    by_position: list[dict[str, float]]
    by_probability: list[dict[str, float]]
    by_layer: list[dict[str, float]]
    worst_tokens: list[dict[str, Any]]
    sharding: dict[str, Any]
    sampling: dict[str, Any]
    chunks: dict[str, dict[str, Any]]
    """The training forward in other chunks than the run's, by what is cut otherwise: sequences a pass, head."""
    routing: dict[str, Any] | None
    """The experts of trainer and sampler compared; None if the model has none."""


@dataclass
class _Measurement:
    """A probe in progress: what was sampled, and the log-probs that each policy gives to it."""

    source: Source
    policies: Policies
    rungs: list[Rung]
    key: jax.Array
    rollout: Rollout
    trained: Scored
    """The training policy over the whole softmax at the sampler's temperature, without replay."""
    replayed: Logps
    """The training policy as training compares it with what was sampled: over the truncated distribution, and with the
    sampler's experts where the run replays them."""
    logps: dict[Served, Logps] = field(default_factory=dict)
    residuals: dict[Served, np.ndarray] = field(default_factory=dict)
    """The residual streams of the first and the last rung, of the responses that are decoded at once."""
    refused: dict[Served, str] = field(default_factory=dict)
    """Why a policy cannot be served."""

    @property
    def mask(self) -> np.ndarray:
        """bool [B, T]: the tokens of the responses."""
        return np.asarray(self.rollout.response_mask)

    @property
    def sampled(self) -> Logps:
        """The engine's log-probs as it sampled, over the whole softmax as the ladder's are."""
        return np.where(self.mask, self.rollout.rollout_logps + self.rollout.log_mass, 0.0)


def probe(source: Source, *, seed: int = 0) -> Probe:
    """Samples each prompt once from the deployed engine, and scores the same tokens by all policies.

    Raises:
      RunError: the seed is out of range, a required policy cannot be served, or a prompt does not fit.
    """
    if not 0 <= seed < 2**63:
        raise RunError(f"seed is {seed}; it must be at least 0 and below 2**63")
    config = source.model.config
    rungs = ladder(
        config.serving, config.mismatch, trained_in=config.model.precision.compute, stale_step=source.stale_step
    )
    climbed = {rung.served for rung in rungs}
    others = [served for format in _compared(config).values() if (served := Served.of(format)) not in climbed]
    total = len(rungs) + len(others) + 2
    with Progress(total, initial=0, description="policy") as progress:

        def begin(number: int, phase: str) -> None:
            progress.update(number, format=rungs[-1].served.format.name, now=phase.replace("_", " "))

        begin(0, "sampling, trainer")
        measured = _sample(source, rungs, make_key(seed))
        for number, rung in enumerate(rungs, start=1):
            begin(number, rung.name)
            _score(measured, rung.served)
        for number, served in enumerate(others, start=len(rungs) + 1):
            begin(number, f"beside it {served.format.name}")
            _read(measured, served)
        begin(total - 1, "layers, beside the ladder")
        result = _measure(measured)
        begin(total, "measured")
    return result


def _sample(source: Source, rungs: list[Rung], key: jax.Array) -> _Measurement:
    """Samples from the deployed policy, and scores what was sampled by the training policy."""
    config = source.model.config
    # Experts are recorded to measure the share of tokens that go to other ones.
    recording = replace(config, rollout=replace(config.rollout, replay_routing=bool(config.model.num_experts)))
    policies = Policies(recording, source.model.end_tokens)
    rollout = policies.sample(rungs[-1].served, source.weights, source.prompts, key)
    trained = policies.train(source.weights.params, rollout)
    replayed, replays = trained.logps, _replays(config, rollout)
    if replays is not None:
        replayed = policies.train(source.weights.params, rollout, replays=replays).logps
    return _Measurement(source, policies, rungs, key, rollout, trained, replayed)


def _replays(config: Config, rollout: Rollout) -> Rollout | None:
    """The rollout with only what the run's trainer replays of it; None if it replays nothing."""
    if rollout.candidate_tokens is None and not config.rollout.replay_routing:
        return None
    return replace(rollout, experts=rollout.experts if config.rollout.replay_routing else None)


def _score(measured: _Measurement, served: Served) -> None:
    """Scores the samples by a rung of the ladder, token by token as it would sample them."""
    keeps_residuals = served in (measured.rungs[0].served, measured.rungs[-1].served)
    scores = measured.policies.score(
        served, measured.source.weights, measured.rollout, measured.key, keeps_residuals=keeps_residuals
    )
    measured.logps[served] = scores.logps
    if scores.residuals is not None:
        measured.residuals[served] = scores.residuals


def _read(measured: _Measurement, served: Served) -> None:
    """Scores the samples by a policy beside the ladder, in one pass; such a one may fail to be served."""
    try:
        measured.logps[served] = measured.policies.read(served, measured.source.weights, measured.rollout)
    except RunError as error:
        measured.refused[served] = str(error)


def _measure(measured: _Measurement) -> Probe:
    """The gaps between all that was scored."""
    source, mask, rollout = measured.source, measured.mask, measured.rollout
    old, sampled = measured.replayed, rollout.rollout_logps
    difference = np.abs(np.exp(old) - np.exp(sampled))
    positions = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)

    def decode(ids: list[int]) -> str:
        return str(source.model.tokenizer.decode(ids))

    return Probe(
        source=source.model.name,
        step=source.model.step,
        format=measured.rungs[-1].served.format.name,
        kv_cache=measured.rungs[-1].served.kv_cache,
        responses=len(mask),
        max_response_length=mask.shape[1],
        tokens=int(mask.sum()),
        stages=_stages(measured),
        total=gap(old_logps=old, rollout_logps=sampled, mask=mask),
        recommended_budget=_budget(source.model.config, old, sampled, mask),
        formats={name: _format(measured, format) for name, format in _compared(source.model.config).items()},
        by_position=bucketed(difference, positions, position_edges(mask.shape[1]), mask),
        by_probability=bucketed(difference, np.exp(old), PROBABILITIES, mask),
        by_layer=_by_layer(measured),
        worst_tokens=worst_tokens(rollout, old_logps=old, rollout_logps=sampled, decode=decode),
        sharding=_sharding(measured),
        sampling=_sampling(measured),
        chunks=_chunks(measured),
        routing=_routing(measured),
    )


def _stages(measured: _Measurement) -> list[Stage]:
    """The ladder's, of the whole softmax; of log-probs without the sampler's transform, the whole transform's gap."""
    policies = [(rung.name, rung.detail, measured.logps[rung.served]) for rung in measured.rungs]
    policies.append(("as_sampled", "", measured.sampled))
    stages = decompose(measured.trained.logps, policies, measured.mask)
    rung = measured.rungs[-1]
    if rung.name != RAW_LOGPS or not measured.source.model.config.rollout.top_k:
        return stages
    # top-k and top-p are no part of the ladder: what the engine would have said, and does not
    served = replace(rung.served, mismatch=replace(rung.served.mismatch, raw_logps=False))
    scored = measured.policies.score(
        served, measured.source.weights, measured.rollout, measured.key, truncates=True
    ).logps
    own = gap(old_logps=scored, rollout_logps=measured.sampled, mask=measured.mask)
    whole = gap(old_logps=measured.replayed, rollout_logps=measured.sampled, mask=measured.mask)
    return [*stages[:-2], replace(stages[-2], own=own, cumulative=whole), replace(stages[-1], cumulative=whole)]


def _budget(config: Config, old: Logps, sampled: Logps, mask: np.ndarray) -> float | None:
    """The budget that `objective.budget auto` would set after such an iteration, in the unit of the run's own δ; None
    where that is of whole distributions, which are not compared here."""
    objective = objective_of(config)
    if isinstance(objective.discrepancy, DistributionGap):
        return None
    delta = objective.discrepancy(old_logps=old, rollout_logps=sampled, mask=mask)
    return CALIBRATION_FACTOR * float(objective.mean_discrepancy(delta, mask))


def _compared(config: Config) -> dict[str, Format]:
    """The formats whose gaps are compared, by name: those that dcjax has, and the run's own."""
    own = serving_format(config.serving.format)
    return {**formats, own.name: own}


def _format(measured: _Measurement, format: Format) -> dict[str, Any]:
    """The gap of a format with the trainer's weights, without any mismatch that the run adds on purpose."""
    served, config = Served.of(format), measured.source.model.config
    if served in measured.refused:
        return {"not_served": measured.refused[served]}
    stored = stored_parameters(config.model, format, config.serving.keep)
    return gap(old_logps=measured.trained.logps, rollout_logps=measured.logps[served], mask=measured.mask) | {
        "bytes": sum(parameter.bytes for parameter in stored),
        "float32_bytes": sum(parameter.float32_bytes for parameter in stored),
        "quantized": [parameter.name for parameter in stored if parameter.quantized],
    }


def _by_layer(measured: _Measurement) -> list[dict[str, float]]:
    """The deployed policy's residual stream against the first rung's, of the responses that are decoded at once."""
    residuals, reference = (measured.residuals[measured.rungs[place].served] for place in (-1, 0))
    return by_layer(residuals, reference, measured.mask[: len(residuals)])


def _sharding(measured: _Measurement) -> dict[str, Any]:
    """The training forward on the run's mesh, or on two devices if that has one, against one device."""
    model, rollout = measured.source.model, measured.rollout
    several = model.trained_on if math.prod(astuple(model.trained_on)) > 1 else MeshConfig(tensor=2)
    try:
        check_model(model.config.model, asdict(several))
        mesh = make_mesh(several)
        params = jax.device_put(measured.source.weights.params, params_shardings(model.config, mesh))
    except ValueError as error:
        return {"not_measured": str(error)}
    scored = measured.policies.train(params, rollout, mesh=mesh)
    sizes = {name: size for name, size in vars(several).items() if size > 1}
    return {"mesh": sizes} | gap(old_logps=measured.trained.logps, rollout_logps=scored.logps, mask=measured.mask)


def _sampling(measured: _Measurement) -> dict[str, Any]:
    """The trainer's distribution without temperature and truncation, against the one with them."""
    settings, rollout = measured.source.model.config.rollout, measured.rollout
    replays = _replays(measured.source.model.config, rollout)
    plain = measured.policies.train(
        measured.source.weights.params,
        replace(rollout, temperature=np.ones_like(rollout.temperature)),
        replays=None if replays is None else replace(replays, candidate_tokens=None),
    )
    return {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p")} | gap(
        old_logps=plain.logps, rollout_logps=measured.replayed, mask=measured.mask
    )


def _chunks(measured: _Measurement) -> dict[str, dict[str, Any]]:
    """The training forward with one sequence a pass (eight where the run has one), and in eighths of its head's chunks.

    The mathematics is the same; what differs is how products of other shapes round, and sum.
    """
    params, rollout = measured.source.weights.params, measured.rollout
    own = Chunks.of_run(measured.policies.config, rollout.tokens.shape[1])
    whole_head = min(own.head, measured.mask.shape[1])
    own = own._replace(sequences=min(own.sequences, len(measured.mask)), head=whole_head)
    others = {
        "sequences": own._replace(sequences=8 if own.sequences == 1 else 1),
        "head": own._replace(head=max(1, whole_head // 8)),
    }
    found = {}
    for name, chunks in others.items():
        scored = measured.policies.train(params, rollout, chunks=chunks)
        sizes = {"own": getattr(own, name), "other": getattr(chunks, name)}
        found[name] = sizes | gap(old_logps=measured.trained.logps, rollout_logps=scored.logps, mask=measured.mask)
    return found


def _routing(measured: _Measurement) -> dict[str, Any] | None:
    """How many tokens the trainer sends to other experts than the sampler did, and the gap with and without replay."""
    rollout, mask, trained = measured.rollout, measured.mask, measured.trained
    if trained.experts is None:
        return None
    params, replays = measured.source.weights.params, replace(rollout, candidate_tokens=None)
    replayed = measured.policies.train(params, rollout, replays=replays)
    real = np.asarray(rollout.attention_mask)
    # The last token of a response is never fed.
    shares = changed_experts(trained.experts, np.asarray(rollout.experts), real[:, :-1] & real[:, 1:])
    gaps = {
        name: gap(old_logps=scored.logps, rollout_logps=measured.sampled, mask=mask)
        for name, scored in (("without_replay", trained), ("with_replay", replayed))
    }
    return {"changed_experts": shares} | gaps
