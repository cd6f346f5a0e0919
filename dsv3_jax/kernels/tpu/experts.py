"""`expert_ffn` by Pallas kernels for TPUs: the six of grouped.py, and a table of their tile sizes by chip.

benchmarks/tune_expert_ffn.py finds the sizes, without a TPU. It does not know v5e, so v5e has the sizes of v6e.

Axes beyond the project's legend: K the contracted dimension, X and Y columns, A rows at a time, I steps of the grid.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.grouped import Epilogue, expert_ffn_by, split_refs, steps_by_block, visits_of
from dsv3_jax.kernels.tpu import memory
from dsv3_jax.kernels.tpu.memory import LANES, MIB, Machine, halved, next_power, round_up, shared, sublanes
from dsv3_jax.kernels.vma import shape_beside

LARGEST_PART = 4096
"""Largest contracted dimension of one product: the compiler copies that much of a tile's rows."""


class RowTiles(NamedTuple):
    """Sizes of a `grouped_matmul` kernel; `fit_rows` reduces them for fewer rows or columns, or to fit into VMEM."""

    block: int
    """Rows that stay in VMEM."""
    tile: int
    """Rows of a product."""
    remainder: int
    """Rows of a product past a group's last whole tile."""
    columns: int
    """Output columns of a step."""


class WeightTiles(NamedTuple):
    """Sizes of a `grouped_matmul_dw` kernel; `fit_weights` reduces them for fewer rows or columns, or to fit into VMEM."""

    block: int
    """Rows of a step."""
    part: int
    """Rows of a product where a group has only some of a block's rows."""
    left: int
    """Rows of an output tile: columns of the left array."""
    right: int
    """Columns of an output tile: of the right arrays."""


class Tiles(NamedTuple):
    """Tile sizes of the six kernels on one chip."""

    gate_up: RowTiles
    down: RowTiles
    dhidden: RowTiles
    dx: RowTiles
    dw_gate_up: WeightTiles
    dw_down: WeightTiles


_SMALL_VMEM = Tiles(
    gate_up=RowTiles(1024, 512, 128, 256),
    down=RowTiles(1024, 512, 128, 512),
    dhidden=RowTiles(1024, 512, 128, 256),
    dx=RowTiles(1024, 512, 128, 512),
    dw_gate_up=WeightTiles(512, 256, 1792, 1024),
    dw_down=WeightTiles(512, 256, 1024, 1792),
)
_LARGE_VMEM = Tiles(
    gate_up=RowTiles(2048, 512, 128, 512),
    down=RowTiles(2048, 512, 128, 1024),
    dhidden=RowTiles(2048, 512, 128, 512),
    dx=RowTiles(2048, 512, 128, 1024),
    dw_gate_up=WeightTiles(1024, 256, 3584, 1024),
    dw_down=WeightTiles(1024, 256, 2048, 1024),
)
TILES = {
    "v5e": _LARGE_VMEM,
    "v5p": _SMALL_VMEM,
    "v6e": _LARGE_VMEM,
    # A product of 256 columns cannot fill both matrix units there, and one of few rows hides little of the work around it.
    "7x": _SMALL_VMEM._replace(
        gate_up=RowTiles(512, 512, 128, 512),
        dw_gate_up=WeightTiles(1024, 256, 1792, 1024),
        dw_down=WeightTiles(1024, 256, 1024, 1792),
    ),
}
"""Tile sizes by the chip's name in Pallas."""


class KernelConfig(NamedTuple):
    """Implementation of `Products` for a TPU."""

    tiles: Tiles
    """Tile sizes. They change the order of the sums of a weight gradient, and no other result."""
    machine: Machine
    interpret: Any = False
    """Passed to `pl.pallas_call`; for tests."""

    def grouped_matmul(
        self,
        name: str,
        epilogue: Epilogue,
        rows: Sequence[jax.Array],
        weights: Sequence[jax.Array],
        extras: Sequence[jax.Array],
        group_sizes_E: jax.Array,
        /,
        *,
        num_outputs: int,
        transposed: bool,
    ) -> list[jax.Array]:
        """Compute `Products.grouped_matmul`; ValueError where even the smallest blocks do not fit into VMEM.

        A block of rows stays in VMEM, whole in the contracted dimension, while the weights of the groups that have rows in it
        stream past, some columns at a time; so rows are read once from HBM, and weights once for each block that their group
        reaches. Within a block, products are made of large tiles of a group's rows and small ones for its remainder. Groups
        may begin at any row: tiles start at the packed register of a group's first row, not at a multiple of their size.
        """
        tiles, machine, interpret = self
        (num_rows, contracted), dtype, num_experts = rows[0].shape, rows[0].dtype, group_sizes_E.shape[0]
        num_columns = weights[0].shape[1 if transposed else 2]
        operands = len(rows), len(weights), len(extras) + num_outputs
        shape = num_rows, contracted, num_columns
        fitted = fit_rows(getattr(tiles, name), shape, num_experts, operands, dtype, machine, f"expert_{name}")
        block, columns = fitted.block, fitted.columns
        num_tiles = -(-num_columns // columns)
        cores = machine.cores if num_tiles % machine.cores == 0 else 1

        # The rows past the last group are one more group, of zeros.
        sizes_G = jnp.append(group_sizes_E, num_rows - jnp.sum(group_sizes_E)).astype(jnp.int32)
        visits = visits_of(sizes_G, num_rows, block, visit_empty=False)
        steps, num_steps = steps_by_block(visits, -(-num_rows // block), num_tiles // cores)

        def kernel(group_I: Any, block_I: Any, tile_I: Any, start_G: Any, *refs: Any) -> None:
            del tile_I
            sizes = len(rows), len(weights), len(extras), num_outputs
            row_refs, weight_refs, extra_refs, output_refs, product_refs = split_refs(refs, *sizes)
            step = pl.program_id(1)
            group, first_row = group_I[step], block_I[step] * block
            begin = jnp.maximum(start_G[group] - first_row, 0)
            end = jnp.minimum(start_G[group + 1] - first_row, block)

            def compute_tile(start: jax.Array, num: int) -> None:
                at = pl.ds(start, num)
                # One product after the other: several at once would be more than the registers hold.
                factors = list(row_refs) * (len(weights) // len(rows))
                for row_ref, weight_ref, product_ref in zip(factors, weight_refs, product_refs, strict=True):
                    product_ref[:num, :] = _product(row_ref, at, weight_ref, transposed)
                products = [ref[:num, :] for ref in product_refs]
                if len(rows) > 1:
                    products = [functools.reduce(jnp.add, products)]
                values = epilogue(products, [ref[at, :] for ref in extra_refs])
                _store(output_refs, values, start, begin)

            def zero_tile(start: jax.Array, num: int) -> None:
                zero_AX = jnp.zeros((num, columns), jnp.float32)
                _store(output_refs, [zero_AX] * num_outputs, start, begin)

            @pl.when(group < num_experts)
            def _() -> None:
                _over_tiles(compute_tile, begin, end, fitted, dtype)

            @pl.when(group == num_experts)
            def _() -> None:
                _over_tiles(zero_tile, begin, end, fitted._replace(tile=fitted.remainder), dtype)

        # Index maps, of the grid's indices (core, step) and the lists of steps.
        def at_rows(core: Any, step: Any, group_I: Any, block_I: Any, tile_I: Any, start_G: Any) -> tuple:
            return block_I[step], 0

        def at_outputs(core: Any, step: Any, group_I: Any, block_I: Any, tile_I: Any, start_G: Any) -> tuple:
            return block_I[step], core * (num_tiles // cores) + tile_I[step]

        def at_weights(core: Any, step: Any, group_I: Any, block_I: Any, tile_I: Any, start_G: Any) -> tuple:
            # The last group has no weights: the previous ones stay.
            group, column = jnp.minimum(group_I[step], num_experts - 1), core * (num_tiles // cores) + tile_I[step]
            return (group, column, 0) if transposed else (group, 0, column)

        row_spec, output_spec = pl.BlockSpec((block, contracted), at_rows), pl.BlockSpec((block, columns), at_outputs)
        weight_spec = pl.BlockSpec((None, columns, contracted) if transposed else (None, contracted, columns), at_weights)
        output, flops = shape_beside(rows[0], shape[::2], dtype), 2 * math.prod(shape) * len(weights)
        return pl.pallas_call(
            kernel,
            out_shape=[output] * num_outputs,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(steps),
                grid=(cores, num_steps),
                in_specs=[row_spec] * len(rows) + [weight_spec] * len(weights) + [output_spec] * len(extras),
                out_specs=[output_spec] * num_outputs,
                scratch_shapes=[pltpu.VMEM((fitted.tile, columns), jnp.float32)] * len(weights),
            ),
            compiler_params=memory.compiler_params("parallel", "arbitrary", machine=machine),
            cost_estimate=memory.estimate(flops, *rows, *weights, *extras, output),
            interpret=interpret,
            name=f"expert_{name}",
        )(*steps, *rows, *weights, *extras)

    def grouped_matmul_dw(
        self, name: str, left_RX: jax.Array, rights: Sequence[jax.Array], group_sizes_E: jax.Array, /
    ) -> list[jax.Array]:
        """Compute `Products.grouped_matmul_dw`.

        An output tile stays in VMEM while the group's rows stream past. Blocks that belong to the group alone are multiplied
        whole; of a shared block, only the part that holds rows of the group, with the other groups' rows masked.
        """
        tiles, machine, interpret = self
        (num_rows, X), Y, dtype = left_RX.shape, rights[0].shape[1], left_RX.dtype
        num_experts, packing = group_sizes_E.shape[0], sublanes(dtype)
        fitted = fit_weights(getattr(tiles, name), (num_rows, X, Y), num_experts, len(rights), dtype, machine)
        block, part, tile_x, tile_y = fitted
        visits = visits_of(group_sizes_E, num_rows, block, visit_empty=True)

        def kernel(group_V: Any, block_V: Any, start_G: Any, left_ref: Any, *refs: Any) -> None:
            right_refs, output_refs, sum_refs = (refs[i * len(rights) : (i + 1) * len(rights)] for i in range(3))
            visit, last = pl.program_id(2), pl.num_programs(2) - 1
            group, first_row = group_V[visit], block_V[visit] * block
            begin = jnp.maximum(start_G[group] - first_row, 0)
            end = jnp.minimum(start_G[group + 1] - first_row, block)

            first = (visit == 0) | (group_V[jnp.maximum(visit - 1, 0)] != group)
            whole = (begin == 0) & (end == block)

            def products() -> Any:
                return zip(sum_refs, [_outer_products(left_ref[...], ref[...]) for ref in right_refs], strict=True)

            @pl.when(whole & first)
            def _() -> None:
                for ref, product in products():
                    ref[...] = product

            @pl.when(whole & jnp.logical_not(first))
            def _() -> None:
                for ref, product in products():
                    ref[...] += product

            @pl.when(jnp.logical_not(whole) & first)
            def _() -> None:
                for ref in sum_refs:
                    ref[...] = jnp.zeros_like(ref)

            @pl.when(jnp.logical_not(whole))
            def _() -> None:
                packed_begin = begin // packing * packing

                def add_part(i: jax.Array, carry: None) -> None:
                    # The last part may have to be moved back within the block; no row may be added twice.
                    nominal = packed_begin + i * part
                    start = pl.multiple_of(jnp.minimum(nominal, block - part), packing)
                    left_AX, *rights_AY = (
                        _own_rows(ref, start, part, jnp.maximum(begin, nominal), end) for ref in (left_ref, *right_refs)
                    )
                    for ref, right_AY in zip(sum_refs, rights_AY, strict=True):
                        ref[...] += _outer_products(left_AX, right_AY)

                jax.lax.fori_loop(0, jnp.where(begin < end, (end - packed_begin + part - 1) // part, 0), add_part, None)

            @pl.when((visit == last) | (group_V[jnp.minimum(visit + 1, last)] != group))
            def _() -> None:
                for output, total in zip(output_refs, sum_refs, strict=True):
                    output[...] = total[...].astype(output.dtype)

        # Index maps, of the grid's indices (i, j, visit) and the lists of visits.
        def at_left(i: Any, j: Any, visit: Any, group_V: Any, block_V: Any, start_G: Any) -> tuple:
            return block_V[visit], i

        def at_right(i: Any, j: Any, visit: Any, group_V: Any, block_V: Any, start_G: Any) -> tuple:
            return block_V[visit], j

        def at_output(i: Any, j: Any, visit: Any, group_V: Any, block_V: Any, start_G: Any) -> tuple:
            return group_V[visit], i, j

        output = shape_beside(left_RX, (num_experts, X, Y), dtype)
        return pl.pallas_call(
            kernel,
            out_shape=[output] * len(rights),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=(-(-X // tile_x), -(-Y // tile_y), visits.number),
                in_specs=[pl.BlockSpec((block, tile_x), at_left), *[pl.BlockSpec((block, tile_y), at_right)] * len(rights)],
                out_specs=[pl.BlockSpec((None, tile_x, tile_y), at_output)] * len(rights),
                scratch_shapes=[pltpu.VMEM((tile_x, tile_y), jnp.float32)] * len(rights),
            ),
            compiler_params=memory.compiler_params("parallel", "arbitrary", "arbitrary", machine=machine),
            cost_estimate=memory.estimate(2 * num_rows * X * Y * len(rights), left_RX, *rights, *[output] * len(rights)),
            interpret=interpret,
            name=f"expert_{name}",
        )(visits.group_V, visits.block_V, visits.start_G, left_RX, *rights)


def _product(row_ref: Any, at: Any, weight_ref: Any, transposed: bool) -> jax.Array:
    """Return rows `at` of row_ref times the weights, or their transpose, summed over parts of K: float32 [A, X]."""
    contracted = row_ref.shape[1]
    part = round_up(-(-contracted // -(-contracted // LARGEST_PART)), LANES)
    contract = (((1,), (1 if transposed else 0,)), ((), ()))

    def one_part(k: int) -> jax.Array:
        some = slice(k, min(k + part, contracted))
        weight = weight_ref[:, some] if transposed else weight_ref[some, :]
        return jax.lax.dot_general(row_ref[at, some], weight, contract, preferred_element_type=jnp.float32)

    total_AX = one_part(0)
    for k in range(part, contracted, part):
        total_AX += one_part(k)
    return total_AX


def _store(refs: Sequence[Any], values: Sequence[jax.Array], start: jax.Array, begin: jax.Array) -> None:
    """Write a tile's values to the rows of refs from `start` on, except those before `begin`, written by earlier groups.

    Rows past the group's end are written, too, and overwritten by the following groups, of which the last is the zeros.
    """
    for ref, value_AX in zip(refs, values, strict=True):
        at = pl.ds(start, value_AX.shape[0])
        row_AX = start + jax.lax.broadcasted_iota(jnp.int32, value_AX.shape, 0)
        ref[at, :] = jnp.where(row_AX < begin, ref[at, :].astype(jnp.float32), value_AX.astype(jnp.float32)).astype(ref.dtype)


def _over_tiles(body: Callable[[jax.Array, int], None], begin: jax.Array, end: jax.Array, tiles: RowTiles, dtype: Any) -> None:
    """Call body(start, number of rows) for tiles that cover rows [begin, end) of a block: large ones, then small ones.

    A tile may begin before `begin` and end after `end`. A last tile that would end past the block is moved back, and some rows
    are covered twice.
    """
    packing = sublanes(dtype)
    first = begin // packing * packing
    whole = (end - first) // tiles.tile
    rest = first + whole * tiles.tile

    def run(start: jax.Array, count: jax.Array, num: int) -> None:
        def step(i: jax.Array, carry: None) -> None:
            body(pl.multiple_of(jnp.minimum(start + i * num, tiles.block - num), packing), num)

        jax.lax.fori_loop(0, count, step, None)

    run(first, whole, tiles.tile)
    run(rest, (end - rest + tiles.remainder - 1) // tiles.remainder, tiles.remainder)


def fit_rows(
    tiles: RowTiles,
    shape: tuple[int, int, int],
    num_experts: int,
    operands: tuple[int, int, int],
    dtype: Any,
    machine: Machine,
    name: str,
) -> RowTiles:
    """Return the sizes of a call: those of `tiles`, cut to the shape and halved until they fit into VMEM.

    The shape is rows R, contracted dimension K and columns N; the operands are the numbers of arrays [R, K], of weights, and of
    arrays [R, N], outputs among them. Tiles are no larger than the mean group, rounded up to a power of two.

    Raises:
      ValueError: where even the smallest blocks do not fit; with the kernel's name.
    """
    (num_rows, contracted, num_columns), (num_inner, num_weights, num_outer) = shape, operands
    packing, width = sublanes(dtype), jnp.dtype(dtype).itemsize
    block = min(tiles.block, round_up(num_rows, packing))
    columns = min(tiles.columns, num_columns)

    def tile_of(block: int) -> int:
        return min(tiles.tile, block, max(tiles.remainder, next_power(-(-num_rows // num_experts))))

    def vmem_bytes(block: int, columns: int) -> int:
        K, X, tile = round_up(contracted, LANES), round_up(columns, LANES), tile_of(block)
        blocks = num_inner * block * K + num_weights * K * X + num_outer * block * X
        return 2 * width * blocks + 4 * tile * X * (num_weights + num_outer) + width * tile * min(K, LARGEST_PART)

    columns = shared(columns, num_columns, machine.cores)
    while vmem_bytes(block, columns) > machine.vmem_bytes - memory.RESERVED_BYTES:
        if block > tiles.remainder:
            block = round_up(block // 2, packing)
        elif columns > LANES:
            columns = shared(halved(columns), num_columns, machine.cores)
        else:
            raise ValueError(
                f"{name}: rows of {contracted} {jnp.dtype(dtype).name} values do not fit into "
                f"{machine.vmem_bytes / MIB:.0f} MiB of VMEM even in the smallest blocks; choose model.expert_backend tiles"
            )
    return RowTiles(block, tile_of(block), min(tiles.remainder, block), columns)


def _outer_products(left_AX: jax.Array, right_AY: jax.Array) -> jax.Array:
    """Return left^T right, float32 [X, Y]."""
    return jax.lax.dot_general(left_AX, right_AY, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _own_rows(ref: Any, start: jax.Array, number: int, begin: jax.Array, end: jax.Array) -> jax.Array:
    """Return `number` rows of a block from `start` on, with zeros for those outside of [begin, end), which may hold NaN."""
    values = ref[pl.ds(start, number), :]
    row = start + jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
    return jnp.where((begin <= row) & (row < end), values.astype(jnp.float32), 0).astype(values.dtype)


def fit_weights(
    tiles: WeightTiles, shape: tuple[int, int, int], num_experts: int, num_rights: int, dtype: Any, machine: Machine
) -> WeightTiles:
    """Return the sizes of a call: those of `tiles`, cut to the shape and halved until they fit into VMEM.

    The shape is rows R, and the widths X and Y of the left array and of the `num_rights` right ones. Blocks are no larger than
    the mean group, rounded up to a power of two.
    """
    num_rows, X, Y = shape
    width = jnp.dtype(dtype).itemsize
    block = min(tiles.block, round_up(num_rows, sublanes(dtype)), max(tiles.part, next_power(-(-num_rows // num_experts))))
    left, right = shared(min(tiles.left, X), X, machine.cores), min(tiles.right, Y)

    def vmem_bytes() -> int:
        x, y = round_up(left, LANES), round_up(right, LANES)
        # Two buffers of every block; the sums and one product; the transposed left block.
        blocks = block * (x + num_rights * y) + num_rights * x * y
        return 2 * width * blocks + 4 * (num_rights + 1) * x * y + width * block * x

    while vmem_bytes() > machine.vmem_bytes - memory.RESERVED_BYTES:
        # The sums are the largest part, so tiles shrink before blocks of rows do.
        if left >= right and left > LANES:
            left = shared(halved(left), X, machine.cores)
        elif right > LANES:
            right = halved(right)
        else:
            block = round_up(block // 2, sublanes(dtype))
    return WeightTiles(block, min(tiles.part, block), left, right)


def expert_ffn_pallas_tpu(
    x_RD: jax.Array, w_gate_EDF: jax.Array, w_up_EDF: jax.Array, w_down_EFD: jax.Array, group_sizes_E: jax.Array
) -> jax.Array:
    """Compute `expert_ffn`, y [R, D], on the TPU that the program is lowered for. ValueError if not float32 or bfloat16."""
    memory.check_dtype("the expert backend 'pallas_tpu'", x_RD.dtype, "model.expert_backend tiles")
    return expert_ffn_by(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, this_machine())


def this_machine() -> KernelConfig:
    """Return the `KernelConfig` for the TPUs of the current mesh, or for JAX's default device.

    Raises:
      NotImplementedError: for a TPU without an entry in TILES.
      ValueError: where there is no TPU.
    """
    try:
        info = pltpu.get_tpu_info()
    except ValueError as error:
        raise ValueError("the expert backend 'pallas_tpu' runs on TPUs only; use model.expert_backend auto or tiles") from error
    chip = str(info.chip_version)
    if chip not in TILES:
        raise NotImplementedError(
            f"'pallas_tpu' has no tile sizes for TPU {chip}, only for {', '.join(TILES)}; use model.expert_backend tiles"
        )
    return KernelConfig(TILES[chip], Machine(info.num_cores, info.vmem_capacity_bytes))
