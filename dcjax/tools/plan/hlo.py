"""What a compiled program does, counted from its text: operations, bytes of memory, and bytes of collectives.

XLA's own analysis counts the body of a loop once, whatever its trip count; here bodies count as often as they run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

BITS = {"pred": 8, "bf16": 16, "token": 0}
"""Of an element whose dtype's name does not say them behind its letters, as s32, f32 and f8e4m3fn do."""

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"),
)

_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "broadcast"),
    *("partition-id", "replica-id", "opt-barrier"),
)
"""Instructions that read and write no memory of their own."""

UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Instructions that change part of their first operand in place, and which operand has what is written."""

SPLASH_PRODUCTS = {"_dkv": 4, "_dq": 3, "_fwd": 2}
"""Matrix products in each of splash attention's kernels, by a part of their names."""

_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclass(frozen=True)
class Shape:
    """One array."""

    dtype: str
    dims: tuple[int, ...]
    in_memory: bool
    """False where it lies in a core's own memory (VMEM), not in HBM."""

    @property
    def bytes(self) -> float:
        """In HBM."""
        return math.prod(self.dims) * bits_of(self.dtype) / 8 if self.in_memory else 0.0


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Its result's arrays, several for a tuple."""
    operands: tuple[str, ...]
    rest: str
    """What follows the operands."""
    root: bool

    @property
    def op(self) -> str:
        """Where it comes from in the program."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"{attribute}=%?([\w.\-]+)", self.rest)
        return found and found[1]


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind and size, that run so many times."""

    kind: str
    bytes: float
    """What arrives at a chip in one of them."""
    group: int
    """Chips that take part."""
    members: tuple[int, ...]
    """The numbers of one group's devices in the mesh."""
    times: float
    op: str
    """Where it comes from in the program."""


@dataclass
class Cost:
    """What a program does on one device."""

    flops: dict[str, float] = field(default_factory=dict)
    """Of matrix products, by the dtype of their operands."""
    bytes: float = 0.0
    """Read from and written to HBM, at least."""
    collectives: list[Collective] = field(default_factory=list)

    def add(self, other: Cost, times: float) -> None:
        """The other's work, so many times."""
        for dtype, count in other.flops.items():
            self.flops[dtype] = self.flops.get(dtype, 0.0) + count * times
        self.bytes += other.bytes * times
        self.collectives += [replace(one, times=one.times * times) for one in other.collectives]


def bits_of(dtype: str) -> int:
    """Bits of an element.

    Raises:
      ValueError: a dtype that is not known.
    """
    if dtype in BITS:
        return BITS[dtype]
    if (found := re.match(r"[a-z]+(\d+)", dtype)) is None:
        raise ValueError(f"a dtype of XLA's that is not known: {dtype}")
    return int(found[1])


class Program:
    """A compiled program's text, parsed.

    Args:
      text: `compiled.as_text()`.
      unknown_trips: how often a loop runs whose trip count is not in the text.
      named_trips: the same of loops in whose operation's name a part stands, by the part.
      kernel_fill: the share of a Pallas kernel's estimated bytes and operations that it takes; by the kernel's name.
      attended: keys that a query of splash attention sees, on average over all columns.
    """

    def __init__(
        self,
        text: str,
        *,
        unknown_trips: float = 1.0,
        named_trips: Mapping[str, float] | None = None,
        kernel_fill: Mapping[str, float] | None = None,
        attended: float = 0.0,
    ):
        self._unknown, self._named = unknown_trips, dict(named_trips or {})
        self._fill, self._attended = dict(kernel_fill or {}), attended
        self._computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self._parse(text)
        self._costs: dict[str, Cost] = {}

    @cached_property
    def cost(self) -> Cost:
        """Of the whole program."""
        return self._cost(self.entry)

    def _parse(self, text: str) -> None:
        body: list[Instruction] | None = None
        # a kernel's attributes may go on in further lines
        for line in re.sub(r"\n(?! {2}[%R]|[%E]|\}(?:\n|, exec)|\n)", " ", text).splitlines():
            if body is None:
                if header := _HEADER.match(line):
                    body = self._computations.setdefault(header[2], [])
                    if header[1]:
                        self.entry = header[2]
            elif line.startswith("}"):
                body = None
            elif found := _INSTRUCTION.match(line):
                operands, rest = _split_operands(found[5])
                shapes = tuple(_shapes(found[3]))
                body.append(Instruction(found[2], found[4], shapes, operands, rest, bool(found[1])))

    def _cost(self, name: str) -> Cost:
        if name not in self._costs:
            total = Cost()
            known = {line.name: line for line in self._computations[name]}
            for line in self._computations[name]:
                self._count(line, known, total)
            self._costs[name] = total
        return self._costs[name]

    def _count(self, line: Instruction, known: Mapping[str, Instruction], total: Cost) -> None:
        kind = line.opcode.removesuffix("-start")
        if line.opcode == "while":
            trips = self._trips(line)
            if trips is None:
                trips = next((count for part, count in self._named.items() if part in line.op), self._unknown)
            total.add(self._cost(line.called("body") or ""), trips)
        elif line.opcode == "conditional":
            total.add(self._cheapest(line), 1)
        elif line.opcode in ("call", "call-start", "async-start"):
            total.add(self._cost(line.called("to_apply") or line.called("calls") or ""), 1)
        elif kind in COLLECTIVES:
            total.collectives.append(_collective(kind, line, known))
            total.bytes += 2 * sum(shape.bytes for shape in line.shapes[-1:])
        elif line.opcode == "custom-call":
            self._count_kernel(line, known, total)
        elif not (line.opcode in _FREE or line.opcode.endswith("-done")):
            inner = line.called("calls") if line.opcode == "fusion" else None
            if inner is not None:
                total.add(self._within(inner), 1)
            elif line.opcode in ("convolution", "dot"):
                total.add(Cost(flops=_product(line, known)), 1)
            total.bytes += self._traffic(line, known, inner)

    def _trips(self, loop: Instruction) -> float | None:
        """How often a loop runs whose counter begins at 0: the constant that ends it, over what a turn adds."""
        condition = self._computations[loop.called("condition") or ""]
        known = {line.name: line for line in condition}
        root = next(line for line in condition if line.root)
        if root.opcode != "compare" or "direction=LT" not in root.rest:
            return None
        lines = [known[name] for name in root.operands]
        counter = next((line.called("index") for line in lines if line.opcode == "get-tuple-element"), None)
        bound = next((line.operands[0] for line in lines if line.opcode == "constant"), None)
        if counter is None or bound is None:
            return None
        return math.ceil(float(bound) / self._increment(loop.called("body") or "", int(counter)))

    def _increment(self, body: str, counter: int) -> float:
        """What one turn of a loop adds to its counter, an element of the tuple that it carries.

        Raises:
          ValueError: that is not seen from the loop's own instructions.
        """
        known = {line.name: line for line in self._computations[body]}
        root = next(line for line in self._computations[body] if line.root)
        name, added = root.operands[counter], 0.0
        while (line := known[name]).opcode != "get-tuple-element":
            constants = [float(known[one].operands[0]) for one in line.operands if known[one].opcode == "constant"]
            if line.opcode == "add" and constants:
                added += constants[0]
            name = next(one for one in line.operands if known[one].opcode != "constant")
        if not added:
            raise ValueError(f"what the loop {body} adds to its counter is not seen: {root.operands[counter]}")
        return added

    def _cheapest(self, line: Instruction) -> Cost:
        """The branch with least work, as bounds are of what is done at least: sorting for top-k, say, is left out."""
        named = re.search(r"branch_computations=\{([^}]*)\}", line.rest)
        branches = [name.strip(" %") for name in named[1].split(",")] if named else []
        branches += [name for kind in ("true", "false") if (name := line.called(f"{kind}_computation"))]
        return min(map(self._cost, branches), key=lambda cost: (sum(cost.flops.values()), cost.bytes))

    def _count_kernel(self, line: Instruction, known: Mapping[str, Instruction], total: Cost) -> None:
        """A Pallas kernel's own estimate; for splash attention, which has none, its products over `attended` keys."""
        if 'custom_call_target="tpu_custom_call"' not in line.rest:
            return
        arrays = [shape for name in line.operands if name in known for shape in known[name].shapes]
        touched, name = sum(shape.bytes for shape in (*line.shapes, *arrays)), line.name + line.op
        # of which products are made, whatever a cache is stored in
        queries = next((one for one in arrays if len(one.dims) > 2 and one.dtype in ("bf16", "f16", "f32")), None)
        if "splash" in name and queries is not None:
            products = next(count for part, count in SPLASH_PRODUCTS.items() if part in name)
            flops = 2.0 * products * math.prod(queries.dims) * self._attended
            total.add(Cost(flops={queries.dtype: flops}, bytes=touched), 1)
            return
        fill = next((share for kernel, share in self._fill.items() if kernel in name), 1.0)
        found = re.search(r'"cost_estimate":(\{[^}]*\})', line.rest)
        estimate = json.loads(found[1]) if found else {}
        flops, moved = (float(estimate.get(key, other)) for key, other in (("flops", 0), ("bytes_accessed", touched)))
        dtype = "bf16" if queries is None else queries.dtype
        total.add(Cost(flops={dtype: flops * fill}, bytes=moved * fill), 1)

    def _within(self, computation: str) -> Cost:
        """The matrix products and collectives in a fusion, whose memory traffic is its own."""
        total, scatters = Cost(), computation.startswith("all-reduce-scatter")
        known = {line.name: line for line in self._computations[computation]}
        for line in self._computations[computation]:
            if line.opcode in ("convolution", "dot"):
                total.add(Cost(flops=_product(line, known)), 1)
            elif (kind := line.opcode.removesuffix("-start")) in COLLECTIVES:
                one = _collective(kind, line, known)
                total.collectives.append(_scattered(one) if scatters else one)
            elif (inner := line.called("calls")) and line.opcode == "fusion":
                total.add(self._within(inner), 1)
        return total

    def _traffic(self, line: Instruction, known: Mapping[str, Instruction], inner: str | None) -> float:
        """Bytes that an instruction reads and writes in HBM; of what is sliced or updated in place, only that part."""
        if line.opcode in ("copy-start", "slice-start"):
            return _begun(line, known)
        results, sizes = sum(shape.bytes for shape in line.shapes), []
        for name in line.operands:
            sizes.append(sum(shape.bytes for shape in known[name].shapes) if name in known else 0.0)
        if (update := UPDATES.get(line.opcode)) is not None:
            return 2 * sizes[update]
        if line.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * results
        if inner is None:
            return results + sum(sizes)
        lines = self._computations[inner]
        parameters = {
            line.name: int(line.operands[0]) for line in lines if line.opcode == "parameter" and line.operands
        }
        for parameter, number in parameters.items():
            users = [one for one in lines if parameter in one.operands]
            if users and all(one.opcode in ("dynamic-slice", "slice", "gather") for one in users):
                sizes[number] = min(sizes[number], sum(_any_bytes(one) for one in users))
            elif users and all(one.opcode in UPDATES and one.operands[0] == parameter for one in users):
                by_name = {one.name: one for one in lines}
                updates = sum(_any_bytes(by_name[one.operands[UPDATES[one.opcode]]]) for one in users)
                results += min(updates - sizes[number], 0.0)
                sizes[number] = 0.0
        return max(results, 0.0) + sum(sizes)


def _begun(line: Instruction, known: Mapping[str, Instruction]) -> float:
    """Bytes of an asynchronous copy, or of the slices of one array, whose result holds what is read beside what is
    written: each part is read where the operand lies, and written where it goes."""
    operands = [shape for name in line.operands if name in known for shape in known[name].shapes if shape.dims]
    written = [shape for shape in line.shapes if shape.dims]
    for shape in operands:
        written.remove(next(one for one in written if one.dims == shape.dims and one.in_memory == shape.in_memory))
    from_memory = any(shape.in_memory for shape in operands)
    return sum(shape.bytes + (_full(shape) if from_memory else 0.0) for shape in written)


def _any_bytes(line: Instruction) -> float:
    return sum(map(_full, line.shapes))


def _split_operands(text: str) -> tuple[tuple[str, ...], str]:
    """The names between an instruction's parentheses, and what follows them."""
    depth, end = 1, 0
    while depth and end < len(text):
        depth += (text[end] == "(") - (text[end] == ")")
        end += 1
    inside = re.sub(r"/\*.*?\*/", "", text[: end - 1])
    names = [part.strip().split(" ")[-1].lstrip("%") for part in inside.split(",") if part.strip()]
    return tuple(names), text[end:]


def _shapes(text: str) -> Iterator[Shape]:
    for found in _SHAPE.finditer(re.sub(r"/\*.*?\*/", "", text)):
        dims = tuple(int(size) for size in found[2].split(",") if size)
        yield Shape(found[1], dims, not re.search(r"S\(\d+\)", found[3] or ""))


def _product(line: Instruction, known: Mapping[str, Instruction]) -> dict[str, float]:
    """Two operations for each pair of numbers that a product multiplies."""
    (result,) = line.shapes
    left, right = (known[name].shapes[0] for name in line.operands[:2])
    if line.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest)
        sizes = [left.dims[int(dim)] for dim in contracted[1].split(",") if dim] if contracted else []
        return {left.dtype: 2.0 * math.prod(result.dims) * math.prod(sizes)}
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.rest)
    assert labels is not None, line.rest
    pairs, spatial = 1.0, sorted(label for label in labels[3] if label.isdigit())
    window = _window(line.rest, len(spatial))
    for number, label in enumerate(spatial):
        pairs *= _pairs(
            left.dims[labels[1].index(label)],
            right.dims[labels[2].index(label)],
            result.dims[labels[3].index(label)],
            **{name: values[number] for name, values in window.items()},
        )
    batch, features = result.dims[labels[3].index("b")], result.dims[labels[3].index("f")]
    return {left.dtype: 2.0 * pairs * batch * features * right.dims[labels[2].index("i")]}


def _window(rest: str, rank: int) -> dict[str, list[int]]:
    """The attributes of a convolution's window that say which pairs meet, a value for each spatial dimension."""
    found = re.search(r"window=\{([^}]*)\}", rest)
    given = dict(part.split("=") for part in found[1].split()) if found else {}

    def values(name: str, default: int) -> list[int]:
        return [int(x.split("_")[0]) for x in given[name].split("x")] if name in given else [default] * rank

    dilated = {name: values(name, 1) for name in ("stride", "lhs_dilate", "rhs_dilate")}
    return dilated | {"low": values("pad", 0)}


def _pairs(size: int, window: int, out: int, *, stride: int, lhs_dilate: int, rhs_dilate: int, low: int) -> int:
    """How many (output, window) positions of one dimension meet a number, and no padding or hole."""
    at = np.arange(out)[:, None] * stride - low + np.arange(window)[None, :] * rhs_dilate
    return int(((at % lhs_dilate == 0) & (at >= 0) & (at // lhs_dilate < size)).sum())


def _collective(kind: str, line: Instruction, known: Mapping[str, Instruction]) -> Collective:
    # what begins one holds its operands too, and after them its results
    count, shapes = len(line.operands), line.shapes
    if line.opcode.endswith("-start") and len(shapes) > count:
        shapes = shapes[count : 2 * count]
    whole, members = sum(map(_full, shapes)), _members(line.rest)
    if kind == "ragged-all-to-all" and (sent := known.get(line.operands[0])) is not None:
        # one of the two has room for more than travels
        whole = min(whole, _any_bytes(sent))
    group = max(len(members), 1)
    shares = {
        "all-reduce": 2 * (group - 1) / group,
        "reduce-scatter": group - 1,
        "collective-permute": 1.0,
    }
    arriving = whole * shares.get(kind, (group - 1) / group)
    return Collective(kind, arriving, group, members, 1.0, line.op)


def _scattered(one: Collective) -> Collective:
    """An all-reduce that a TPU runs as a reduce-scatter, as only a part of its result is taken in the same fusion."""
    return replace(one, kind="reduce-scatter", bytes=one.bytes / 2)


def _full(shape: Shape) -> float:
    return replace(shape, in_memory=True).bytes


def _iota(text: str) -> np.ndarray:
    """Numbers from 0 in the order that [4,2]T(1,0) says: as such an array, its axes in this order, row by row."""
    dims, _, order = text.strip("[)").replace("]", "").partition("T(")
    sizes = [int(size) for size in dims.split(",")]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return (numbers.transpose([int(axis) for axis in order.split(",")]) if order else numbers).reshape(-1)


def _members(rest: str) -> tuple[int, ...]:
    """The first of a collective's groups, in any of XLA's notations; none where it has no groups.

    Raises:
      ValueError: a notation that is not known.
    """
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return int(found[1]), int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return tuple(map(int, found[1].split(",")))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return tuple(_iota(found[3]).reshape(int(found[1]), int(found[2]))[0].tolist())
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in (axis.split("=") for axis in found[1].split(","))}
        numbers = _iota(found[2] or f"[{math.prod(sizes.values())}]").reshape(list(sizes.values()))
        along = found[3].split(",")
        return tuple(numbers[tuple(slice(None) if name in along else 0 for name in sizes)].reshape(-1).tolist())
    if "replica_groups={}" in rest or "replica_groups=" not in rest:
        return ()
    raise ValueError(f"groups in a notation of XLA's that is not known: {rest[rest.index('replica_groups') :][:120]}")
