"""Whether a run fits on a slice, what bounds each of its programs, and what an iteration takes at least."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from dcjax.errors import RunError
from dcjax.models.parallel.forward import check_model
from dcjax.models.parameters import active_params
from dcjax.recipe import build
from dcjax.recipe.config import Config
from dcjax.serving.engine import Qwen3Engine
from dcjax.sharding.hosts import check_prompts
from dcjax.sharding.mesh import make_mesh, set_aside
from dcjax.sharding.rules import with_shardings
from dcjax.sharding.topology import slice_devices
from dcjax.tools.plan.chips import Chip, chip_of
from dcjax.tools.plan.hlo import Collective, Cost
from dcjax.tools.plan.programs import Planned, compile_programs, engine_for, for_tpu
from dcjax.user_code import refusals_of

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
    """Bytes of what is held beside it: the training state while the engine runs, and the prompts' caches."""
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
    """Bytes by kind: params, optimiser, activations, serving weights, KV cache, prompts' caches."""
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
      RunError: there is no such slice, the mesh does not match it, or a program does not compile.
    """
    mean = config.rollout.max_response_length / 2 if mean_response is None else mean_response
    place = Place.of(config, topology)
    programs = place.plan(mean, told)
    seconds = {"prefill": 0.0, "decode": 0.0, "sync": 0.0, "update": 0.0}
    for one in programs:
        part = {"train_step": "update", "prefill": "prefill", "decode": "decode"}.get(one.planned.name, "sync")
        seconds[part] += one.bound.seconds * one.planned.runs
    rollout, model = place.config.rollout, place.config.model
    tokens = rollout.sequences * mean
    return Plan(
        topology=topology,
        chip=place.chip,
        chips=place.devices // place.chip.devices,
        programs=programs,
        kinds=place.kinds(programs),
        mean_response=mean,
        seconds=seconds,
        tokens=tokens,
        model_operations=6.0 * active_params(model) * (tokens + rollout.prompts * rollout.max_prompt_length),
        steps=config.steps,
    )


@dataclass(frozen=True)
class Place:
    """A run on the devices of a slice, before anything is compiled."""

    config: Config
    chip: Chip
    devices: int
    mesh: Mesh
    """Of training."""
    engine: Qwen3Engine

    @classmethod
    def of(cls, config: Config, topology: str) -> Place:
        """Raises RunError where there is no such slice, or where the run does not match it."""
        chip = chip_of(topology)
        try:
            devices = slice_devices(topology)
        except ValueError as error:
            raise RunError(str(error)) from None
        mesh = _mesh(config, topology, devices)
        config = for_tpu(config)
        hosts = len({device.process_index for device in devices})
        check_prompts(hosts, prompts=config.rollout.prompts, heldout=config.evaluation.prompts)
        with refusals_of():
            check_model(config.model, asdict(config.mesh))
        return cls(config, chip, len(devices), mesh, engine_for(config, mesh, devices))

    def plan(
        self, mean_response: float, told: Callable[[str], None], only: Collection[str] | None = None
    ) -> list[ProgramPlan]:
        """Compiles the programs, or only some by their names."""
        compiled = compile_programs(self.config, self.mesh, self.engine, mean_response, told, only)
        return [self._program_plan(one, self._beside(one)) for one in compiled]

    def _beside(self, one: Planned) -> int:
        """Bytes that a device holds beside a program's own: the training state, and in decoding the prompts' caches."""
        if one.name == "train_step":
            return 0
        prompts = _held(self.engine.abstract_prompts(self.config.rollout.prompts)) if one.name == "decode" else 0
        if one.name.startswith("sync"):
            # the parameters that it reads are of that state
            return _held(build.abstract_state(self.config, self.mesh)) - one.argument_bytes
        return prompts + (0 if self.config.serving.devices else _held(build.abstract_state(self.config, self.mesh)))

    def kinds(self, programs: Sequence[ProgramPlan]) -> dict[str, int]:
        """Bytes on a chip by kind."""
        state = build.abstract_state(self.config, self.mesh)
        slots = jax.eval_shape(partial(self.engine.decoder.empty, self.engine.slots))
        slots = with_shardings(slots, self.engine.decoder.state_shardings(slots))
        held = {
            "params": _held(state.params),
            "optimiser": _held(state) - _held(state.params),
            "serving weights": _held(self.engine.abstract_params()),
            "KV cache": _held(slots.caches),
            "prompts' caches": _held(self.engine.abstract_prompts(self.config.rollout.prompts)),
        }
        (activations,) = (one.planned.temp_bytes for one in programs if one.planned.name == "train_step")
        return {name: size * self.chip.devices for name, size in held.items()} | {"activations": activations}

    def _program_plan(self, one: Planned, resident: int) -> ProgramPlan:
        chip, mesh = self.chip, self.engine.mesh if one.name in ("prefill", "decode") else self.mesh
        coords = [tuple(device.coords) for device in mesh.devices.flat]
        collectives, totals = one.cost.collectives, defaultdict(float)
        for found in collectives:
            totals[found.kind] += found.bytes * found.times * chip.devices
        whole = Cost()
        whole.add(one.cost, chip.devices)
        bound = Bound(
            compute=sum(count / chip.peak_of(dtype) for dtype, count in whole.flops.items()),
            memory=whole.bytes / chip.bandwidth,
            links=sum(seconds_of(found, chip, coords) for found in collectives),
        )
        held = (one.argument_bytes, one.output_bytes, one.temp_bytes, resident)
        arguments, output, temporary, resident = (size * chip.devices for size in held)
        planned = replace(one, argument_bytes=arguments, output_bytes=output, temp_bytes=temporary, cost=whole)
        return ProgramPlan(
            planned=planned,
            resident=resident,
            bound=bound,
            fits=one.refused is None and planned.peak_bytes + resident <= USABLE * chip.hbm,
            collectives=dict(totals),
            dominating=max(collectives, key=lambda found: seconds_of(found, chip, coords), default=None),
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
