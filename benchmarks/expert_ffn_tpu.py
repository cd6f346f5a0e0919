"""The expert FFN's TPU kernels against megablox, by the TPU compiler's own schedule; needs no TPU.

    python benchmarks/expert_ffn_tpu.py [--chip v5p] [--rows 1024]

At the published widths (7168 and 2048), 8 experts of equal size to a device. Prints one JSON line per chip and number of rows
per expert: bundles over the whole grid of the busiest TensorCore, ours over megablox's (gmm three times forward; three times
gmm and three times tgmm for the gradients, each with its fastest tile); `peak`, the cycles of the arithmetic at the
datasheet's peak over bundles (above 1 the kernel waits for the matrix units); and HBM bytes forward, ours over the three gmm
calls and a SwiGLU pass between them. The denominator of `bytes_over_least` counts each array of that unfused sequence once
per read and write; `ideal` is the ratio if ours did the same. Takes about 5 minutes a chip.
"""

from __future__ import annotations

import argparse
import json
import sys

from expert_kernels import ROW_KERNELS, WEIGHT_KERNELS, Cost, D, E, F, as_weight_tiles, gmm_cost, how_on, row_cost, weights_cost
from machine import machine
from tpu_schedule import CLOCK, CORES, TOPOLOGIES, Job, peak_flops_per_cycle, read_schedules

from dsv3_jax.kernels.tpu.experts import fit_weights

ROWS = 256, 1024, 4096
GMM_TILES = (
    (256, 1024, 1024), (512, 1024, 1024), (1024, 1024, 1024), (512, 2048, 1024), (1024, 2048, 512), (512, 3584, 512),
    (512, 1024, 512), (512, 512, 1024),
)  # fmt: skip
TGMM_TILES = (
    (256, 1024, 1024), (512, 1024, 1024), (1024, 1024, 1024), (512, 2048, 1024), (512, 1024, 2048), (512, 512, 1024),
    (512, 512, 512), (1024, 512, 1024),
)  # fmt: skip
"""Tilings tried for megablox; those that do not fit into its 16 or 32 MiB of VMEM are skipped."""


def megablox(chip: str) -> dict[str, list]:
    """(tiling, schedule) of the tiles that compile: `gmm`, `gmm_transposed` and `tgmm`."""
    kinds = {
        "gmm": [Job("expert_kernels:megablox_gmm", {"tiling": tiling, "transposed": False}) for tiling in GMM_TILES],
        "gmm_transposed": [Job("expert_kernels:megablox_gmm", {"tiling": tiling, "transposed": True}) for tiling in GMM_TILES],
        "tgmm": [Job("expert_kernels:megablox_tgmm", {"tiling": tiling}) for tiling in TGMM_TILES],
    }
    jobs = [job for some in kinds.values() for job in some]
    answers = iter(read_schedules(jobs, chip))
    found = {}
    for kind, some in kinds.items():
        pairs = [(job.arguments["tiling"], next(answers)) for job in some]
        found[kind] = [(tiling, *answer.values()) for tiling, answer in pairs if not isinstance(answer, str)]
    return found


def best_gmm(tiles: list, contracted: int, columns: int, rows: int, chip: str) -> Cost:
    """The cheapest call of gmm, by bundles."""
    return min(gmm_cost(contracted, columns, schedule, tiling, rows, chip) for tiling, schedule in tiles)


def best_tgmm(tiles: list, shape: tuple[int, int], rows: int, chip: str) -> Cost:
    """The cheapest call of tgmm, by bundles."""
    return min(weights_cost((*shape, 1), schedule, as_weight_tiles(tiling), rows, chip) for tiling, schedule in tiles)


def ours(chip: str, rows: int) -> dict[str, Cost]:
    """Return the cost of every kernel by name."""
    jobs = [Job("expert_kernels:forward", {"rows": rows}), Job("expert_kernels:gradients", {"rows": rows})]
    costs = {}
    how = how_on(chip)
    for answer in read_schedules(jobs, chip):
        if isinstance(answer, str):
            raise SystemExit(f"error: {chip}, {rows} rows: {answer}")
        for name, schedule in answer.items():
            kernel = name.removeprefix("transpose_jvp_")
            if kernel in WEIGHT_KERNELS:
                X, Y, rights = WEIGHT_KERNELS[kernel]
                sizes = getattr(how.tiles, kernel.removeprefix("expert_"))
                tiles = fit_weights(sizes, (E * rows, X, Y), E, rights, "bfloat16", how.machine)
                costs[kernel] = weights_cost((X, Y, rights), schedule, tiles, rows, chip)
            elif kernel in ROW_KERNELS:
                sizes = getattr(how.tiles, kernel.removeprefix("jvp_").removeprefix("expert_"))
                costs[kernel] = row_cost(ROW_KERNELS[kernel], schedule, sizes, rows, chip)
    return costs


def compare(chip: str, rows: int, theirs: dict[str, list]) -> dict:
    """Return one line of the table."""
    cost = ours(chip, rows)
    up, down = (best_gmm(theirs["gmm"], *widths, rows, chip) for widths in ((D, F), (F, D)))
    forward, gmm_forward = cost["expert_gate_up"] + cost["expert_down"], up + up + down
    dhidden, dx = (best_gmm(theirs["gmm_transposed"], *widths, rows, chip) for widths in ((D, F), (F, D)))
    dw_in, dw_down = (best_tgmm(theirs["tgmm"], widths, rows, chip) for widths in ((D, F), (F, D)))
    gradients = cost["expert_dhidden"] + cost["expert_dx"] + cost["expert_dw_gate_up"] + cost["expert_dw_down"]
    their_gradients = dhidden + dx + dx + dw_in + dw_in + dw_down
    dw, their_dw = cost["expert_dw_gate_up"] + cost["expert_dw_down"], dw_in + dw_in + dw_down
    kept = cost["jvp_expert_gate_up"] + cost["expert_down"]
    swiglu = 3 * E * rows * F * 2
    weights, x_bytes, hidden = 3 * E * D * F * 2, E * rows * D * 2, E * rows * F * 2
    least_unfused, least = weights + 3 * x_bytes + 6 * hidden, weights + 2 * x_bytes + 2 * hidden
    return {
        "benchmark": "expert_ffn_tpu",
        "chip": chip,
        "rows_per_expert": rows,
        "forward": _line(forward, gmm_forward, chip),
        "forward_keeping_gate_and_up": _line(kept, gmm_forward, chip),
        "gradients": _line(gradients, their_gradients, chip),
        "weight_gradients": _line(dw, their_dw, chip),
        "bytes_over_megablox": round(forward.bytes / (gmm_forward.bytes + swiglu), 3),
        "bytes_over_least": round(forward.bytes / least_unfused, 3),
        "ideal": round(least / least_unfused, 3),
        "kernels": {name: {"bundles": c.bundles, "peak": round(c.peak(chip), 3), "bytes": c.bytes} for name, c in cost.items()},
        **machine(),
    }


def _line(cost: Cost, theirs: Cost, chip: str) -> dict:
    cycles = cost.flops / CORES[chip] / peak_flops_per_cycle(chip)
    return {
        "bundles": cost.bundles,
        "megablox": theirs.bundles,
        "ratio": round(cost.bundles / theirs.bundles, 3),
        "peak": round(cost.peak(chip), 3),
        "milliseconds_at_least": round(1e3 * max(cost.bundles, cycles) / CLOCK[chip], 3),
    }


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=TOPOLOGIES, action="append", help="only this chip (may be given several times)")
    parser.add_argument("--rows", type=int, action="append", help="rows per expert (may be given several times)")
    args = parser.parse_args()
    rows = args.rows or ROWS
    if any(n < 1 or n & (n - 1) for n in rows):
        print(f"error: --rows is {rows}; groups are counted whole, so it takes powers of two", file=sys.stderr)
        sys.exit(2)
    for chip in args.chip or TOPOLOGIES:
        theirs = megablox(chip)
        for n in rows:
            print(json.dumps(compare(chip, n, theirs)), flush=True)


if __name__ == "__main__":
    main()
