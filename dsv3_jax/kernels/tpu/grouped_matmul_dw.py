"""Pallas TPU kernel: for every group, the sum over its rows of outer products, which is the gradient of its weights.

An output tile stays in VMEM while the group's rows stream past. Blocks that belong to the group alone are multiplied whole; of
a shared block, only the part that holds rows of the group, with the other groups' rows masked.

Axes beyond the project's legend: X and Y the columns of the left array and of the right ones, A rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.grouped import visits_of
from dsv3_jax.kernels.tpu import memory
from dsv3_jax.kernels.tpu.memory import LANES, Machine, halved, next_power, round_up, shared, sublanes
from dsv3_jax.kernels.vma import shape_beside


class WeightTiles(NamedTuple):
    """Sizes of one call; reduced where there are fewer rows or columns, or where they do not fit into VMEM."""

    block: int
    """Rows of a step."""
    part: int
    """Rows of a product where a group has only some of a block's rows."""
    left: int
    """Rows of an output tile: columns of the left array."""
    right: int
    """Columns of an output tile: of the right arrays."""


def grouped_matmul_dw(
    left_RX: jax.Array,
    rights: Sequence[jax.Array],
    group_sizes_E: jax.Array,
    *,
    tiles: WeightTiles,
    machine: Machine,
    name: str,
    interpret: Any = False,
) -> list[jax.Array]:
    """`Products.weights`; args as there, and
    tiles: sizes; the result depends on them only by the order of sums.
    machine: the device.
    name: of the kernel in the compiled program.
    interpret: passed to `pl.pallas_call`.
    """
    (num_rows, X), Y, dtype = left_RX.shape, rights[0].shape[1], left_RX.dtype
    num_experts, packing = group_sizes_E.shape[0], sublanes(dtype)
    block, part, tile_x, tile_y = fit_weights(tiles, (num_rows, X, Y), num_experts, len(rights), dtype, machine)
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
            return zip(sum_refs, [_product(left_ref[...], ref[...]) for ref in right_refs], strict=True)

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
                    _rows(ref, start, part, jnp.maximum(begin, nominal), end) for ref in (left_ref, *right_refs)
                )
                for ref, right_AY in zip(sum_refs, rights_AY, strict=True):
                    ref[...] += _product(left_AX, right_AY)

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
        name=name,
    )(visits.group_V, visits.block_V, visits.start_G, left_RX, *rights)


def _product(left_AX: jax.Array, right_AY: jax.Array) -> jax.Array:
    """Return left^T right, float32 [X, Y]."""
    return jax.lax.dot_general(left_AX, right_AY, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _rows(ref: Any, start: jax.Array, number: int, begin: jax.Array, end: jax.Array) -> jax.Array:
    """Return `number` rows of a block from `start` on, with zeros for those outside of [begin, end), which may hold NaN."""
    values = ref[pl.ds(start, number), :]
    row = start + jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
    return jnp.where((begin <= row) & (row < end), values.astype(jnp.float32), 0).astype(values.dtype)


def fit_weights(
    tiles: WeightTiles, shape: tuple[int, int, int], num_experts: int, num_rights: int, dtype: Any, machine: Machine
) -> WeightTiles:
    """Return the sizes of a call: those of `tiles`, cut to the shape and halved until they fit into VMEM.

    Args:
      tiles: the sizes to start from.
      shape: rows R, and the widths X and Y of the left array and of the right ones.
      num_experts: groups; blocks are no larger than the mean group, rounded up to a power of two.
      num_rights: number of right arrays.
      dtype: of all of them.
      machine: the device.
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
