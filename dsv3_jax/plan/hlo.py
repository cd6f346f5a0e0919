"""Optimised HLO text, as `compiled.as_text()` prints it: its computations, and how often its loops run."""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple

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
