"""Blocks for splash attention, compared by the TPU compiler's own schedule; no TPU is needed.

    python benchmarks/tune_splash.py [--chip v5p] [--length 4096] [--heads 8]

Prints one JSON line for each chip, pass and block. `cycles` are those of one head: the bundles of a tile that runs times such
tiles, and those around it times the grid's steps; a schedule does not include waiting for memory. `matrix_cycles` are what the
chip's peak would take for the causal half. A block for which fast memory is too small has `refused` instead.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from machine import machine
from tpu_schedule import TOPOLOGIES, Job, Schedule, peak_flops_per_cycle, read_schedules

from dsv3_jax.kernels.tpu.splash import Block, splash_attention

X, W = 192, 128
"""Widths of queries and keys, and of values."""
FLOPS = {"forward": 2 * (X + W), "backward": 2 * (3 * X + 2 * W)}
"""Of one query with one key."""
BLOCKS: list[Block] = [
    *((queries, keys, 256) for queries in (512, 1024, 2048) for keys in (512, 1024, 2048)),
    *((1024, 1024, at_once) for at_once in (128, 512, 1024)),
    (512, 512, 512),
]


def program(direction: str, block: Block, length: int, heads: int) -> tuple[Callable, tuple]:
    """One pass over one sequence."""
    q, k, v, do = (jax.ShapeDtypeStruct((1, length, heads, width), jnp.bfloat16) for width in (X, X, W, W))
    attend = functools.partial(splash_attention, scale=X**-0.5, **{direction: tuple(block)})
    if direction == "forward":
        return attend, (q, k, v)
    return lambda q, k, v, do: jax.vjp(attend, q, k, v)[1](do), (q, k, v, do)


def cycles(schedule: Schedule, by_key: bool, block: Block, length: int) -> int:
    """Of one head; `by_key` where a sweep of the grid goes along the queries of a block of keys."""
    queries, keys, _ = block
    rows, columns = length // queries, length // keys
    tiles = sum(j * keys < (i + 1) * queries for i in range(rows) for j in range(columns))
    run = sum(arm.bundles for arm in schedule.arms if arm.products)
    # What a sweep does at its ends: it clears its sums, and writes them.
    ends = sum(arm.bundles for arm in schedule.arms if not arm.products and arm.bundles > 100)
    sweeps = columns if by_key else rows
    return tiles * run + rows * columns * (schedule.body.bundles - run - ends) + sweeps * ends


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=TOPOLOGIES, action="append", help="only this chip (may be given several times)")
    parser.add_argument("--length", type=int, default=4096, help="queries, and as many keys")
    parser.add_argument("--heads", type=int, default=8, help="heads; the figures are of one of them")
    flags = parser.parse_args()
    if flags.length % max(max(block[:2]) for block in BLOCKS):
        parser.error(f"--length is {flags.length}; it must be a multiple of the largest block, 2048")
    for chip in flags.chip or TOPOLOGIES:
        for direction, flops in FLOPS.items():
            sizes = {"direction": direction, "length": flags.length, "heads": flags.heads}
            jobs = [Job("tune_splash:program", sizes | {"block": block}) for block in BLOCKS]
            for block, answer in zip(BLOCKS, read_schedules(jobs, chip), strict=True):
                where = {"benchmark": "tune_splash", "chip": chip, "pass": direction, "block": block}
                print(json.dumps(where | _figures(answer, direction, block, flops, flags.length, chip) | machine()), flush=True)


def _figures(answer: Any, direction: str, block: Block, flops: int, length: int, chip: str) -> dict[str, Any]:
    if isinstance(answer, str):
        return {"refused": answer[:200]}
    # Backward, the kernel of the keys' gradients may leave those of the queries to another.
    kernels = {name: schedule for name, schedule in answer.items() if ("fwd" in name) == (direction == "forward")}
    return {
        "cycles": sum(cycles(schedule, "dkv" in name, block, length) for name, schedule in kernels.items()),
        "kernels": list(kernels),
        "matrix_cycles": round(flops * length**2 / 2 / peak_flops_per_cycle(chip)),
    }


if __name__ == "__main__":
    main()
