"""Whether a run fits on a slice, what bounds each of its programs, and what an iteration takes at least."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from dcjax.errors import RunError
from dcjax.models.parameters import active_params
from dcjax.recipe import build
from dcjax.recipe.config import Config
from dcjax.sharding.mesh import make_mesh, set_aside
from dcjax.sharding.topology import slice_devices
from dcjax.tools.plan.chips import Chip, chip_of
from dcjax.tools.plan.hlo import Collective, Cost
from dcjax.tools.plan.programs import Planned, compile_programs, engine_for, for_tpu

USABLE = 0.95
"""The share of a chip's memory that a plan may take."""


@dataclass(frozen=True)
class Bound:
    """The least seconds of one run of a program, by what bounds it."""

    compute: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """Where all three overlap."""
        return max(self.compute, self.memory, self.links)

    @property
    def by(self) -> str:
        """The name of what bounds it."""
        return max(asdict(self), key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class ProgramPlan:
    """One program on one chip."""

    planned: Planned
    resident: int
    """Bytes of what is held beside it: the training state while the engine runs."""
    bound: Bound
    fits: bool
    collectives: dict[str, float]
    """Bytes that arrive at a chip in one run, by kind."""
    dominating: Collective | None
    """What of them takes longest."""


@dataclass(frozen=True)
class Plan:
    """A run on a slice. All bytes, operations and bounds are of one chip."""

    topology: str
    chip: Chip
    chips: int
    programs: list[ProgramPlan]
    kinds: dict[str, int]
    """Bytes by kind: params, optimiser, activations, serving weights, KV cache."""
    mean_response: float
    seconds: dict[str, float]
    """Of an iteration at least, by part."""
    tokens: float
    """Sampled in an iteration."""
    model_operations: float
    """Six for each parameter and token that is trained on, of all chips."""
    steps: int

    @property
    def fits(self) -> bool:
        """Whether all programs do."""
        return all(program.fits for program in self.programs)

    @property
    def iteration(self) -> float:
        """Seconds at least."""
        return sum(self.seconds.values())

    @property
    def share_of_peak(self) -> float:
        """Of the update, were it as fast as its bound."""
        return self.model_operations / (self.chips * self.chip.peak * self.seconds["update"])

    @property
    def chip_hours(self) -> float:
        """Of the recipe's steps, at least."""
        return self.iteration * self.steps * self.chips / 3600


def make_plan(
    config: Config, topology: str, *, mean_response: float | None = None, told: Callable[[str], None]
) -> Plan:
    """Compiles a run's programs for a slice, and reckons.

    Args:
      config: of the run.
      topology: a slice, such as v5p:4x4x4.
      mean_response: tokens of a response; None is half of the longest.
      told: called with what is being done.

    Raises:
      RunError: there is no such slice, or the mesh does not match it.
    """
    chip = chip_of(topology)
    try:
        devices = slice_devices(topology)
    except ValueError as error:
        raise RunError(str(error)) from None
    config, mesh = for_tpu(config), _mesh(config, topology, devices)
    engine = engine_for(config, mesh)
    mean = config.rollout.max_response_length / 2 if mean_response is None else mean_response
    compiled = list(compile_programs(config, mesh, engine, mean, told))
    state = _held(build.abstract_state(config, mesh))
    apart = config.serving.devices > 0
    programs = [
        _program_plan(one, 0 if apart or one.name == "train_step" else state, chip, _coords(mesh, engine.mesh, one))
        for one in compiled
    ]
    seconds = {"prefill": 0.0, "decode": 0.0, "sync": 0.0, "update": 0.0}
    for one in programs:
        part = {"train_step": "update", "prefill": "prefill", "decode": "decode"}.get(one.planned.name, "sync")
        seconds[part] += one.bound.seconds * one.planned.runs
    tokens = config.rollout.sequences * mean
    trained_on = tokens + config.rollout.prompts * config.rollout.max_prompt_length
    return Plan(
        topology=topology,
        chip=chip,
        chips=len(devices) // chip.devices,
        programs=programs,
        kinds=_kinds(config, mesh, engine, compiled, chip),
        mean_response=mean,
        seconds=seconds,
        tokens=tokens,
        model_operations=6.0 * active_params(config.model) * trained_on,
        steps=config.steps,
    )


def _mesh(config: Config, topology: str, devices: Sequence[jax.Device]) -> Mesh:
    """The training mesh on a slice, whose devices it must fill beside those that only serve."""
    sizes, serving = asdict(config.mesh), config.serving.devices
    needed, found = math.prod(sizes.values()) + serving, len(devices)
    if needed != found:
        axes = " × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one device"
        rest = (found - serving) // math.prod(size for name, size in sizes.items() if name != "fsdp")
        raise RunError(
            f"the mesh is {axes}" + (f", beside {serving} devices that serve" if serving else "") + f": {needed} "
            f"devices, and {topology} has {found}; mesh.fsdp={max(rest, 1)} would fill it"
        )
    return make_mesh(config.mesh, set_aside(devices, serving)[0])


def _held(tree: Any) -> int:
    """Bytes that a tree of abstract arrays takes on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _kinds(config: Config, mesh: Mesh, engine: Any, compiled: Sequence[Planned], chip: Chip) -> dict[str, int]:
    state = build.abstract_state(config, mesh)
    named = {one.name: one for one in compiled}
    slots = jax.eval_shape(lambda: engine.decoder.empty(engine.slots))
    places = engine.decoder.state_shardings(slots)
    cache = sum(
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(jax.tree.leaves(slots.caches), jax.tree.leaves(places.caches), strict=True)
    )
    return {
        "params": _held(state.params) * chip.devices,
        "optimiser": (_held(state) - _held(state.params)) * chip.devices,
        "activations": named["train_step"].temp_bytes * chip.devices,
        "serving weights": _held(engine.abstract_params()) * chip.devices,
        "KV cache": cache * chip.devices,
    }


def _coords(training: Mesh, serving: Mesh, one: Planned) -> list[tuple[int, ...]]:
    """Where the devices lie that a program's numbers stand for."""
    mesh = serving if one.name in ("prefill", "decode") else training
    return [tuple(device.coords) for device in mesh.devices.flat]


def _program_plan(one: Planned, resident: int, chip: Chip, coords: Sequence[tuple[int, ...]]) -> ProgramPlan:
    collectives = one.cost.collectives
    slowest = max(collectives, key=lambda found: seconds_of(found, chip, coords), default=None)
    totals: dict[str, float] = {}
    for found in collectives:
        totals[found.kind] = totals.get(found.kind, 0.0) + found.bytes * found.times * chip.devices
    bound = Bound(
        compute=sum(count * chip.devices / chip.peak_of(dtype) for dtype, count in one.cost.flops.items()),
        memory=one.cost.bytes * chip.devices / chip.bandwidth,
        links=sum(seconds_of(found, chip, coords) for found in collectives),
    )
    whole = (one.peak_bytes + resident) * chip.devices
    planned = replace(
        one,
        argument_bytes=one.argument_bytes * chip.devices,
        output_bytes=one.output_bytes * chip.devices,
        temp_bytes=one.temp_bytes * chip.devices,
        cost=_times(one.cost, chip.devices),
    )
    fits = one.refused is None and whole <= USABLE * chip.hbm
    return ProgramPlan(planned, resident * chip.devices, bound, fits, totals, slowest)


def _times(cost: Cost, count: int) -> Cost:
    total = Cost()
    total.add(cost, count)
    return total


def seconds_of(found: Collective, chip: Chip, coords: Sequence[tuple[int, ...]]) -> float:
    """The least time of a collective's bytes on the links that its group's chips share: two for each axis of the torus
    that the group extends along, and one for a permutation."""
    if not found.members:
        return 0.0
    places = [coords[member] for member in found.members if member < len(coords)]
    axes = sum(len(set(axis)) > 1 for axis in zip(*places, strict=True))
    if not axes:
        # two devices of one chip
        return 0.0
    links = 1 if found.kind == "collective-permute" else 2 * axes
    return found.bytes * found.times * chip.devices / (min(links, chip.links) * chip.link)
