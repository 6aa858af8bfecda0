"""The policies between the trainer's and the deployed one, each with one more source of the gap."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from dcjax.recipe.serving import ServingConfig
from dcjax.serving.mismatch import MismatchConfig
from dcjax.serving.quantize import FormatName, KVCacheName, formats, serving_format


@dataclass(frozen=True)
class Served:
    """A policy that an engine samples from."""

    format: FormatName
    kv_cache: KVCacheName
    """What keys and values are stored in; never auto, so that equal policies are equal."""
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    """What is added to the policy on purpose."""
    stale: bool = False
    """Whether earlier weights are served."""

    @classmethod
    def of(cls, format: str, kv_cache: str = "auto") -> Served:
        """The policy of a format, with the format's own cache in place of `auto`."""
        chosen = serving_format(format, kv_cache)
        names = (name for name in typing.get_args(KVCacheName) if name != "auto")
        return cls(chosen.name, next(name for name in names if serving_format(format, name) == chosen))


class Rung(NamedTuple):
    """A policy of the ladder."""

    name: str
    """What it adds to the rung below."""
    detail: str
    """The kind or the size of what it adds."""
    served: Served


def ladder(
    serving: ServingConfig, mismatch: MismatchConfig, *, trained_in: FormatName, stale_step: int | None = None
) -> list[Rung]:
    """The policies from one that computes as the trainer does to the deployed one; each adds one source of the gap.

    Args:
      serving: how the deployed policy is served; a source of the gap that it lacks has no rung.
      mismatch: what is added to it on purpose, one rung for each kind but staleness, which `stale_step` gives.
      trained_in: the dtype that the trainer computes in, by its format's name.
      stale_step: the step of the weights that are served; None if they are the trainer's own.
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
    """The format with these weights, and with activations of the same dtype as format `name` but unquantised."""
    wanted = (formats[name].activations, weights, False)
    return next(
        other.name
        for other in formats.values()
        if (other.activations, other.weights, other.quantizes_activations) == wanted
    )
