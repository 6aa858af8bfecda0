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
from dcjax.tools.plan import by_hand
from dcjax.tools.plan.chips import Chip, chip_of, gpus_of
from dcjax.tools.plan.hlo import Collective, Cost
from dcjax.tools.plan.programs import Planned, compile_programs, engine_for, for_platform, for_tpu
from dcjax.user_code import refusals_of

USABLE = 0.95
"""The share of a chip's memory that a plan may take."""

SHARED = ("all-gather", "all-reduce", "reduce-scatter")
"""Collectives in which all devices of a node need, or add to, the same bytes of other nodes."""


ENGINE_PROGRAMS = ("prefill", "decode", "read")
"""What the engine runs on its own mesh; read only where the objective reads the sampler's distributions."""


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
    """A run on a slice, or on GPUs. All bytes, operations and bounds are of one chip."""

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
    def compiled(self) -> bool:
        """Whether the programs were; for GPUs they are counted by hand."""
        return self.chip.platform == "tpu"

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
    """Compiles a run's programs for a slice, or counts them by hand for GPUs, and reckons.

    Args:
      config: of the run.
      topology: a slice, such as v5p:4x4x4, or GPUs, such as h100:16.
      mean_response: tokens of a response; None is half of the longest.
      told: called with what is being done.

    Raises:
      RunError: there is no such slice, the mesh or the model does not match it, or a program does not compile.
    """
    mean = config.rollout.max_response_length / 2 if mean_response is None else mean_response
    place = place_of(config, topology)
    programs = place.plan(mean, told)
    seconds = {"prefill": 0.0, "decode": 0.0, "sync": 0.0, "update": 0.0}
    parts = {"train_step": "update", **{name: name for name in ENGINE_PROGRAMS}}
    for one in programs:
        part = parts.get(one.planned.name, "sync")
        seconds[part] = seconds.get(part, 0.0) + one.bound.seconds * one.planned.runs
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


def place_of(config: Config, topology: str) -> Place | Gpus:
    """A run on a slice or on GPUs.

    Raises:
      RunError: there is no such slice, or the mesh or the model does not match it.
    """
    return (Gpus if chip_of(topology).node else Place).of(config, topology)


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
        _check_filled(config, topology, len(devices))
        mesh = make_mesh(config.mesh, set_aside(devices, config.serving.devices)[0])
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
        return [self._program_plan(one) for one in compiled]

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

    def _program_plan(self, one: Planned) -> ProgramPlan:
        mesh = self.engine.mesh if one.name in ENGINE_PROGRAMS else self.mesh
        return _program_plan(one, self._beside(one), self.chip, [tuple(d.coords) for d in mesh.devices.flat])


def _check_counted(config: Config) -> None:
    """Raises ValueError where programs for GPUs differ from those that are counted by hand."""
    for what, there in {
        "the objective reads the sampler's distributions": build.reads_sampler(config),
        f"serving.in_training is {config.serving.in_training}": config.serving.in_training != "masters",
    }.items():
        if there:
            raise ValueError(f"{what}, which is not counted by hand for GPUs; on a TPU slice it is compiled")


@dataclass(frozen=True)
class Gpus:
    """A run on GPUs, whose programs are counted by hand."""

    config: Config
    chip: Chip
    devices: int

    @classmethod
    def of(cls, config: Config, topology: str) -> Gpus:
        """Raises RunError where there are no such GPUs, or where the mesh or the model does not match them."""
        devices, chip = gpus_of(topology), chip_of(topology)
        _check_filled(config, topology, devices)
        try:
            config = for_platform(config, chip.platform)
            _check_counted(config)
            by_hand.check(config, devices)
        except ValueError as error:
            raise RunError(str(error)) from None
        return cls(config, chip, devices)

    def plan(
        self, mean_response: float, told: Callable[[str], None], only: Collection[str] | None = None
    ) -> list[ProgramPlan]:
        """Counts the programs, or only some by their names, which takes no time to be told of."""
        run = self._run(mean_response)
        counted = [one for one in by_hand.programs(run) if only is None or one.name in only]
        return [_program_plan(one, self._beside(one), self.chip, self._places(one)) for one in counted]

    def kinds(self, programs: Sequence[ProgramPlan]) -> dict[str, int]:
        """Bytes on a GPU by kind."""
        return by_hand.kinds(self._run(1.0))

    def _run(self, mean_response: float) -> by_hand.Sizes:
        return by_hand.Sizes(self.config, self.chip.platform, self.devices, mean_response)

    def _beside(self, one: Planned) -> int:
        """As `Place._beside`."""
        held = by_hand.kinds(self._run(1.0))
        state = held["params"] + held["optimiser"]
        if one.name == "train_step":
            return 0
        if one.name == "sync":
            return state - one.argument_bytes
        prompts = held["prompts' caches"] if one.name == "decode" else 0
        return prompts + (0 if self.config.serving.devices else state)

    def _places(self, one: Planned) -> list[tuple[int, ...]]:
        """The node of each GPU that runs a program, where as many of each only serve."""
        serving = self.config.serving.devices
        runs = serving if serving and one.name in ("prefill", "decode") else self.devices - serving
        own = max(min(self.chip.node, self.devices) * runs // self.devices, 1)
        return [(number // own,) for number in range(self.devices)]


def _program_plan(one: Planned, resident: int, chip: Chip, coords: Sequence[tuple[int, ...]]) -> ProgramPlan:
    """What a program of one device is on a chip, of devices that are at these places."""
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


def _check_filled(config: Config, topology: str, found: int) -> None:
    """Raises RunError unless the training mesh fills so many devices beside those that only serve."""
    sizes, serving = asdict(config.mesh), config.serving.devices
    needed = math.prod(sizes.values()) + serving
    if needed != found:
        axes = " × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one device"
        rest = (found - serving) // math.prod(size for name, size in sizes.items() if name != "fsdp")
        raise RunError(
            f"the mesh is {axes}" + (f", beside {serving} devices that serve" if serving else "") + f": {needed} "
            f"devices, and {topology} has {found}; mesh.fsdp={max(rest, 1)} would fill it"
        )


def _held(tree: Any) -> int:
    """Bytes that a tree of abstract arrays takes on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def seconds_of(found: Collective, chip: Chip, coords: Sequence[tuple[int, ...]]) -> float:
    """The least time of a collective's bytes on the links that its group's devices share, which are at these places:
    coordinates on a torus, or the number of a node."""
    places = [coords[member] for member in found.members if member < len(coords)]
    sent = found.bytes * found.times * chip.devices
    return (_between_nodes if chip.node else _on_torus)(found.kind, sent, chip, places) if places else 0.0


def _on_torus(kind: str, sent: float, chip: Chip, places: Sequence[tuple[int, ...]]) -> float:
    """Two links for each axis of the torus that the group extends along, and one for a permutation."""
    axes = sum(len(set(axis)) > 1 for axis in zip(*places, strict=True))
    if not axes:
        # two devices of one chip
        return 0.0
    links = 1 if kind == "collective-permute" else 2 * axes
    return sent / (min(links, chip.links) * chip.link)


def _between_nodes(kind: str, sent: float, chip: Chip, places: Sequence[tuple[int, ...]]) -> float:
    """The longer of what arrives by a GPU's adapter and by its link: of g of N GPUs in a node, (N - g) / (N - 1) come
    from other nodes. What all of a node need comes once, by all of their adapters, and goes on between them."""
    group, inside = len(places), places.count(places[0])
    if group == 1:
        return 0.0
    across = sent * (group - inside) / (group - 1) / (inside if kind in SHARED else 1)
    return max(across / chip.network, (sent - across) / chip.link)
