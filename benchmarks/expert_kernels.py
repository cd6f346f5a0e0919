"""Schedules of the expert FFN's TPU kernels and of megablox, from the TPU compiler: programs and counting.

Groups are taken to be equal and to begin at multiples of their size. Bundles are those of the busiest TensorCore over the whole
grid; bytes are what the grid's blocks read and write in HBM, a block counting whenever its index changes from step to step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from tpu_schedule import CORES, Schedule, peak_flops_per_cycle

from dsv3_jax.kernels.grouped import expert_ffn_by, steps_by_block, visits_of
from dsv3_jax.kernels.tpu.experts import TILES, KernelConfig, RowTiles, Tiles, WeightTiles, fit_rows, this_machine
from dsv3_jax.kernels.tpu.memory import Machine, sublanes

D, F, E = 7168, 2048, 8
"""The published widths, and the experts of one device."""
DTYPE = jnp.bfloat16


def how_on(chip: str) -> KernelConfig:
    """Return the tile sizes used on this chip."""
    name = chip.removeprefix("tpu")
    info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(name), CORES[chip])
    return KernelConfig(TILES[name], Machine(info.num_cores, info.vmem_capacity_bytes))


class Cost(NamedTuple):
    """Cost of a kernel over its whole grid."""

    bundles: int
    flops: float
    bytes: int

    def peak(self, chip: str) -> float:
        """Cycles that the arithmetic takes at the datasheet's peak, over bundles."""
        return self.flops / CORES[chip] / peak_flops_per_cycle(chip) / self.bundles

    def __add__(self, other: Any) -> Cost:
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))


class RowKernel(NamedTuple):
    """A call of `grouped_matmul`."""

    contracted: int
    columns: int
    operands: tuple[int, int, int]
    """Numbers of arrays [R, K], of weights, and of arrays [R, N]."""


ROW_KERNELS = {
    "expert_gate_up": RowKernel(D, F, (1, 2, 1)),
    "jvp_expert_gate_up": RowKernel(D, F, (1, 2, 3)),
    "expert_down": RowKernel(F, D, (1, 1, 1)),
    "jvp_expert_down": RowKernel(F, D, (1, 1, 1)),
    "expert_dhidden": RowKernel(D, F, (1, 1, 4)),
    "expert_dx": RowKernel(F, D, (2, 2, 1)),
}
WEIGHT_KERNELS = {"expert_dw_gate_up": (D, F, 2), "expert_dw_down": (F, D, 1)}
"""Calls of `grouped_matmul_dw`: the widths of the left array and the right ones, and how many of those."""


# --- Programs ---------------------------------------------------------------------------------------------------------


def _shapes(rows: int) -> tuple[list[jax.ShapeDtypeStruct], jax.ShapeDtypeStruct]:
    shapes = (E * rows, D), (E, D, F), (E, D, F), (E, F, D)
    return [jax.ShapeDtypeStruct(shape, DTYPE) for shape in shapes], jax.ShapeDtypeStruct((E,), jnp.int32)


def _how(tiles: Sequence[Sequence[int]] | None) -> KernelConfig:
    how = this_machine()
    if tiles is None:
        return how
    kinds = [RowTiles] * 4 + [WeightTiles] * 2
    return how._replace(tiles=Tiles(*(kind(*sizes) for kind, sizes in zip(kinds, tiles, strict=True))))


def forward(rows: int, tiles: Sequence[Sequence[int]] | None = None) -> tuple[Callable, tuple]:
    """Return the forward FFN."""
    arrays, sizes = _shapes(rows)
    return lambda *args: expert_ffn_by(*args, _how(tiles)), (*arrays, sizes)


def gradients(rows: int, tiles: Sequence[Sequence[int]] | None = None) -> tuple[Callable, tuple]:
    """Return the FFN with its residuals and gradients."""
    arrays, sizes = _shapes(rows)

    def run(*args: jax.Array) -> Any:
        *differentiated, sizes_E, dy_RD = args
        y_RD, transpose = jax.vjp(lambda *a: expert_ffn_by(*a, sizes_E, _how(tiles)), *differentiated)
        return y_RD, transpose(dy_RD)

    return run, (*arrays, sizes, arrays[0])


def megablox_gmm(tiling: Sequence[int], transposed: bool) -> tuple[Callable, tuple]:
    """x w_gate, or y w_gate^T; how many rows there are changes nothing about a step."""
    arrays, sizes = _shapes(1024)
    left = jax.ShapeDtypeStruct((E * 1024, F), DTYPE) if transposed else arrays[0]
    run = lambda x, w, s: gmm(x, w, s, DTYPE, tuple(tiling), transpose_rhs=transposed)  # noqa: E731
    return run, (left, arrays[1], sizes)


def megablox_tgmm(tiling: Sequence[int]) -> tuple[Callable, tuple]:
    """x^T dgate."""
    arrays, sizes = _shapes(1024)
    right = jax.ShapeDtypeStruct((E * 1024, F), DTYPE)
    return lambda x, g, s: tgmm(x.swapaxes(0, 1), g, s, DTYPE, tuple(tiling)), (arrays[0], right, sizes)


# --- Counting ---------------------------------------------------------------------------------------------------------


def _traffic(*sequences: tuple[Sequence[Any], int]) -> int:
    """Return the bytes of blocks, given the index at every step and the size of each."""
    return sum(size * sum(1 for _ in itertools.groupby(indices)) for indices, size in sequences)


def row_cost(kernel: RowKernel, schedule: Schedule, tiles: RowTiles, rows: int, chip: str) -> Cost:
    """Of a call of `grouped_matmul` with `rows` rows for each of E experts."""
    num_rows, width = E * rows, jnp.dtype(DTYPE).itemsize
    K, N, (inner, weights, outer) = kernel
    block, tile, remainder, columns = fit_rows(tiles, (num_rows, K, N), E, kernel.operands, DTYPE, how_on(chip).machine, "")
    cores = CORES[chip] if -(-N // columns) % CORES[chip] == 0 else 1
    sizes_G = jnp.array([rows] * E + [0], jnp.int32)
    num_blocks, num_tiles = -(-num_rows // block), -(-N // columns) // cores
    steps, count = steps_by_block(visits_of(sizes_G, num_rows, block, visit_empty=False), num_blocks, num_tiles)
    group, at, column, start = (np.asarray(a) for a in steps)
    group, at, column = (a[: int(count)] for a in (group, at, column))
    begin, end = np.maximum(start[group] - at * block, 0), np.minimum(start[group + 1] - at * block, block)
    first = begin // sublanes(DTYPE) * sublanes(DTYPE)
    whole = (end - first) // tile
    rest = -(-(end - first - whole * tile) // remainder)
    bundles = (
        schedule.outside_loops * len(group) + whole.sum() * schedule.loops[0].bundles + rest.sum() * schedule.loops[1].bundles
    )
    moved = _traffic(
        (list(at), inner * block * K * width),
        (list(zip(group, column, strict=True)), weights * K * columns * width),
        (list(zip(at, column, strict=True)), outer * block * columns * width),
    )
    return Cost(int(bundles), 2.0 * num_rows * K * N * weights, moved * cores)


def weights_cost(shape: tuple[int, int, int], schedule: Schedule, tiles: WeightTiles, rows: int, chip: str) -> Cost:
    """Of a call of `grouped_matmul_dw`, or of tgmm, with `rows` rows for each of E experts."""
    X, Y, rights = shape
    num_rows, width = E * rows, jnp.dtype(DTYPE).itemsize
    visits = visits_of(jnp.full(E, rows, jnp.int32), num_rows, tiles.block, visit_empty=True)
    count = int(visits.number)
    group, at, start = np.asarray(visits.group_V)[:count], np.asarray(visits.block_V)[:count], np.asarray(visits.start_G)
    begin = np.maximum(start[group] - at * tiles.block, 0)
    end = np.minimum(start[group + 1] - at * tiles.block, tiles.block)
    first = np.append(True, group[1:] != group[:-1])
    is_whole = end - begin == tiles.block
    if schedule.loops:  # Ours: products of whole blocks twice, of the first of a group and of later ones.
        i, j = (i for i, arm in enumerate(schedule.arms) if arm.products)
        start_whole, add_whole, zero = schedule.arms[i], schedule.arms[j], schedule.arms[j + 1]
        store = max(schedule.arms[j + 2 :], key=lambda arm: arm.bundles)
        parts = np.where(is_whole, 0, -(-(end - begin) // tiles.part))
        common = schedule.outside_loops - sum(arm.bundles for arm in (start_whole, add_whole, zero, store))
        one_tile = (
            common * count
            + store.bundles * int(first.sum())
            + start_whole.bundles * int((is_whole & first).sum())
            + add_whole.bundles * int((is_whole & ~first).sum())
            + zero.bundles * int((~is_whole & first).sum())
            + int(parts.sum()) * schedule.loops[0].bundles
        )
    else:  # tgmm: every visit works through a whole tile of rows.
        (i,) = (i for i, arm in enumerate(schedule.arms) if arm.products)
        zero, _whole = schedule.arms[i - 1], schedule.arms[i]
        store = max(schedule.arms[i + 1 :], key=lambda arm: arm.bundles)
        common = schedule.outside_loops - zero.bundles - store.bundles
        one_tile = common * count + (zero.bundles + store.bundles) * int(first.sum())
    num_x, num_y = -(-X // tiles.left), -(-Y // tiles.right)
    order = [(i, j, v) for i in range(num_x) for j in range(num_y) for v in range(count)]
    moved = _traffic(
        ([(i, at[v]) for i, j, v in order], tiles.block * tiles.left * width),
        ([(j, at[v]) for i, j, v in order], rights * tiles.block * tiles.right * width),
        ([(i, j, group[v]) for i, j, v in order], rights * tiles.left * tiles.right * width),
    )
    # Cores share the outermost axis of the grid: ours, that of X; tgmm's, that of Y.
    busiest = -(-num_x // CORES[chip]) * num_y if schedule.loops else num_x * -(-num_y // CORES[chip])
    return Cost(one_tile * busiest, 2.0 * num_rows * X * Y * rights, moved)


def gmm_cost(contracted: int, columns: int, schedule: Schedule, tiling: Sequence[int], rows: int, chip: str) -> Cost:
    """Of a call of gmm with `rows` rows for each of E experts; the tile of rows divides them or is divided by them."""
    tile_m, tile_k, tile_n = tiling
    num_rows, width = E * rows, jnp.dtype(DTYPE).itemsize
    num_n, num_k, num_m = -(-columns // tile_n), -(-contracted // tile_k), max(num_rows // tile_m, E)
    with_products = [arm for arm in schedule.arms if arm.products]
    zero = schedule.arms[schedule.arms.index(with_products[0]) - 1]
    common = schedule.body.bundles - sum(arm.bundles for arm in with_products) - zero.bundles
    inner, last = with_products[0], with_products[-1]
    one_tile = common * num_k + zero.bundles + inner.bundles * (num_k - 1) + last.bundles
    # The grid runs over columns, then rows, then the contracted dimension: only the blocks of the last step are present.
    order = [(n, m, k) for n in range(num_n) for m in range(num_m) for k in range(num_k)]
    groups_a_tile = max(tile_m // rows, 1)
    moved = _traffic(
        ([(m // groups_a_tile, k) for n, m, k in order], tile_m * tile_k * width),
        ([(m * tile_m // rows if tile_m < rows else m, k, n) for n, m, k in order], tile_k * tile_n * width),
        ([(m // groups_a_tile, n) for n, m, k in order], tile_m * tile_n * width),
    )
    return Cost(one_tile * -(-num_n // CORES[chip]) * num_m, 2.0 * num_rows * contracted * columns, moved)


def as_weight_tiles(tiling: Sequence[int]) -> WeightTiles:
    """A tiling of tgmm: every visit works through a whole tile of rows."""
    return WeightTiles(tiling[0], tiling[0], tiling[1], tiling[2])
