"""Pallas TPU kernel: products of sorted rows with the weights of their group, and a function of them (the epilogue).

A block of rows stays in VMEM, whole in the contracted dimension, while the weights of the groups that have rows in it stream
past, some columns at a time; so rows are read once from HBM, and weights once for each block that their group reaches.
Within a block, products are made of large tiles of a group's rows and small ones for its remainder. Groups may begin at any
row: tiles start at the packed register of a group's first row, not at a multiple of their size.

Axes beyond the project's legend: K the contracted dimension, A and X rows and columns of an output tile, I steps of the grid.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.grouped import Epilogue, split_refs, steps_by_block, visits_of
from dsv3_jax.kernels.tpu import memory
from dsv3_jax.kernels.tpu.memory import LANES, MIB, Machine, halved, next_power, round_up, shared, sublanes
from dsv3_jax.kernels.vma import shape_beside

LARGEST_PART = 4096
"""Contracted dimension of one product: the compiler copies that much of a tile's rows."""


class RowTiles(NamedTuple):
    """Sizes of one call; reduced where there are fewer rows or columns, or where they do not fit into VMEM."""

    block: int
    """Rows that stay in VMEM."""
    tile: int
    """Rows of a product."""
    remainder: int
    """Rows of a product past a group's last whole tile."""
    columns: int
    """Output columns of a step."""


def grouped_matmul(
    epilogue: Epilogue,
    rows: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    extras: Sequence[jax.Array],
    group_sizes_E: jax.Array,
    /,
    *,
    num_outputs: int,
    transposed: bool,
    tiles: RowTiles,
    machine: Machine,
    name: str,
    interpret: Any = False,
) -> list[jax.Array]:
    """`Products.rows`; args as there, and
      tiles: sizes; the result does not depend on them.
      machine: the device.
      name: of the kernel in the compiled program.
      interpret: passed to `pl.pallas_call`.

    Raises:
      ValueError: where even the smallest blocks do not fit into VMEM.
    """
    (num_rows, contracted), dtype, num_experts = rows[0].shape, rows[0].dtype, group_sizes_E.shape[0]
    num_columns = weights[0].shape[1 if transposed else 2]
    operands = len(rows), len(weights), len(extras) + num_outputs
    fitted = fit_rows(tiles, (num_rows, contracted, num_columns), num_experts, operands, dtype, machine, name)
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
    output = shape_beside(rows[0], (num_rows, num_columns), dtype)
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
        cost_estimate=memory.estimate(2 * num_rows * contracted * num_columns * len(weights), *rows, *weights, *extras, output),
        interpret=interpret,
        name=name,
    )(*steps, *rows, *weights, *extras)


def _product(row_ref: Any, at: Any, weight_ref: Any, transposed: bool) -> jax.Array:
    """Return rows times weights, float32 [A, X]."""
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
    """Write the rows of a tile from `start` on, except those before `begin`, which earlier groups have written.

    Rows past the group's end are written, too, and overwritten by the following groups, of which the last is the zeros.
    """
    for ref, value_AX in zip(refs, values, strict=True):
        at = pl.ds(start, value_AX.shape[0])
        row_AX = start + jax.lax.broadcasted_iota(jnp.int32, value_AX.shape, 0)
        ref[at, :] = jnp.where(row_AX < begin, ref[at, :].astype(jnp.float32), value_AX.astype(jnp.float32)).astype(ref.dtype)


def _over_tiles(body: Callable[[jax.Array, int], None], begin: jax.Array, end: jax.Array, tiles: RowTiles, dtype: Any) -> None:
    """Run body(start, number) over tiles that cover the rows [begin, end) of a block: large ones, then small ones for the rest.

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

    Args:
      tiles: the sizes to start from.
      shape: rows R, contracted dimension K and columns N.
      num_experts: groups; tiles are no larger than the mean group, rounded up to a power of two.
      operands: the numbers of arrays [R, K], of weights, and of arrays [R, N], outputs among them.
      dtype: of all of them.
      machine: the device.
      name: of the kernel, for the error.

    Raises:
      ValueError: where even the smallest blocks do not fit.
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
