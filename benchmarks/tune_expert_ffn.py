"""Sizes for the expert FFN's TPU kernels on a chip, by the TPU compiler's own schedule; needs no TPU.

    python benchmarks/tune_expert_ffn.py --chip v6e [--rows 1024]

Compiles every kernel at the published widths with each candidate, and ranks candidates by what bounds the kernel: its bundles,
the arithmetic at the datasheet's peak, or its HBM bytes at the datasheet's bandwidth. Prints one JSON line a candidate and, at
the end, the best for each kernel: `TILES` in dsv3_jax/kernels/tpu/experts.py is made of these by hand, weighing numbers of rows
against each other. Takes about 10 minutes a chip.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from expert_kernels import ROW_KERNELS, WEIGHT_KERNELS, Cost, E, how_on, row_cost, weights_cost
from machine import machine
from tpu_schedule import CLOCK, CORES, TOPOLOGIES, Job, Schedule, peak_flops_per_cycle, read_schedules

from dsv3_jax.kernels.tpu.experts import RowTiles, WeightTiles, fit_weights
from dsv3_jax.parallel.devices import CHIPS

ROW_TILES = [
    RowTiles(block, tile, remainder, columns)
    for block, tile, remainder, columns in (
        (1024, 512, 128, 256), (1024, 512, 128, 512), (1024, 1024, 128, 256), (1024, 256, 128, 512), (2048, 512, 128, 512),
        (2048, 512, 256, 512), (2048, 512, 128, 1024), (2048, 1024, 256, 1024),
    )
]  # fmt: skip
WEIGHT_TILES = [
    WeightTiles(block, part, left, right)
    for block, part, left, right in (
        (512, 128, 1024, 1024), (512, 256, 1024, 1024), (512, 256, 1792, 1024), (1024, 256, 1792, 1024),
        (1024, 256, 1024, 1792), (1024, 256, 3584, 1024), (1024, 256, 2048, 1024), (256, 128, 1024, 2048),
    )
]  # fmt: skip


def seconds(cost: Cost, chip: str) -> float:
    """Lower bound of the kernel's time."""
    cycles = cost.flops / CORES[chip] / peak_flops_per_cycle(chip)
    return max(max(cost.bundles, cycles) / CLOCK[chip], cost.bytes / CHIPS[chip].hbm_bytes)


def candidates(chip: str, rows: int) -> Iterator[tuple[str, Any, Cost]]:
    """(kernel, sizes, cost) of everything that compiles."""
    pairs = list(zip(ROW_TILES, WEIGHT_TILES, strict=True))
    jobs = [Job("expert_kernels:gradients", {"rows": rows, "tiles": [row] * 4 + [weight] * 2}) for row, weight in pairs]
    for (row, weight), answer in zip(pairs, read_schedules(jobs, chip), strict=True):
        if isinstance(answer, str):
            print(json.dumps({"chip": chip, "sizes": [row, weight], "refused": answer}), flush=True)
            continue
        for name, schedule in answer.items():
            kernel = name.removeprefix("transpose_jvp_")
            sizes, cost = _cost(kernel, schedule, row, weight, rows, chip)
            yield kernel, sizes, cost


def _cost(kernel: str, schedule: Schedule, row: RowTiles, weight: WeightTiles, rows: int, chip: str) -> tuple[Any, Cost]:
    if kernel in ROW_KERNELS:
        return row, row_cost(ROW_KERNELS[kernel], schedule, row, rows, chip)
    X, Y, rights = WEIGHT_KERNELS[kernel]
    fitted = fit_weights(weight, (E * rows, X, Y), E, rights, "bfloat16", how_on(chip).machine)
    return weight, weights_cost((X, Y, rights), schedule, fitted, rows, chip)


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=TOPOLOGIES, required=True)
    parser.add_argument("--rows", type=int, default=1024, help="rows an expert, a power of two")
    args = parser.parse_args()
    if args.rows < 1 or args.rows & (args.rows - 1):
        parser.error(f"--rows is {args.rows}; groups are counted whole, so it must be a power of two")
    best: dict[str, tuple[float, Any]] = {}
    for kernel, sizes, cost in candidates(args.chip, args.rows):
        milliseconds = round(1e3 * seconds(cost, args.chip), 3)
        peak = round(cost.peak(args.chip), 3)
        line = {"kernel": kernel, "sizes": sizes._asdict(), "milliseconds_at_least": milliseconds, "bundles": cost.bundles}
        print(json.dumps(line | {"peak": peak, "bytes": cost.bytes}), flush=True)
        best[kernel] = min(best.get(kernel, (float("inf"), None)), (milliseconds, sizes))
    found = {kernel: sizes._asdict() for kernel, (_, sizes) in best.items()}
    print(
        json.dumps(
            {"benchmark": "tune_expert_ffn", "chip": args.chip, "rows_per_expert": args.rows, "best": found, **machine()}
        )
    )


if __name__ == "__main__":
    main()
