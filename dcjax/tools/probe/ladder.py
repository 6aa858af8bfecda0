"""The policies between the trainer's and the deployed one, each with one more source of the gap."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from dcjax.recipe.serving import ServingConfig
from dcjax.serving.formats import Format, KVCacheName, serving_format, wide_format
from dcjax.serving.mismatch import MismatchConfig

RAW_LOGPS = "raw_logps"
"""The rung of log-probs that leave the sampler's transform out."""


@dataclass(frozen=True)
class Served:
    """A policy that an engine samples from."""

    format: Format
    kv_cache: KVCacheName
    """What keys and values are stored in; never auto, so that equal policies are equal."""
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    """What is added to the policy on purpose."""
    stale: bool = False
    """Whether earlier weights are served."""

    @classmethod
    def of(cls, format: str | Format, kv_cache: KVCacheName = "auto") -> Served:
        """The policy of a format, with the format's own cache in place of `auto`."""
        chosen = serving_format(format)
        return cls(chosen, chosen.own_kv_cache if kv_cache == "auto" else kv_cache)


class Rung(NamedTuple):
    """A policy of the ladder."""

    name: str
    """What it adds to the rung below."""
    detail: str
    """The kind or the size of what it adds."""
    served: Served


def ladder(
    serving: ServingConfig, mismatch: MismatchConfig, *, trained_in: str, stale_step: int | None = None
) -> list[Rung]:
    """The policies from one that computes as the trainer does to the deployed one; each adds one source of the gap.

    Args:
      serving: how the deployed policy is served; a source of the gap that it lacks has no rung.
      mismatch: what is added to it on purpose, one rung for each kind but staleness, which `stale_step` gives.
      trained_in: the dtype that the trainer computes in, by its format's name.
      stale_step: the step of the weights that are served; None if they are the trainer's own.
    """
    deployed, last = serving_format(serving.format), Served.of(serving.format, serving.kv_cache)
    wide = Served.of(wide_format(deployed.activations))
    rungs = [Rung("decode_path", trained_in, Served.of(trained_in))]

    def add(name: str, detail: str, **changes: Any) -> None:
        rungs.append(Rung(name, detail, replace(rungs[-1].served, **changes)))

    if wide.format.name != trained_in:
        add("dtype", wide.format.name, format=wide.format, kv_cache=wide.kv_cache)
    if deployed.weights is not None:
        add("weights", deployed.weights, format=deployed.weight_only)
        if deployed.quantizes_activations:
            add("activations", deployed.weights, format=deployed)
    if last.kv_cache != wide.kv_cache:
        add("kv_cache", last.kv_cache, kv_cache=last.kv_cache)
    for name in ("rounded_masters", "weight_noise", "logit_noise", "routing_flips"):
        if size := getattr(mismatch, name):
            detail = "bf16" if size is True else f"{size:g}"
            add(name, detail, mismatch=replace(rungs[-1].served.mismatch, **{name: size}))
    if stale_step is not None:
        add("stale_weights", f"step {stale_step}", stale=True)
    if mismatch.raw_logps:
        # last: before it, all policies apply the sampler's temperature, and after it the engine alone does not
        add(RAW_LOGPS, "temperature 1, whole softmax", mismatch=replace(rungs[-1].served.mismatch, **{RAW_LOGPS: True}))
    return rungs
