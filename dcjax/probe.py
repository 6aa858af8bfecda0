"""Where the gap between the policies comes from: the same tokens, scored by one policy after another."""

from __future__ import annotations

import itertools
import json
import math
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from transformers import PreTrainedTokenizerFast

from dcjax.assemble import abstract_state, make_engine, params_shardings, starting_params, with_pretrained_model
from dcjax.checkpoint import Checkpoints
from dcjax.config import Config, RolloutConfig, ServingConfig
from dcjax.data.arithmetic import encode_prompts
from dcjax.errors import RunError
from dcjax.evaluate import HELDOUT_SEED
from dcjax.models import ModelConfig, token_logps
from dcjax.models.hf import INDEX, WEIGHTS
from dcjax.objective import make_discrepancy, make_mean_discrepancy
from dcjax.progress import Progress
from dcjax.rl.metrics import mismatch_metrics
from dcjax.run import load_config
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.mismatch import MismatchConfig
from dcjax.serving.quantize import FormatName, KVCacheName, formats, serving_format
from dcjax.serving.rollout import sample_responses
from dcjax.serving.scoring import DecodeScores, score_responses
from dcjax.serving.sync import ServingParams, stored_parameters
from dcjax.sharding.mesh import MeshConfig, make_mesh
from dcjax.sharding.rules import batch_sharding
from dcjax.types import Array, Params, Rollout

PROMPTS = 128
"""Sampled from, one response each, where nothing else is asked for."""
BUDGET_FACTOR = 1.5
"""Of δ̄ is the budget that is recommended: `dual_ascent`'s calibration_factor."""
WORST = 10
"""Tokens shown."""
CONTEXT = 24
"""Tokens shown before each of them, and a third as many behind."""
PROBABILITIES = (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)
"""Edges of the buckets by the training policy's probability."""
FIGURES = (
    *("prob_diff_mean", "prob_diff_p50", "prob_diff_p90", "prob_diff_p99", "prob_diff_max"),
    *("k3", "log_ppl_abs_diff", "log_ppl_abs_diff_per_token"),
)
"""Of `mismatch_metrics`, which says what each is."""

Gap = dict[str, float]
"""FIGURES by name."""

Logps = Float[Array, "B T"]

# --- the ladder ---


@dataclass(frozen=True)
class Served:
    """A policy that an engine samples from."""

    format: FormatName
    # never auto, so that equal policies are equal
    kv_cache: KVCacheName
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    # of earlier weights
    stale: bool = False

    @classmethod
    def of(cls, format: str, kv_cache: str = "auto") -> Served:
        """With `auto` replaced by the format's own cache."""
        chosen = serving_format(format, kv_cache)
        names = (name for name in typing.get_args(KVCacheName) if name != "auto")
        return cls(chosen.name, next(name for name in names if serving_format(format, name) == chosen))


class Rung(NamedTuple):
    """A policy of the ladder."""

    # what it adds to the one below, and in which kind or size
    name: str
    detail: str
    served: Served


def ladder(
    serving: ServingConfig, mismatch: MismatchConfig, *, trained_in: FormatName, stale_step: int | None = None
) -> list[Rung]:
    """From an engine that computes as the trainer does to the deployed one; each rung adds one source of the gap.

    Args:
      serving: the deployed format; what it does not have is no rung.
      mismatch: what is added to it on purpose, a rung each; of its staleness `stale_step` tells.
      trained_in: the dtype that the trainer computes in, by its format's name.
      stale_step: of the weights that are served; None are the trainer's own.
    """
    deployed, last = formats[serving.format], Served.of(serving.format, serving.kv_cache)
    wide = _unquantized_activations(serving.format, None)
    rungs = [Rung("decode_path", trained_in, Served.of(trained_in))]

    def add(name: str, detail: str, **changes: Any) -> None:
        rungs.append(Rung(name, detail, replace(rungs[-1].served, **changes)))

    if wide != trained_in:
        add("dtype", wide, format=wide, kv_cache=wide)
    if deployed.weights is not None:
        add("weights", deployed.weights, format=_unquantized_activations(serving.format, deployed.weights))
    if deployed.quantizes_activations:
        add("activations", typing.cast(str, deployed.weights), format=serving.format)
    if last.kv_cache != wide:
        add("kv_cache", last.kv_cache, kv_cache=last.kv_cache)
    for name in ("weight_noise", "logit_noise", "routing_flips"):
        if size := getattr(mismatch, name):
            add(name, f"{size:g}", mismatch=replace(rungs[-1].served.mismatch, **{name: size}))
    if stale_step is not None:
        add("stale_weights", f"step {stale_step}", stale=True)
    return rungs


def _unquantized_activations(name: FormatName, weights: str | None) -> FormatName:
    """The format with these weights whose activations are of the dtype of format `name`, as they are."""
    wanted = (formats[name].activations, weights, False)
    return next(
        other.name
        for other in formats.values()
        if (other.activations, other.weights, other.quantizes_activations) == wanted
    )


# --- what is measured, of arrays on the host ---


@dataclass(frozen=True)
class Stage:
    """What one source adds: the gap to the policy before, and to the trainer."""

    name: str
    detail: str
    own: Gap
    cumulative: Gap


_metrics = jax.jit(mismatch_metrics)


def gap(*, old_logps: Logps, rollout_logps: Logps, mask: Bool[Array, "B T"]) -> Gap:
    """FIGURES of the gap between two policies' log-probs of the same tokens."""
    measured = jax.device_get(_metrics(old_logps=old_logps, rollout_logps=rollout_logps, mask=mask))
    return {name: float(measured[name]) for name in FIGURES}


def decompose(trained: Logps, policies: Sequence[tuple[str, str, Logps]], mask: Bool[Array, "B T"]) -> list[Stage]:
    """A stage for each policy: name, detail and log-probs, in the order of the ladder."""
    stages, before = [], trained
    for name, detail, logps in policies:
        own = gap(old_logps=before, rollout_logps=logps, mask=mask)
        cumulative = gap(old_logps=trained, rollout_logps=logps, mask=mask)
        stages.append(Stage(name, detail, own, cumulative))
        before = logps
    return stages


def bucketed(
    difference: Float[np.ndarray, "B T"], of: Float[np.ndarray, "B T"], edges: Sequence[float], mask: np.ndarray
) -> list[dict[str, float]]:
    """δ by where each token's `of` lies: from an edge up to below the next; buckets without a token are left out."""
    place = np.digitize(of, edges[1:-1])
    rows = []
    for bucket, (low, high) in enumerate(itertools.pairwise(edges)):
        inside = difference[mask & (place == bucket)]
        if len(inside):
            figures = {"prob_diff_mean": float(inside.mean()), "prob_diff_max": float(inside.max())}
            rows.append({"from": low, "to": high, "tokens": len(inside)} | figures)
    return rows


def position_edges(length: int) -> list[int]:
    """0, 1, 2, 4, ... until a response of `length` tokens is covered."""
    return [0, *(2**power for power in range(max(length - 1, 0).bit_length() + 1))]


def by_layer(
    residuals: Float[np.ndarray, "N T L E"], reference: Float[np.ndarray, "N T L E"], mask: Bool[np.ndarray, "N T"]
) -> list[dict[str, float]]:
    """‖x − r‖ / ‖r‖ of the residual stream behind each layer, both norms over all tokens of the mask at once."""

    def norm(x: np.ndarray) -> float:
        return float(np.linalg.norm(x[mask].astype(np.float64)))

    rows = []
    for layer in range(reference.shape[2]):
        x, r = (values[:, :, layer].astype(np.float32) for values in (residuals, reference))
        rows.append({"layer": layer, "relative_error": norm(x - r) / norm(r)})
    return rows


def worst_tokens(
    rollout: Rollout, *, old_logps: Logps, rollout_logps: Logps, decode: Callable[[list[int]], str], count: int = WORST
) -> list[dict[str, Any]]:
    """The tokens of the largest δ, in their context; what a terminal could take for a command is escaped."""
    mask, width = np.asarray(rollout.response_mask), rollout.response_mask.shape[1]
    old, sampled = np.exp(old_logps), np.exp(rollout_logps)
    difference = np.where(mask, np.abs(old - sampled), -1.0)
    rows = []
    for place in np.argsort(-difference, axis=None, kind="stable")[: min(count, int(mask.sum()))]:
        row, position = divmod(int(place), width)
        real = np.concatenate([rollout.prompt_mask[row], mask[row]])
        at = rollout.prompt_mask.shape[1] + position
        before, behind = (
            np.asarray(rollout.tokens[row])[part][real[part]] for part in (slice(at), slice(at + 1, None))
        )
        pieces = {
            "before": before[-CONTEXT:],
            "token": np.asarray(rollout.tokens[row])[[at]],
            "behind": behind[: CONTEXT // 3],
        }
        rows.append(
            {"response": row, "position": position}
            | {name: visible(decode(ids.tolist())) for name, ids in pieces.items()}
            | {"trained": float(old[row, position]), "sampled": float(sampled[row, position])}
            | {"prob_diff": float(difference[row, position])}
        )
    return rows


def visible(text: str) -> str:
    """The text with escapes for what does not print: control characters, marks of direction, halves of surrogates."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def changed_experts(trained: Int[np.ndarray, "B S k M"], sampled: np.ndarray, fed: Bool[np.ndarray, "B S"]) -> Gap:
    """Shares of the tokens that were fed: those that any sparse layer sent to other experts, and the mean layer's."""
    changed = np.any(np.sort(trained, axis=-1) != np.sort(sampled, axis=-1), axis=-1)[fed]
    return {"any_layer": float(changed.any(axis=-1).mean()), "mean_layer": float(changed.mean())}


# --- the policies ---


class Weights(NamedTuple):
    """What the trainer holds, and what is served of it."""

    params: Params
    # None where the params are served
    stale: Params | None
    # of the served weights, which noise on them depends on
    version: int


class Scored(NamedTuple):
    """Of the training policy."""

    logps: Logps
    # as `Rollout.experts`; None without experts
    experts: Int[np.ndarray, "B S-1 M k"] | None


class Policies:
    """One model's training policy and engines for its served ones, each made once.

    Args:
      config: of the run, on one device; serving and mismatch are of each policy asked for.
      end_token: ends a response.
    """

    def __init__(self, config: Config, end_token: int):
        self.config, self._end_token, self._mesh = config, end_token, make_mesh(config.mesh)
        self._engines: dict[Served, Qwen3Engine] = {}

    def sample(self, served: Served, weights: Weights, prompts: Sequence[Sequence[int]], key: jax.Array) -> Rollout:
        """One response to each prompt.

        Raises:
          RunError: a prompt that does not fit, or as `score`.
        """
        engine, rollout = self._engine(served), self.config.rollout
        settings = {"temperature": rollout.temperature, "top_k": rollout.top_k, "top_p": rollout.top_p}
        try:
            return sample_responses(
                engine, _params(engine, served, weights), prompts, samples_per_prompt=1, key=key, **settings
            )
        except ValueError as error:
            raise RunError(str(error)) from None

    def score(
        self, served: Served, weights: Weights, rollout: Rollout, key: jax.Array, *, keeps_residuals: bool = False
    ) -> DecodeScores:
        """Log-probs of the whole softmax at the rollout's temperatures, and the residual stream where it is kept.

        Raises:
          RunError: the model, the hardware or its memory cannot serve that, or not in finite numbers.
        """
        engine = self._engine(served)
        params = _params(engine, served, weights)
        scores = score_responses(engine, params, rollout, key=key, keeps_residuals=keeps_residuals)
        _require_finite(f"format {served.format}", scores.logps)
        return scores

    def train(
        self, params: Params, rollout: Rollout, *, temperature: Array, replays: Rollout | None = None, mesh=None
    ) -> Scored:
        """Of the training forward, over the whole softmax; with `replays` over its support and with its experts."""
        config, width = self.config, rollout.response_mask.shape[1]
        mask = np.concatenate([rollout.prompt_mask, rollout.response_mask], axis=1)
        inputs = (rollout.tokens, mask, temperature, replays and replays.experts, replays and replays.support)
        parts = []
        for start in range(0, len(mask), config.optimizer.microbatch_size):
            # the last batch is filled up, so that one program serves all
            rows = np.resize(np.arange(start, len(mask))[: (size := config.optimizer.microbatch_size)], size)
            batch = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], inputs)
            batch = jax.device_put(batch, batch_sharding(self._mesh if mesh is None else mesh))
            parts.append(jax.device_get(_train(config.model, width, params, *batch)))
        logps, experts = jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(mask)], *parts)
        logps = np.where(rollout.response_mask, logps, 0.0)
        _require_finite("the trainer", logps)
        return Scored(logps, experts)

    def _engine(self, served: Served) -> Qwen3Engine:
        served = replace(served, stale=False)
        if served not in self._engines:
            # one prompt in each pass of the prefill: its cache's roundings then do not depend on how many are beside it
            most = min(self.config.serving.prefill_tokens, self.config.rollout.max_prompt_length)
            serving = replace(self.config.serving, format=served.format, kv_cache=served.kv_cache, prefill_tokens=most)
            config = replace(self.config, serving=serving, mismatch=served.mismatch)
            self._engines[served] = make_engine(config, self._mesh, self._end_token)
        return self._engines[served]


def _params(engine: Qwen3Engine, served: Served, weights: Weights) -> ServingParams:
    return engine.sync(weights.stale if served.stale else weights.params, weights.version)


def _require_finite(what: str, logps: Logps) -> None:
    if len(bad := np.argwhere(~np.isfinite(logps))):
        raise RunError(f"{what} gives log-prob {logps[tuple(bad[0])]} at response, token {tuple(bad[0].tolist())}")


@partial(jax.jit, static_argnums=(0, 1))
def _train(model: ModelConfig, width: int, params: Params, tokens, mask, temperature, experts, support):
    imposed = None if experts is None else jnp.moveaxis(experts, 2, 0).astype(jnp.int32)
    scores = token_logps(
        model,
        params,
        tokens,
        mask,
        response_length=width,
        temperature=temperature,
        experts=imposed,
        support=support,
    )
    return scores.logps, None if scores.router is None else jnp.moveaxis(scores.router.experts, 0, 2)


# --- the probe ---


@dataclass(frozen=True)
class Source:
    """A model with its settings and prompts, loaded."""

    name: str
    # None of a Hugging Face folder
    step: int | None
    # on one device
    config: Config
    # that it was trained on
    mesh: MeshConfig
    tokenizer: PreTrainedTokenizerFast
    prompts: list[list[int]]
    weights: Weights
    # of the weights that are served; None where they are the trainer's own
    stale_step: int | None
    # where results go, unless told otherwise
    out: Path


@dataclass(frozen=True)
class Probe:
    """What was measured; docs/probe.md tells how to read it."""

    source: str
    step: int | None
    format: FormatName
    kv_cache: KVCacheName
    responses: int
    tokens: int
    stages: list[Stage]
    # of training: what `mismatch/*` in metrics.jsonl is of
    total: Gap
    recommended_budget: float
    # by name: a gap on the same tokens and the bytes of the weights, or why there is none
    formats: dict[str, dict[str, Any]]
    by_position: list[dict[str, float]]
    by_probability: list[dict[str, float]]
    by_layer: list[dict[str, float]]
    worst_tokens: list[dict[str, Any]]
    sharding: dict[str, Any]
    sampling: dict[str, Any]
    # None without experts
    routing: dict[str, Any] | None


@dataclass
class _Measurement:
    """One source under the probe: what it sampled, and what each policy says of it."""

    source: Source
    policies: Policies
    rungs: list[Rung]
    key: jax.Array
    rollout: Rollout
    # of the whole softmax at the sampler's temperature, without replay
    trained: Scored
    # of the distribution that training compares with what was sampled: truncated, and with the sampler's experts
    # where the run replays them
    replayed: Logps
    logps: dict[Served, Logps] = field(default_factory=dict)
    # why a format is not there
    refused: dict[Served, str] = field(default_factory=dict)

    @property
    def mask(self) -> np.ndarray:
        return np.asarray(self.rollout.response_mask)

    @property
    def sampled(self) -> Logps:
        """What the engine sampled with, of the whole softmax as the ladder is."""
        return np.where(self.mask, self.rollout.rollout_logps + self.rollout.log_mass, 0.0)


def probe(source: Source, *, seed: int = 0) -> Probe:
    """Samples each prompt once from the deployed engine, and scores the same tokens by all policies.

    Raises:
      RunError: what is asked for cannot be served, or a prompt does not fit.
    """
    config = source.config
    rungs = ladder(
        config.serving, config.mismatch, trained_in=config.model.precision.compute, stale_step=source.stale_step
    )
    others = [served for name in formats if (served := Served.of(name)) not in {rung.served for rung in rungs}]
    with Progress(len(rungs) + len(others) + 3, initial=0, description="policy") as progress:
        measured = _sample(source, rungs, jax.random.key(seed))
        progress.update(2, scored="sampled, trainer")
        asked = [*((rung.name, rung.served) for rung in rungs), *((served.format, served) for served in others)]
        for number, (name, served) in enumerate(asked):
            _score(measured, served, required=number < len(rungs))
            progress.update(number + 3, scored=name.replace("_", " "))
        result = _measure(measured)
        progress.update(len(asked) + 3, scored="layers, beside the ladder")
    return result


def _sample(source: Source, rungs: list[Rung], key: jax.Array) -> _Measurement:
    config = source.config
    # recorded for the share of tokens that change their experts
    recording = replace(config, rollout=replace(config.rollout, replay_routing=bool(config.model.num_experts)))
    policies = Policies(recording, source.tokenizer.eos_token_id)
    rollout = policies.sample(rungs[-1].served, source.weights, source.prompts, key)
    trained = policies.train(source.weights.params, rollout, temperature=rollout.temperature)
    replayed, replays = trained.logps, _replays(config, rollout)
    if replays is not None:
        replayed = policies.train(
            source.weights.params, rollout, temperature=rollout.temperature, replays=replays
        ).logps
    return _Measurement(source, policies, rungs, key, rollout, trained, replayed)


def _replays(config: Config, rollout: Rollout) -> Rollout | None:
    """The rollout with what the run's trainer replays of it; None where that is nothing."""
    if rollout.support is None and not config.rollout.replay_routing:
        return None
    return replace(rollout, experts=rollout.experts if config.rollout.replay_routing else None)


def _score(measured: _Measurement, served: Served, *, required: bool) -> None:
    try:
        scores = measured.policies.score(served, measured.source.weights, measured.rollout, measured.key)
        measured.logps[served] = scores.logps
    except RunError as error:
        if required:
            raise
        measured.refused[served] = str(error)


def _measure(measured: _Measurement) -> Probe:
    source, mask, rollout = measured.source, measured.mask, measured.rollout
    old, sampled = measured.replayed, rollout.rollout_logps
    policies = [(rung.name, rung.detail, measured.logps[rung.served]) for rung in measured.rungs]
    difference = np.abs(np.exp(old) - np.exp(sampled))
    positions = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)

    def decode(ids: list[int]) -> str:
        return str(source.tokenizer.decode(ids))

    return Probe(
        source=source.name,
        step=source.step,
        format=measured.rungs[-1].served.format,
        kv_cache=measured.rungs[-1].served.kv_cache,
        responses=len(mask),
        tokens=int(mask.sum()),
        stages=decompose(measured.trained.logps, [*policies, ("as_sampled", "", measured.sampled)], mask),
        total=gap(old_logps=old, rollout_logps=sampled, mask=mask),
        recommended_budget=_budget(source.config, old, sampled, mask),
        formats={name: _format(measured, name) for name in formats},
        by_position=bucketed(difference, positions, position_edges(mask.shape[1]), mask),
        by_probability=bucketed(difference, np.exp(old), PROBABILITIES, mask),
        by_layer=_by_layer(measured),
        worst_tokens=worst_tokens(rollout, old_logps=old, rollout_logps=sampled, decode=decode),
        sharding=_sharding(measured),
        sampling=_sampling(measured),
        routing=_routing(measured),
    )


def _budget(config: Config, old: Logps, sampled: Logps, mask: np.ndarray) -> float:
    """What objective.budget auto makes of one such iteration, in the unit of the run's own δ."""
    delta = make_discrepancy(config.objective)(old_logps=old, rollout_logps=sampled, mask=mask)
    return BUDGET_FACTOR * float(make_mean_discrepancy(config.objective)(delta, mask))


def _format(measured: _Measurement, name: FormatName) -> dict[str, Any]:
    """Without what the run adds on purpose, and of its present weights."""
    served, config = Served.of(name), measured.source.config
    if served in measured.refused:
        return {"not_served": measured.refused[served]}
    stored = stored_parameters(config.model, serving_format(name), config.serving.keep)
    return gap(old_logps=measured.trained.logps, rollout_logps=measured.logps[served], mask=measured.mask) | {
        "bytes": sum(parameter.bytes for parameter in stored),
        "float32_bytes": sum(parameter.float32_bytes for parameter in stored),
        "quantized": [parameter.name for parameter in stored if parameter.quantized],
    }


def _by_layer(measured: _Measurement) -> list[dict[str, float]]:
    """Of the deployed policy, against the first rung, on as many responses as are decoded at once."""
    few = jax.tree.map(lambda x: x[: measured.source.config.serving.slots], measured.rollout)
    residuals, reference = (
        measured.policies.score(rung.served, measured.source.weights, few, measured.key, keeps_residuals=True).residuals
        for rung in (measured.rungs[-1], measured.rungs[0])
    )
    assert residuals is not None and reference is not None
    return by_layer(residuals, reference, np.asarray(few.response_mask))


def _sharding(measured: _Measurement) -> dict[str, Any]:
    """The training forward on the run's mesh, or over two devices where that is one, against one device."""
    source, rollout = measured.source, measured.rollout
    several = source.mesh if math.prod(astuple(source.mesh)) > 1 else MeshConfig(tensor=2)
    try:
        config, mesh = replace(source.config, mesh=several), make_mesh(several)
        params = jax.device_put(source.weights.params, params_shardings(config, mesh))
    except ValueError as error:
        return {"not_measured": str(error)}
    scored = measured.policies.train(params, rollout, temperature=rollout.temperature, mesh=mesh)
    sizes = {name: size for name, size in vars(several).items() if size > 1}
    return {"mesh": sizes} | gap(old_logps=measured.trained.logps, rollout_logps=scored.logps, mask=measured.mask)


def _sampling(measured: _Measurement) -> dict[str, Any]:
    """The trainer's distribution without temperature and truncation, against the one with them."""
    settings, rollout = measured.source.config.rollout, measured.rollout
    replays = _replays(measured.source.config, rollout)
    plain = measured.policies.train(
        measured.source.weights.params,
        rollout,
        temperature=np.ones_like(rollout.temperature),
        replays=None if replays is None else replace(replays, support=None),
    )
    return {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p")} | gap(
        old_logps=plain.logps, rollout_logps=measured.replayed, mask=measured.mask
    )


def _routing(measured: _Measurement) -> dict[str, Any] | None:
    """How many tokens the trainer sends to other experts than the sampler did, and the gap with and without replay."""
    rollout, mask, trained = measured.rollout, measured.mask, measured.trained
    if trained.experts is None:
        return None
    params, replays = measured.source.weights.params, replace(rollout, support=None)
    replayed = measured.policies.train(params, rollout, temperature=rollout.temperature, replays=replays)
    real = np.concatenate([rollout.prompt_mask, mask], axis=1)
    # the last token of a response is never fed
    shares = changed_experts(trained.experts, np.asarray(rollout.experts), real[:, :-1] & real[:, 1:])
    gaps = {
        name: gap(old_logps=scored.logps, rollout_logps=measured.sampled, mask=mask)
        for name, scored in (("without_replay", trained), ("with_replay", replayed))
    }
    return {"changed_experts": shares} | gaps


# --- sources ---


def load_source(
    path: Path,
    *,
    format: str | None = None,
    kv_cache: str | None = None,
    prompts: int | None = None,
    prompts_file: Path | None = None,
    stale_step: int | None = None,
) -> Source:
    """A run's newest checkpoint, one checkpoint in a run, or a Hugging Face folder.

    Args:
      path: a run directory, RUN/checkpoints/STEP, or a folder.
      format: serving format; None is the run's, or the default of `ServingConfig`.
      kv_cache: likewise.
      prompts: how many; PROMPTS where None.
      prompts_file: of a folder, one prompt a line: {"prompt": ...} or the text itself.
      stale_step: of a run, the checkpoint whose weights are served.

    Raises:
      RunError: no such source, a damaged one, or a setting out of range or of the other kind of source.
    """
    path = path.resolve()
    count = PROMPTS if prompts is None else prompts
    if count < 1:
        raise RunError(f"prompts is {count}; it must be at least 1")
    serving = {name: value for name, value in (("format", format), ("kv_cache", kv_cache)) if value is not None}
    try:
        if (path / WEIGHTS).exists() or (path / INDEX).exists():
            if stale_step is not None:
                raise RunError(f"stale is {stale_step}; {path} is a Hugging Face folder, which has one set of weights")
            return _load_folder(path, serving, prompts_file, count)
        if prompts_file is not None:
            raise RunError(f"prompts-file is {prompts_file}; {path} is a run, whose held-out problems are the prompts")
        return _load_run(path, serving, stale_step, count)
    except ValueError as error:
        raise RunError(str(error)) from None


def _load_run(path: Path, serving: dict[str, Any], stale_step: int | None, count: int) -> Source:
    is_step = path.name.isdecimal() and path.parent.name == "checkpoints"
    run_dir, step = (path.parent.parent, int(path.name)) if is_step else (path, None)
    recorded = load_config(run_dir)
    config = replace(recorded, mesh=MeshConfig(), serving=replace(recorded.serving, **serving))
    like, checkpoints = abstract_state(config, make_mesh(config.mesh)), Checkpoints(run_dir / "checkpoints")
    state, loop = checkpoints.restore(checkpoints.latest() if step is None else step, like)
    if stale_step is not None:
        stale = checkpoints.restore(stale_step, like)[0].params
    else:
        stale, stale_step = (
            (state.history[0], max(loop.step - len(state.history), 0)) if state.history else (None, None)
        )
    version = loop.step if stale_step is None else stale_step
    tokenizer = _tokenizer(run_dir / "tokenizer")
    problems = config.task.problems("heldout", HELDOUT_SEED, 0, count)
    return Source(
        name=run_dir.name,
        step=loop.step,
        config=config,
        mesh=recorded.mesh,
        tokenizer=tokenizer,
        prompts=encode_prompts(tokenizer, problems),
        weights=Weights(state.params, stale, version),
        stale_step=stale_step,
        out=run_dir / "probe",
    )


def _load_folder(path: Path, serving: dict[str, Any], prompts_file: Path | None, count: int) -> Source:
    if prompts_file is None:
        raise RunError(f"{path} is a Hugging Face folder, which has no prompts; give some with --prompts-file")
    tokenizer = _tokenizer(path)
    if tokenizer.eos_token_id is None:
        raise RunError(f"the tokenizer in {path} has no end token; a response could not end")
    prompts = [tokenizer(text)["input_ids"] for text in read_prompts(prompts_file)[:count]]
    rollout = RolloutConfig()
    longest = max(rollout.max_prompt_length, *map(len, prompts))
    config = with_pretrained_model(
        Config(
            pretrained=path,
            rollout=replace(rollout, max_prompt_length=longest),
            serving=ServingConfig(**serving),
        )
    )
    return Source(
        name=path.name,
        step=None,
        config=config,
        mesh=config.mesh,
        tokenizer=tokenizer,
        prompts=prompts,
        weights=Weights(starting_params(config, make_mesh(config.mesh)), None, 0),
        stale_step=None,
        out=Path("probe"),
    )


def _tokenizer(path: Path) -> PreTrainedTokenizerFast:
    if not path.is_dir():
        raise RunError(f"no tokenizer in {path}; dcjax train writes it when it starts")
    try:
        return PreTrainedTokenizerFast.from_pretrained(path)
    except Exception as error:  # the library's own, in Rust, is no ValueError
        raise RunError(f"no tokenizer can be read in {path}: {str(error).splitlines()[0]}") from None


def read_prompts(path: Path) -> list[str]:
    """One prompt a line, {"prompt": ...} or the text itself; empty lines are none.

    Raises:
      RunError: a line in braces that is not such an object, no text in UTF-8, or no prompt at all.
    """
    try:
        prompts = list(_prompts(path, path.read_text(encoding="utf-8")))
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is not UTF-8: {error}") from None
    if not prompts:
        raise RunError(f"{path} has no prompt; it takes one a line")
    return prompts


def _prompts(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            yield line.rstrip("\r")
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError):
            prompt = None
        if not isinstance(prompt, str) or not prompt:
            raise RunError(f'{path}, line {number}: {line[:60]!r} is no JSON object with a text "prompt"')
        yield prompt
