"""Blocks for splash attention, compared by the TPU compiler's own schedule; no TPU is needed.

    python benchmarks/tune_splash.py [--chips v5p v6e tpu7x] [--length 4096] [--heads 8]

Prints one JSON line for each chip, pass and block. `cycles` are those of one head: the instructions of a tile that runs times
such tiles, and those around it times the grid's steps; a schedule knows nothing of waiting for memory. `matrix_cycles` are
what the chip's peak would take for the causal half. A block for which fast memory is too small has `refused` instead.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from machine import machine

from dsv3_jax.kernels.splash import Block, splash_attention
from dsv3_jax.plan.topology import find_tpu_compiler, tpu_devices

X, W = 192, 128
# A topology, and bfloat16 FLOPs of one core in a cycle (a v5p chip has two cores, as has a tpu7x chip).
CHIPS = {
    "v5p": ("v5p:2x2x1", 459e12 / 2 / 1.75e9),
    "v6e": ("v6e:2x2", 918e12 / 1.75e9),
    "tpu7x": ("tpu7x:2x2x1", 2307e12 / 2 / 2.2e9),
}
FLOPS = {"forward": 2 * (X + W), "backward": 2 * (3 * X + 2 * W)}
"""Of one query with one key."""
BLOCKS: list[Block] = [
    *((queries, keys, 256) for queries in (512, 1024, 2048) for keys in (512, 1024, 2048)),
    *((1024, 1024, at_once) for at_once in (128, 512, 1024)),
    (512, 512, 512),
]


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS), help="what to compile for")
    parser.add_argument("--length", type=int, default=4096, help="queries, and as many keys")
    parser.add_argument("--heads", type=int, default=8, help="heads; the figures are of one of them")
    parser.add_argument("--compile", nargs=5, help=argparse.SUPPRESS)  # In a process of its own, which writes the schedule.
    flags = parser.parse_args()
    if flags.compile:
        compile_one(flags.compile[0], flags.compile[1], tuple(map(int, flags.compile[2:])), flags.length, flags.heads)
        return
    for chip in flags.chips:
        for direction in FLOPS:
            for block in BLOCKS:
                where = {"benchmark": "tune_splash", "chip": chip, "pass": direction, "block": block}
                print(json.dumps(where | measure(chip, direction, block, flags) | machine()), flush=True)


def compile_one(chip: str, direction: str, block: Block, length: int, heads: int) -> None:
    """Compiles one pass for one device, and prints the bytes of its temporaries."""
    sharding = SingleDeviceSharding(tpu_devices(CHIPS[chip][0])[0])
    q, k, v, do = (jax.ShapeDtypeStruct((1, length, heads, w), jnp.bfloat16, sharding=sharding) for w in (X, X, W, W))
    attend = functools.partial(splash_attention, scale=X**-0.5, **{direction: block})
    both = lambda q, k, v, do: jax.vjp(attend, q, k, v)[1](do)  # noqa: E731
    compiled = (
        jax.jit(attend).lower(q, k, v).compile() if direction == "forward" else jax.jit(both).lower(q, k, v, do).compile()
    )
    print(compiled.memory_analysis().temp_size_in_bytes)


def measure(chip: str, direction: str, block: Block, flags: argparse.Namespace) -> dict[str, Any]:
    """The figures of one block, or what the compiler says against it."""
    queries, keys, _ = block
    steps = (flags.length // queries) * (flags.length // keys)
    tiles = sum(j * keys < (i + 1) * queries for i in range(flags.length // queries) for j in range(flags.length // keys))
    sweeps = flags.length // (queries if direction == "forward" else keys)
    command = [sys.executable, __file__, "--length", str(flags.length), "--heads", str(flags.heads), "--compile"]
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        env = os.environ | {"LIBTPU_INIT_ARGS": dump, "TPU_LIBRARY_PATH": find_tpu_compiler() or "", "JAX_PLATFORMS": "cpu"}
        done = subprocess.run([*command, chip, direction, *map(str, block)], env=env, capture_output=True, text=True)
        if done.returncode:
            refused = re.search(r"Scoped allocation[^.]*\.[^.]*\.[^.]*exceeded[^.]*\.\d+.", done.stderr)
            return {"refused": refused[0] if refused else done.stderr[-300:]}
        total, run, rare, spills = read_schedule(Path(folder), "fwd" if direction == "forward" else "dkv")
    return {
        "cycles": tiles * run + steps * (total - run - rare) + sweeps * rare,
        "matrix_cycles": round(FLOPS[direction] * flags.length**2 / 2 / CHIPS[chip][1]),
        "instructions_of_a_tile": run,
        "spills": spills,
        "temporary_bytes": int(done.stdout.split()[-1]),
    }


def read_schedule(folder: Path, kernel: str) -> tuple[int, int, int, int]:
    """Instructions of a kernel: all, of a tile that runs, of what a sweep does at its ends; and its spills."""
    (final,) = (f for f in folder.glob("*-final_bundles.txt") if re.match(rf"\d+-splash_mha_{kernel}[^-]*-\d+-final", f.name))
    stem = final.name.rsplit("-", 2)[0]
    (use,) = folder.glob(f"{stem}-*final_hlo-static-per-bundle-utilization.txt")
    lines = use.read_text().splitlines()
    spilled = [name.strip() for name in lines[1].split(",")].index("VSTORE:SPILL")
    start = next(i for i, line in enumerate(lines) if line.startswith("== UTIL")) + 1
    rows = [line.split() for line in lines[start:] if line.strip()]
    begun, regions, place = {}, [], 0
    for line in final.read_text().splitlines():
        at = re.match(r"\s*0x([0-9a-f]+)\s", line)
        place = int(at[1], 16) if at else place
        for what, number in re.findall(r"(Start|End) region (\d+)", line):
            if what == "Start":
                begun[number] = place
            elif number in begun:
                regions.append((begun[number], place))
    holds = lambda a, b: a != b and a[0] <= b[0] and b[1] <= a[1]  # noqa: E731
    size = lambda region: region[1] - region[0] + 1  # noqa: E731
    run = max((r for r in regions if not any(holds(r, other) for other in regions)), key=size)
    around = min((r for r in regions if holds(r, run)), key=size)
    beside = {r for r in regions if holds(around, r) and (r[1] <= run[0] or r[0] >= run[1])}
    ends = [r for r in beside if not any(holds(other, r) for other in beside) and size(r) > 100]
    return len(rows), size(run), sum(map(size, ends)), sum(int(row[spilled]) for row in rows)


if __name__ == "__main__":
    main()
