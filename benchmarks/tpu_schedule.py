"""The cost of Pallas TPU kernels without a TPU: bundles of the TPU compiler's schedule.

A bundle is issued a cycle where nothing stalls, so that bundles compare kernels. They are not times: the schedule shows no
waiting for memory or for the matrix units. So it can be shorter than the arithmetic at the datasheet's peak (then the kernel
is limited by the matrix units).

`read_schedules` compiles in a child process, because the compiler reads its dump directory when it is loaded.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_jax.parallel.devices import CHIPS
from dsv3_jax.plan.topology import find_tpu_compiler, tpu_devices

TOPOLOGIES = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
CORES = {"v5p": 2, "v6e": 1, "tpu7x": 1}
"""TensorCores that share a device."""
CLOCK = {"v5p": 1.75e9, "v6e": 1.75e9, "tpu7x": 2.2e9}
"""Cycles per second."""


def peak_flops_per_cycle(chip: str) -> float:
    """Of one TensorCore, in bfloat16, by the datasheet."""
    return CHIPS[chip].bf16_flops / CORES[chip] / CLOCK[chip]


class Span(NamedTuple):
    """Consecutive bundles, and how many of their operations are products."""

    bundles: int
    products: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A kernel's schedule."""

    body: Span
    """All bundles of one step of the grid."""
    loops: list[Span]
    """The loops in a step, in order, one trip each."""
    arms: list[Span]
    """The rest of the step, cut at its branches, in order."""

    @property
    def outside_loops(self) -> int:
        """Bundles of a step that runs none of its loops."""
        return self.body.bundles - sum(loop.bundles for loop in self.loops)


class Job(NamedTuple):
    """A program to compile: `module:function` takes the arguments and returns a function and the shapes of its arguments."""

    function: str
    arguments: dict[str, Any]


def read_schedules(jobs: Sequence[Job], chip: str) -> Iterator[dict[str, Schedule] | str]:
    """The schedules of the Pallas kernels of each job by their names, or the compiler's error."""
    library = find_tpu_compiler()
    if library is None:
        raise SystemExit("error: the TPU compiler is missing; `make tpu-compiler` adds it")
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
            "TPU_LIBRARY_PATH": library,
            "JAX_PLATFORMS": "cpu",
        }
        command = [sys.executable, __file__, chip, folder]
        with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(json.dumps(jobs))
            child.stdin.close()
            for line in child.stdout:
                answer = json.loads(line)
                yield answer if isinstance(answer, str) else {name: _from_json(s) for name, s in answer.items()}
        if child.returncode:
            raise SystemExit(f"error: compiling for {chip} failed")


def _from_json(schedule: dict[str, Any]) -> Schedule:
    body, loops, arms = schedule["body"], schedule["loops"], schedule["arms"]
    return Schedule(Span(*body), [Span(*loop) for loop in loops], [Span(*arm) for arm in arms])


def parse(text: str) -> Schedule:
    """Read a listing of final bundles."""
    start: dict[str, int] = {}
    products: dict[int, int] = {}
    loops, branches, at = [], [], 0
    for line in text.splitlines():
        if place := re.match(r"\s*(?:0x([0-9a-f]+)|(0))[\s:]", line):
            at = int(place[1] or place[2], 16)
        products[at] = products.get(at, 0) + len(re.findall(r"= vmatmul\.|\bvmatmul\.", line))
        for region in re.findall(r"Start region (\d+)", line):
            start.setdefault(region, at)
        if jump := re.search(r"sbr\.rel.*target = \$region(\d+)", line):
            target = start.get(jump[1])
            if target is not None and target <= at:
                loops.append((target, at + 5))  # Four more bundles are issued behind a branch.
            else:
                branches.append(at)

    def span(begin: int, end: int) -> Span:
        return Span(end - begin, sum(n for place, n in products.items() if begin <= place < end))

    # The outermost loop is the grid.
    begin, end = max(loops, key=lambda loop: loop[1] - loop[0])
    inner = sorted(loop for loop in loops if loop != (begin, end))
    cuts = sorted([begin, end, *(b for b in branches if begin < b < end), *(edge for loop in inner for edge in loop)])
    arms = [(a, b) for a, b in itertools.pairwise(cuts) if not any(lo <= a < hi for lo, hi in inner)]
    return Schedule(span(begin, end), [span(*loop) for loop in inner], [span(*arm) for arm in arms])


def _compile(chip: str, folder: str) -> None:
    """The child: compiles every job of stdin, and prints where its kernel's listing is."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    devices = tpu_devices(TOPOLOGIES[chip])[:1]
    mesh = Mesh(np.array(devices), ("x",), axis_types=(AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())
    for function, arguments in json.loads(sys.stdin.read()):
        module, name = function.split(":")
        call, shapes = getattr(importlib.import_module(module), name)(**arguments)
        try:
            with jax.set_mesh(mesh):
                jax.jit(call, in_shardings=replicated).lower(*shapes).compile()
        except Exception as error:
            print(json.dumps((str(error).strip().splitlines() or ["refused"])[0]), flush=True)
            continue
        found = {}
        for listing in Path(folder).glob("*-final_bundles.txt"):
            if name_of := re.match(r"(\d+-(.+)-)\d+-final_bundles\.txt$", listing.name):
                about = next(Path(folder).glob(f"{name_of[1]}*-schedule-analysis_final_bundles.txt"))
                # "TLP" is the program that calls them all.
                if name_of[2] != "TLP" and "tpu_custom_call" in about.read_text():
                    found[name_of[2].split(".")[0].strip("_")] = dataclasses.asdict(parse(listing.read_text()))
        for dumped in Path(folder).iterdir():
            dumped.unlink()
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    _compile(*sys.argv[1:])
