"""Collectives of one execution of a compiled program, read from its optimized HLO text.

`compiled.as_text()` lists a collective once, however many loops are around it, and names devices by number. Here collectives
are multiplied by the trip counts of their loops, device groups become mesh axes, and shapes become bytes that a device sends.
No library does this: XLA's cost analysis counts the body of a loop once, and the TPU compiler does not state all trip counts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import NamedTuple

import numpy as np

# Bytes that one of n devices sends in a ring, given the bytes of the result.
SENT = {
    "all-gather": lambda n, size: (n - 1) * size // n,
    "all-reduce": lambda n, size: 2 * (n - 1) * size // n,
    "all-to-all": lambda n, size: (n - 1) * size // n,
    "collective-permute": lambda n, size: size,
    "reduce-scatter": lambda n, size: (n - 1) * size,
}
RAGGED = "ragged-all-to-all"

PARTITIONS = re.compile(r"^HloModule .*\bnum_partitions=(\d+)", re.MULTILINE)
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
BITS = re.compile(r"[a-z]+(\d+)")
ACROSS_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=(mesh\[.*?\}|\{\{.*?\}\}|\[.*?(?=, [a-z]|$))")
IOTA = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$")
MESH = re.compile(r"mesh\[(.*?)\](?:, device_ids=\((.*)\))? \{(.*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Sums over all collectives of one kind along the same mesh axes on the same network, in one run of a program."""

    kind: str
    """Operation in HLO, such as "all-gather", for synchronous and asynchronous ones."""
    axis: str
    """Mesh axes it runs along, joined by "+" in mesh order; "?" if its groups follow no set of axes."""
    bytes: int
    """Bytes that one device sends in one run of the program."""
    count: int
    """Number of times that they execute in one run of the program."""
    data_dependent: bool
    """True if some are in a loop whose trip count depends on the data; it is counted `open_trips` times."""
    across_slices: bool = False
    """True if they run between slices, over the network of the hosts; False within a slice."""


def collectives(
    hlo_text: str,
    mesh_axes: dict[str, int],
    *,
    slices: int = 1,
    ragged_rows: float = 0,
    open_trips: int = 1,
    outer_trips: int | None = None,
) -> list[Collective]:
    """Return the collectives of one run of a program, merged by kind, axis and network, most bytes first.

    Bytes are what one device sends in a ring of n devices, where s is the bytes of its array:

      all-gather          (n - 1) / n of the output      reduce-scatter     (n - 1) / n of the input
      all-reduce          2 (n - 1) / n of s             all-to-all         (n - 1) / n of s
      collective-permute  s                              ragged-all-to-all  `ragged_rows` rows of s

    Arrays of one collective add up, with the compiler's padding. Groups of one device send nothing and are left out. A loop
    counts with its trip count, or `open_trips` if that depends on the data; a conditional with the branch that sends most.
    Between slices the TPU compiler sends through the hosts: that counts as the collective it implements, among one device of
    every slice, along the first axis.

    Args:
      hlo_text: result of `compiled.as_text()`.
      mesh_axes: axis -> size of the mesh that the program was compiled for, outermost first.
      slices: number of slices that the first axis spans. A program for several is the program of one of them.
      ragged_rows: rows that a device sends to others in one ragged all-to-all. Its buffers have room for more than the
        expected traffic, so the text does not say.
      open_trips: trip count of a loop whose trip count depends on the data.
      outer_trips: trip count of such a loop if no other is around it; None takes `open_trips` for it too.

    Raises:
      ValueError: if the text is for another number of devices than the mesh has, or `slices` do not divide its first axis.
    """
    mesh = _mesh_of_a_slice(hlo_text, mesh_axes, slices)
    computations, entry = parse(hlo_text)
    total = _Traffic(computations, mesh, slices, ragged_rows, open_trips, outer_trips).tally(Frame(entry)) if entry else {}
    found = [
        Collective(kind, axis, usage.sent, usage.runs, usage.data_dependent, across)
        for (kind, axis, across), usage in total.items()
        if usage.runs
    ]
    return sorted(found, key=lambda one: (-one.bytes, one.kind, one.axis, one.across_slices))


def _mesh_of_a_slice(hlo_text: str, mesh_axes: dict[str, int], slices: int) -> dict[str, int]:
    stated, devices = PARTITIONS.search(hlo_text), math.prod(mesh_axes.values())
    if stated and int(stated[1]) * slices != devices:
        program = f"{stated[1]} devices in each of {slices} slice(s)"
        raise ValueError(f"the program runs on {program}, but the mesh {mesh_axes} has {devices}; pass the mesh it is for")
    first = next(iter(mesh_axes), "")
    if mesh_axes.get(first, 1) % slices:
        raise ValueError(f"the first axis of the mesh {mesh_axes} does not split over {slices} slices; make it a multiple")
    return mesh_axes | {first: mesh_axes[first] // slices} if slices > 1 else mesh_axes


class _Usage(NamedTuple):
    sent: int = 0
    runs: int = 0
    data_dependent: bool = False


_Tally = dict[tuple[str, str, bool], _Usage]
"""(kind, axis, True between slices) -> usage."""


def _add(into: _Tally, more: _Tally, times: int = 1, data_dependent: bool = False) -> None:
    """Add `times` times the usage in `more` to `into`, in place; `data_dependent` marks what is added."""
    for key, new in more.items():
        old = into.get(key, _Usage())
        flag = old.data_dependent or new.data_dependent or data_dependent
        into[key] = _Usage(old.sent + times * new.sent, old.runs + times * new.runs, flag)


@dataclasses.dataclass
class _Traffic:
    """Counter of the collectives of a program, by a walk through its calls, loops and branches."""

    computations: dict[str, Computation]
    mesh: dict[str, int]
    slices: int
    ragged_rows: float
    open_trips: int
    outer_trips: int | None

    def __post_init__(self) -> None:
        self.trips = TripCounts(self.computations)
        # A program repeats the same groups thousands of times.
        self.group = functools.cache(functools.partial(_group, self.mesh))
        self.relevant = functools.cache(self._relevant)

    def tally(self, frame: Frame) -> _Tally:
        """Return the usage of one run of the frame's computation, with all that it calls and loops over."""
        total: _Tally = {}
        for one in self.relevant(frame.computation):
            if _kind(one):
                _add(total, self._transfer(one, frame.computation))
            elif one.opcode == "while":
                trips = self.trips(frame, one)
                if trips is None and frame.caller is None:
                    trips = self.outer_trips
                times, tests = (self.open_trips, self.open_trips) if trips is None else (trips, trips + 1)
                _add(total, self.tally(frame.inside(one, "body")), times, trips is None)
                _add(total, self.tally(frame.inside(one, "condition")), tests, trips is None)
            else:
                called = [self.tally(Frame(name, frame, one)) for names in one.called.values() for name in names]
                if one.opcode == "conditional":
                    called = [max(called, key=lambda branch: sum(usage.sent for usage in branch.values()))]
                for more in called:
                    _add(total, more)
        return total

    def _relevant(self, name: str) -> list[Instruction]:
        """Return a computation's collectives, and its calls that lead to one; no ends (-done) of asynchronous ones."""
        return [
            one
            for one in self.computations[name].instructions.values()
            if not one.opcode.endswith(("-done", "-update"))
            and (_kind(one) or any(self.relevant(to) for names in one.called.values() for to in names))
        ]

    def _transfer(self, one: Instruction, computation: str) -> _Tally:
        kind = _kind(one)
        if "chain_id=" in one.rest and not self._starts_chain(computation):
            return {}  # TPU fusions that overlap with a collective each repeat it; only the one that starts it counts.
        across = one.opcode == "send"
        if across:
            n, axis, size = self.slices, next(iter(self.mesh)), _bytes(_elements(one.type)[0])
            size = {"all-gather": n * size, "reduce-scatter": size // n}.get(kind, size)
        else:
            groups = GROUPS.search(one.rest)
            n, axis = self.group(groups[1] if groups else "", kind == "collective-permute")
            # A start returns (operands, results, ...), except that of an all-reduce, which returns its results.
            paired = one.opcode.endswith("-start") and kind != "all-reduce"
            result = _elements(one.type)[1] if paired else one.type
            size = _bytes(result)
            if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                kind, size = "reduce-scatter", size // n  # A TPU fusion of all-reduce and slice.
        if n == 1:
            return {}
        if kind == RAGGED:
            _, shape = ARRAY.findall(result)[0]
            sent = round(self.ragged_rows * size / _integers(shape)[0])
        else:
            sent = SENT[kind](n, size)
        return {(kind, axis, across): _Usage(sent, 1)}

    def _starts_chain(self, computation: str) -> bool:
        instructions = self.computations[computation].instructions.values()
        return any('custom_call_target="AsyncCollectiveStart"' in one.rest for one in instructions)


def _kind(one: Instruction) -> str:
    """Return the kind of collective that an instruction is, starts, or sends between slices; "" if none."""
    kind = one.opcode.removesuffix("-start")
    if one.opcode == "send" and (found := ACROSS_SLICES.search(one.rest)):
        kind = found[1].lower().replace("_", "-").replace("one-to-one", "collective-permute")
    return kind if kind in SENT or kind == RAGGED else ""


def _elements(type_: str) -> list[str]:
    """Return the texts of a tuple type's elements: "(f32[2], (s32[], s32[]))" has two."""
    found, depth = [""], 0
    for character in type_[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return found


def _bytes(type_: str) -> int:
    """Return the bytes of an array type, or of all arrays in a tuple type; tokens have none."""
    total = 0
    for dtype, shape in ARRAY.findall(type_):
        width = BITS.match(dtype)
        bits = 8 if dtype == "pred" else int(width[1]) if width else 0
        total += math.ceil(bits * math.prod(_integers(shape)) / 8)
    return total


def _group(mesh: dict[str, int], text: str, pairs: bool) -> tuple[int, str]:
    """Return a group's number of devices and its axes, or "?"; (1, "") if it sends nothing. ValueError: not in the mesh."""
    devices = math.prod(mesh.values())
    groups = _groups(text) or [list(range(devices))]
    last = max(map(max, groups))
    if last >= devices:
        raise ValueError(f"a collective names device {last}, but the mesh {mesh} has {devices}; pass the mesh it is for")
    varying: set[str] = set()
    for group in groups:
        coordinates = np.unravel_index(group, tuple(mesh.values()))
        varying |= {name for name, along in zip(mesh, coordinates, strict=True) if (along != along[0]).any()}
    names = [name for name in mesh if name in varying]
    whole = pairs or {len(group) for group in groups} == {math.prod(mesh[name] for name in names)}
    return (max(map(len, groups)), "+".join(names) if whole else "?") if names else (1, "")


def _groups(text: str) -> list[list[int]]:
    """Return the devices of each group, from HLO's text: lists, a permuted range, or axes of a mesh; [] if it names none."""
    if text.startswith("{"):
        return [_integers(group) for group in re.findall(r"\{([\d,]+)\}", text)]
    if text.startswith("["):
        shape, _, order = text.partition("<=")
        return _range(order).reshape(_integers(shape)).tolist()
    if found := MESH.match(text):
        sizes = {name: int(size) for name, size in (axis.split("=") for axis in found[1].split(","))}
        return _along(_range(found[2] or f"[{math.prod(sizes.values())}]"), sizes, found[3].split(","))
    return []


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _range(text: str) -> np.ndarray:
    """Return a flat array of device numbers: `[4,2]T(1,0)` is 0 to 7 as a 4 x 2 matrix, transposed; else those listed."""
    found = IOTA.match(text)
    if not found:
        return np.array(_integers(text))
    shape = _integers(found[1])
    return np.arange(math.prod(shape)).reshape(shape).transpose(_integers(found[2]) if found[2] else None).ravel()


def _along(devices: np.ndarray, sizes: dict[str, int], axes: list[str]) -> list[list[int]]:
    """Return the groups of devices that differ in `axes` only; `x:(2)4` is the factor 4 of axis x, after a leading 2."""
    shape = tuple(sizes.values())
    rest = np.indices(shape).reshape(len(shape), -1)
    n = 1
    for axis in axes:
        name, _, part = axis.partition(":")
        before, size = _integers(part) if part else (1, sizes[name])
        index, below = list(sizes).index(name), sizes[name] // (before * size)
        rest[index] -= rest[index] // below % size * below
        n *= size
    order = np.argsort(np.ravel_multi_index(tuple(rest), shape), kind="stable")
    return devices[order].reshape(-1, n).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Parser of optimized HLO text, and trip counts of its loops.


PASSED_ON = {"bitcast", "convert", "copy", "copy-done", "copy-start", "optimization-barrier", "reshape"}
INLINED = {"fusion", "call"}
MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}

INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
OPERANDS = re.compile(r"(.*?)\)(?:, [\w-]+=|$)")
CALLED = re.compile(r"\b(calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%[\w.\-]+)")
NAME = re.compile(r"%([\w.\-]+)")
KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Instruction(NamedTuple):
    """One line of HLO, without its metadata and backend config."""

    opcode: str
    type: str
    rest: str
    """Operands, a closing bracket, and attributes."""
    known_trips: int | None = None
    """Trip count of a loop; None if the compiler does not state it."""

    @property
    def operands(self) -> list[str]:
        found = OPERANDS.match(self.rest)
        return NAME.findall(found[1]) if found else []

    @property
    def called(self) -> dict[str, list[str]]:
        """Attribute, such as "body" -> names of the computations that it calls."""
        return {attribute: NAME.findall(names) for attribute, names in CALLED.findall(self.rest)}


@dataclasses.dataclass
class Computation:
    """Instructions by name, in the order of the text, and the name of the root instruction ("" if none)."""

    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: str = ""


class Frame(NamedTuple):
    """Name of a computation, the frame of its caller, and the instruction that calls it; both None at the entry."""

    computation: str
    caller: Frame | None = None
    call: Instruction | None = None

    def inside(self, call: Instruction, role: str | None = None) -> Frame:
        """Return the frame of the computation that `call` names in attribute `role`, or in its first one if None."""
        (name, *_) = call.called[role] if role else next(iter(call.called.values()))
        return Frame(name, self, call)

    def argument(self, parameter: Instruction) -> tuple[Frame, str] | None:
        """Return the caller's frame and the name of the operand passed as `parameter`; None unless in a fusion or call."""
        if self.caller is None or self.call is None or self.call.opcode not in INLINED:
            return None
        return self.caller, self.call.operands[int(parameter.rest.partition(")")[0])]

    @property
    def loop(self) -> tuple[Frame, Instruction]:
        """The innermost loop around this frame, as (frame that contains it, its `while` instruction)."""
        assert self.caller is not None
        assert self.call is not None
        return (self.caller, self.call) if self.call.opcode == "while" else self.caller.loop


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Return the computations in the text of an HLO module by name, and the name of its entry ("" if it has none)."""
    computations: dict[str, Computation] = {}
    entry, computation = "", Computation()
    for line in text.split("\n"):
        if line.endswith("{") and (header := COMPUTATION.match(line)):
            computation = computations[header[2]] = Computation()
            entry = header[2] if header[1] else entry
        elif line.startswith(" ") and (found := INSTRUCTION.match(line)):
            root, name, type_, opcode, rest = found.groups()
            trips = KNOWN_TRIPS.search(rest) if opcode == "while" else None
            # Metadata and backend config are most of the text.
            rest = rest.partition(", metadata={")[0].partition(", backend_config=")[0]
            computation.instructions[name] = Instruction(opcode, type_, rest, int(trips[1]) if trips else None)
            computation.root = name if root else computation.root
    return computations, entry


class Affine(NamedTuple):
    """An integer: element `carry` of the innermost loop's state plus `offset`; `carry` None: just the constant."""

    carry: int | None
    offset: int


@dataclasses.dataclass
class TripCounts:
    """Trip counts of loops, from the start, the step and the bound of the counter that their condition compares."""

    computations: dict[str, Computation]

    def __call__(self, frame: Frame, loop: Instruction) -> int | None:
        """Return the trip count of a loop in a frame; None if it depends on the data or cannot be derived."""
        if loop.known_trips is not None:
            return loop.known_trips
        at = frame.inside(loop, "condition")
        while (test := self._instruction(at)) and test.opcode in INLINED:
            at = at.inside(test)
        if test is None or test.opcode != "compare":
            return None
        left, right = (self._value(at, name) for name in test.operands)
        direction = test.rest.partition("direction=")[2][:2]
        for value, bound, compared in ((left, right, direction), (right, left, MIRRORED.get(direction, ""))):
            if value is not None and value.carry is not None:
                start, step = self._start(at, value.carry), self._step(at, value.carry)
                end = self._fixed(at, bound)
                if start is not None and end is not None and step:
                    return _rounds(end - value.offset - start, step, compared)
        return None

    def _instruction(self, frame: Frame, name: str | None = None) -> Instruction | None:
        """Return the frame's instruction of this name, or its root if `name` is None; None if there is none."""
        computation = self.computations[frame.computation]
        return computation.instructions.get(computation.root if name is None else name)

    def _value(self, frame: Frame, name: str | None = None, index: int | None = None) -> Affine | None:
        """Return a scalar's value, or that of element `index` of a tuple (`name` None: the root); None if unknown."""
        one = self._instruction(frame, name)
        if one is None:
            return None
        if one.opcode in PASSED_ON:
            return self._value(frame, one.operands[0], index)
        if one.opcode in INLINED:
            return self._value(frame.inside(one), None, index)
        if one.opcode == "parameter":
            if index is not None and frame.call is not None and frame.call.opcode == "while":
                return Affine(index, 0)
            argument = frame.argument(one)
            return self._value(*argument, index) if argument else None
        if index is not None:
            if one.opcode == "tuple":
                return self._value(frame, one.operands[index])
            unchanged = one.opcode == "while" and self._step(frame.inside(one, "body"), index) == 0
            return self._value(frame, one.operands[0], index) if unchanged else None
        if one.opcode == "constant":
            number = re.match(r"-?\d+(?=\))", one.rest)
            return Affine(None, int(number[0])) if number else None
        if one.opcode == "get-tuple-element":
            return self._value(frame, one.operands[0], int(re.findall(r"index=(\d+)", one.rest)[0]))
        if one.opcode in ("add", "subtract") and "[]" in one.type:
            left, right = (self._value(frame, operand) for operand in one.operands)
            return _affine_sum(left, right, -1 if one.opcode == "subtract" else 1)
        return None

    def _step(self, frame: Frame, carry: int) -> int | None:
        """Return what a round of the innermost loop adds to an element of its carry; None if that is not constant."""
        outside, loop = frame.loop
        after = self._value(outside.inside(loop, "body"), None, carry)
        return after.offset if after is not None and after.carry == carry else None

    def _start(self, frame: Frame, carry: int) -> int | None:
        """Return the number in an element of the innermost loop's carry before its first round; None if unknown."""
        outside, loop = frame.loop
        return self._fixed(outside, self._value(outside, loop.operands[0], carry))

    def _fixed(self, frame: Frame, value: Affine | None) -> int | None:
        """Return the number that a value is in every round of the innermost loop; None if it changes or is unknown."""
        if value is None or value.carry is None:
            return value.offset if value else None
        start = self._start(frame, value.carry) if self._step(frame, value.carry) == 0 else None
        return None if start is None else start + value.offset


def _affine_sum(left: Affine | None, right: Affine | None, sign: int) -> Affine | None:
    if left is None or right is None or (right.carry is not None and (left.carry is not None or sign < 0)):
        return None
    return Affine(right.carry if left.carry is None else left.carry, left.offset + sign * right.offset)


def _rounds(span: int, step: int, direction: str) -> int | None:
    """Return the rounds until a counter, `span` below its bound, fails the comparison; None if it might never."""
    if direction == "NE":
        return span // step if span % step == 0 and span // step >= 0 else None
    if direction not in (("LT", "LE") if step > 0 else ("GT", "GE")):
        return None
    return max(0, -(-span // step) if direction in ("LT", "GT") else span // step + 1)
