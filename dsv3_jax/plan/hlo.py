"""The collectives that one execution of a compiled program runs, read from its optimised HLO text.

`compiled.as_text()` shows a collective once, however deep in loops it stands, and names devices by number. Here loops
are multiplied in, device groups become mesh axes, and shapes the bytes that a device sends.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import NamedTuple

import numpy as np

# What one device of n sends in a ring, given the bytes of the result.
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
    """All collectives of one kind along the same mesh axes, within slices or between them."""

    kind: str
    """The operation in HLO, such as "all-gather", whether it runs synchronously or not."""
    axis: str
    """The mesh axes it runs along, joined by "+" in mesh order; "?" where its groups follow no set of axes."""
    bytes: int
    """What one device sends over the links in a step."""
    count: int
    """Executions in a step."""
    data_dependent: bool
    """Whether some stand in a loop whose length depends on the data: of it `open_trips` rounds are counted."""
    across_slices: bool = False
    """Whether it goes between slices, over the network of their hosts."""


def collectives(
    hlo_text: str,
    mesh_axes: dict[str, int],
    *,
    slices: int = 1,
    ragged_rows: float = 0,
    open_trips: int = 1,
    outer_trips: int | None = None,
) -> list[Collective]:
    """The collectives of one execution, merged by kind, axis and network, most bytes first.

    Bytes are what one device sends in a ring of n devices, s being the bytes of its array:

      all-gather          (n - 1) / n of the output      reduce-scatter     (n - 1) / n of the input
      all-reduce          2 (n - 1) / n of s             all-to-all         (n - 1) / n of s
      collective-permute  s                              ragged-all-to-all  `ragged_rows` rows of s

    Arrays that travel in one collective add up; padding by the compiler is sent and so counted. Groups of one device
    send nothing and are left out. A loop counts as often as it runs, or `open_trips` times where that depends on the data; of a
    conditional, the branch that sends most. Between slices the TPU compiler sends through the hosts: that counts as the
    collective it stands for, among one device of every slice, along the first axis.

    Args:
      hlo_text: what `compiled.as_text()` returns.
      mesh_axes: axis -> size of the mesh that the program was compiled for, outermost first.
      slices: how many slices the first axis runs across. A program for several is the program of one of them.
      ragged_rows: rows that a device sends to others in one ragged all-to-all. Its buffers are made for more than the
        expected traffic, so the text does not say.
      open_trips: how often a loop runs whose length depends on the data.
      outer_trips: the same of such a loop that stands in no other, where that is known to the caller; it then counts as known.

    Raises:
      ValueError: where the text is for another number of devices than the mesh has.
    """
    mesh = _mesh_of_a_slice(hlo_text, mesh_axes, slices)
    computations, entry = parse(hlo_text)
    total = _Traffic(computations, mesh, slices, ragged_rows, open_trips, outer_trips).tally(Frame(entry)) if entry else {}
    found = [
        Collective(kind, axis, now.sent, now.runs, now.data_dependent, across)
        for (kind, axis, across), now in total.items()
        if now.runs
    ]
    return sorted(found, key=lambda one: (-one.bytes, one.kind, one.axis, one.across_slices))


def _mesh_of_a_slice(hlo_text: str, mesh_axes: dict[str, int], slices: int) -> dict[str, int]:
    stated, devices = PARTITIONS.search(hlo_text), math.prod(mesh_axes.values())
    if stated and int(stated[1]) * slices != devices:
        program = f"{stated[1]} devices in each of {slices} slice(s)"
        raise ValueError(f"the program runs on {program}, but the mesh {mesh_axes} has {devices}; pass the mesh it is for")
    if slices == 1:
        return mesh_axes
    first = next(iter(mesh_axes), "")
    if mesh_axes.get(first, 1) % slices:
        raise ValueError(f"the first axis of the mesh {mesh_axes} does not split over {slices} slices")
    return mesh_axes | {first: mesh_axes[first] // slices}


class _Numbers(NamedTuple):
    sent: int
    runs: int
    data_dependent: bool


_Tally = dict[tuple[str, str, bool], _Numbers]
"""By kind, axis, and whether it goes between slices."""


def _add(into: _Tally, more: _Tally, times: int | None = 1, open_trips: int = 1) -> None:
    """Adds what runs `times` times, None standing for as often as the data wants: counted as `open_trips`."""
    n = open_trips if times is None else times
    for key, new in more.items():
        old = into.get(key, _Numbers(0, 0, False))
        data_dependent = old.data_dependent or new.data_dependent or times is None
        into[key] = _Numbers(old.sent + n * new.sent, old.runs + n * new.runs, data_dependent)


class _Traffic:
    """Walks a program from its entry, through the calls that lead to a collective."""

    def __init__(
        self,
        computations: dict[str, Computation],
        mesh: dict[str, int],
        slices: int,
        ragged_rows: float,
        open_trips: int,
        outer_trips: int | None,
    ) -> None:
        self.computations, self.mesh, self.slices, self.ragged_rows = computations, mesh, slices, ragged_rows
        self.open_trips, self.outer_trips = open_trips, outer_trips
        self.trips = Trips(computations)
        # The same groups stand in a program thousands of times.
        self.group = functools.cache(functools.partial(_group, mesh))
        self.relevant = functools.cache(self._relevant)

    def tally(self, frame: Frame) -> _Tally:
        """All that one run of a computation sends."""
        total: _Tally = {}
        for one in self.relevant(frame.computation):
            if _kind(one):
                _add(total, self._transfer(one, frame.computation))
            elif one.opcode == "while":
                trips = self.trips(frame, one)
                if trips is None and frame.caller is None:
                    trips = self.outer_trips
                _add(total, self.tally(frame.inside(one, "body")), trips, self.open_trips)
                _add(total, self.tally(frame.inside(one, "condition")), None if trips is None else trips + 1, self.open_trips)
            else:
                called = [self.tally(Frame(name, frame, one)) for names in one.called.values() for name in names]
                if one.opcode == "conditional":
                    called = [max(called, key=lambda branch: sum(numbers.sent for numbers in branch.values()))]
                for more in called:
                    _add(total, more)
        return total

    def _relevant(self, name: str) -> list[Instruction]:
        """The collectives of a computation and the calls that lead to some; not what ends an asynchronous one."""
        return [
            one
            for one in self.computations[name].instructions.values()
            if not one.opcode.endswith(("-done", "-update"))
            and (_kind(one) or any(self.relevant(to) for names in one.called.values() for to in names))
        ]

    def _transfer(self, one: Instruction, computation: str) -> _Tally:
        kind = _kind(one)
        if "chain_id=" in one.rest and not self._starts_chain(computation):
            # The TPU fusions that compute beside a collective each repeat it; the one that starts it counts.
            return {}
        across = one.opcode == "send"
        if across:
            n, axis, size = self.slices, next(iter(self.mesh)), _bytes(_elements(one.type)[0])
            size = {"all-gather": n * size, "reduce-scatter": size // n}.get(kind, size)
        else:
            groups = GROUPS.search(one.rest)
            n, axis = self.group(groups[1] if groups else "", kind == "collective-permute")
            # What starts a collective returns (operands, results, ...); only an all-reduce returns its results alone.
            paired = one.opcode.endswith("-start") and kind != "all-reduce"
            size = _bytes(_elements(one.type)[1] if paired else one.type)
            if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                # A TPU fusion of all-reduce and slice, which runs as what it is called.
                kind, size = "reduce-scatter", size // n
        if n == 1:
            return {}
        sent = round(self.ragged_rows * size / _rows(one.type)) if kind == RAGGED else SENT[kind](n, size)
        return {(kind, axis, across): _Numbers(sent, 1, False)}

    def _starts_chain(self, computation: str) -> bool:
        instructions = self.computations[computation].instructions.values()
        return any('custom_call_target="AsyncCollectiveStart"' in one.rest for one in instructions)


def _kind(one: Instruction) -> str:
    """The collective that an instruction is or starts, or "" for none."""
    kind = one.opcode.removesuffix("-start")
    if one.opcode == "send" and (found := ACROSS_SLICES.search(one.rest)):
        kind = found[1].lower().replace("_", "-").replace("one-to-one", "collective-permute")
    return kind if kind in SENT or kind == RAGGED else ""


def _elements(type_: str) -> list[str]:
    """The types in a tuple type."""
    found, depth = [""], 0
    for character in type_[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return found


def _bytes(type_: str) -> int:
    """Bytes of an array type, or of all arrays in a tuple type; tokens have none."""
    total = 0
    for dtype, shape in ARRAY.findall(type_):
        width = BITS.match(dtype)
        bits = 8 if dtype == "pred" else int(width[1]) if width else 0
        total += math.ceil(bits * math.prod(int(size.removeprefix("<=")) for size in shape.split(",") if size) / 8)
    return total


def _rows(type_: str) -> int:
    """The leading dimension of an array."""
    array = ARRAY.search(type_)
    return int(re.split("[,<]", array[2])[0]) if array and array[2] else 1


def _group(mesh: dict[str, int], text: str, pairs: bool) -> tuple[int, str]:
    """Devices in a group, and the axes it runs along; (1, "") where nothing leaves a device."""
    devices = math.prod(mesh.values())
    groups = _groups(text) or [list(range(devices))]
    last = max(map(max, groups))
    if last >= devices:
        raise ValueError(f"a collective names device {last}, but the mesh {mesh} has {devices}; pass the mesh it is for")
    varying: set[str] = set()
    for group in groups:
        places = np.unravel_index(group, tuple(mesh.values()))
        varying |= {name for name, along in zip(mesh, places, strict=True) if (along != along[0]).any()}
    names = [name for name in mesh if name in varying]
    whole = pairs or {len(group) for group in groups} == {math.prod(mesh[name] for name in names)}
    return (max(map(len, groups)), "+".join(names) if whole else "?") if names else (1, "")


def _groups(text: str) -> list[list[int]]:
    """The groups as HLO writes them: lists, a permuted range, or axes of a mesh of the compiler's own."""
    if text.startswith("{"):
        return [_integers(group) for group in re.findall(r"\{([\d,]+)\}", text)]
    if text.startswith("["):
        shape, _, order = text.partition("<=")
        return _range(order).reshape(_integers(shape[1:-1])).tolist()
    if found := MESH.match(text):
        sizes = {name: int(size) for name, size in (axis.split("=") for axis in found[1].split(","))}
        return _along(_range(found[2] or f"[{math.prod(sizes.values())}]"), sizes, found[3].split(","))
    return []


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _range(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: 0 to 7 as a 4 x 2 matrix, transposed; or a plain list. Flat."""
    found = IOTA.match(text)
    if not found:
        return np.array(_integers(text))
    shape = _integers(found[1])
    return np.arange(math.prod(shape)).reshape(shape).transpose(_integers(found[2]) if found[2] else None).ravel()


def _along(devices: np.ndarray, sizes: dict[str, int], axes: list[str]) -> list[list[int]]:
    """The devices of a mesh that differ in `axes` only; `x:(2)4` is the part of x of size 4 below its leading 2."""
    shape = tuple(sizes.values())
    rest = np.indices(shape).reshape(len(shape), -1)
    n = 1
    for axis in axes:
        name, _, part = axis.partition(":")
        before, size = _integers(part[1:].replace(")", ",")) if part else (1, sizes[name])
        place, below = list(sizes).index(name), sizes[name] // (before * size)
        rest[place] -= rest[place] // below % size * below
        n *= size
    order = np.argsort(np.ravel_multi_index(tuple(rest), shape), kind="stable")
    return devices[order].reshape(-1, n).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Optimised HLO text, as `compiled.as_text()` prints it: its computations, and how often its loops run.


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
    """Of a loop: how often it runs, where the compiler says so."""

    @property
    def operands(self) -> list[str]:
        found = OPERANDS.match(self.rest)
        return NAME.findall(found[1]) if found else []

    @property
    def called(self) -> dict[str, list[str]]:
        """Attribute -> the computations it names."""
        return {attribute: NAME.findall(names) for attribute, names in CALLED.findall(self.rest)}


@dataclasses.dataclass
class Computation:
    """Instructions by name, in order."""

    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: str = ""


class Frame(NamedTuple):
    """A computation, and the call that it runs in."""

    computation: str
    caller: Frame | None = None
    call: Instruction | None = None

    def inside(self, call: Instruction, role: str | None = None) -> Frame:
        """The computation that an instruction calls, or the one it calls as its `role`."""
        (name, *_) = call.called[role] if role else next(iter(call.called.values()))
        return Frame(name, self, call)

    def argument(self, parameter: Instruction) -> tuple[Frame, str] | None:
        """Where a parameter comes from; None unless that is an operand of a plain call."""
        if self.caller is None or self.call is None or self.call.opcode not in INLINED:
            return None
        return self.caller, self.call.operands[int(parameter.rest.partition(")")[0])]

    @property
    def loop(self) -> tuple[Frame, Instruction]:
        """The innermost loop around, and the frame that it stands in."""
        assert self.caller is not None
        assert self.call is not None
        return (self.caller, self.call) if self.call.opcode == "while" else self.caller.loop


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and the name of its entry ("" if it has none)."""
    computations: dict[str, Computation] = {}
    entry, computation = "", Computation()
    for line in text.split("\n"):
        if line.endswith("{") and (header := COMPUTATION.match(line)):
            computation = computations[header[2]] = Computation()
            entry = header[2] if header[1] else entry
        elif line.startswith(" ") and (found := INSTRUCTION.match(line)):
            root, name, type_, opcode, rest = found.groups()
            trips = KNOWN_TRIPS.search(rest) if opcode == "while" else None
            # Most of the text is what is cut off here.
            rest = rest.partition(", metadata={")[0].partition(", backend_config=")[0]
            computation.instructions[name] = Instruction(opcode, type_, rest, int(trips[1]) if trips else None)
            computation.root = name if root else computation.root
    return computations, entry


class Affine(NamedTuple):
    """An integer: an element of the carry of the loop around, if any, plus a constant."""

    carry: int | None
    offset: int


class Trips:
    """How often loops run: from the start, the step and the bound of the counter that their condition compares."""

    def __init__(self, computations: dict[str, Computation]) -> None:
        self.computations = computations

    def __call__(self, frame: Frame, loop: Instruction) -> int | None:
        """The trips of a loop in a frame; None if they depend on the data."""
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
        """An instruction by name, or else the root."""
        computation = self.computations[frame.computation]
        return computation.instructions.get(computation.root if name is None else name)

    def _value(self, frame: Frame, name: str | None) -> Affine | None:
        """The value of a scalar, by default of the root."""
        one = self._instruction(frame, name)
        if one is None:
            return None
        if one.opcode == "constant":
            number = re.match(r"-?\d+(?=\))", one.rest)
            return Affine(None, int(number[0])) if number else None
        if one.opcode in PASSED_ON:
            return self._value(frame, one.operands[0])
        if one.opcode in INLINED:
            return self._value(frame.inside(one), None)
        if one.opcode == "parameter":
            argument = frame.argument(one)
            return self._value(*argument) if argument else None
        if one.opcode == "get-tuple-element":
            return self._element(frame, one.operands[0], int(re.findall(r"index=(\d+)", one.rest)[0]))
        if one.opcode in ("add", "subtract") and "[]" in one.type:
            left, right = (self._value(frame, operand) for operand in one.operands)
            return _sum(left, right, -1 if one.opcode == "subtract" else 1)
        return None

    def _element(self, frame: Frame, name: str | None, index: int) -> Affine | None:
        """The value of an element of a tuple, by default of the root."""
        one = self._instruction(frame, name)
        if one is None:
            return None
        if one.opcode == "tuple":
            return self._value(frame, one.operands[index])
        if one.opcode in PASSED_ON:
            return self._element(frame, one.operands[0], index)
        if one.opcode in INLINED:
            return self._element(frame.inside(one), None, index)
        if one.opcode == "parameter":
            if frame.call is not None and frame.call.opcode == "while":
                return Affine(index, 0)
            argument = frame.argument(one)
            return self._element(*argument, index) if argument else None
        if one.opcode == "while":
            kept = self._step(frame.inside(one, "body"), index) == 0
            return self._element(frame, one.operands[0], index) if kept else None
        return None

    def _step(self, frame: Frame, carry: int) -> int | None:
        """What a round of the loop around adds to an element of its carry; None if that is no constant."""
        outside, loop = frame.loop
        after = self._element(outside.inside(loop, "body"), None, carry)
        return after.offset if after is not None and after.carry == carry else None

    def _start(self, frame: Frame, carry: int) -> int | None:
        """What an element of the carry of the loop around starts from."""
        outside, loop = frame.loop
        return self._fixed(outside, self._element(outside, loop.operands[0], carry))

    def _fixed(self, frame: Frame, value: Affine | None) -> int | None:
        """The number that a value is in every round of the loop around."""
        if value is None or value.carry is None:
            return value.offset if value else None
        start = self._start(frame, value.carry) if self._step(frame, value.carry) == 0 else None
        return None if start is None else start + value.offset


def _sum(left: Affine | None, right: Affine | None, sign: int) -> Affine | None:
    if left is None or right is None or (right.carry is not None and (left.carry is not None or sign < 0)):
        return None
    return Affine(right.carry if left.carry is None else left.carry, left.offset + sign * right.offset)


def _rounds(span: int, step: int, direction: str) -> int | None:
    """Rounds until a counter that starts `span` short of its bound no longer compares so with it."""
    if direction == "NE":
        return span // step if span % step == 0 and span // step >= 0 else None
    if direction not in (("LT", "LE") if step > 0 else ("GT", "GE")):
        return None
    return max(0, -(-span // step) if direction in ("LT", "GT") else span // step + 1)
