"""A Pallas kernel for Hopper GPUs: products of sorted rows with the weights of their group, and what is computed of them.

Tiles of rows begin at the last multiple of ALIGN_M rows up to where their group does, so that its first and last tile reach
into other groups. They are computed whole, whatever lies there, and of their results the group's own rows are stored, in pieces
of powers of two.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.kernels.gpu.hopper import (
    ALIGN_M,
    BLOCK_K,
    BLOCK_M,
    COLUMNS,
    FETCHING,
    STAGES,
    SWIZZLED,
    WG_M,
    Pipeline,
    launch,
    multiply,
    over_tiles,
    store,
    strip,
    turned,
    whole_tile,
    write,
)
from dsv3_jax.kernels.grouped import Compute, RowSteps, steps_by_band

GROUP_M = 16
"""Tiles of rows that share weights while these are in the L2 cache."""


def grouped_matmul(
    compute: Compute,
    rows: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    beside: Sequence[jax.Array],
    group_sizes_E: jax.Array,
    *,
    num_outputs: int,
    transposed: bool,
    num_blocks: int,
    name: str,
    interpret: Any = None,
) -> list[jax.Array]:
    """`Products.rows` of `grouped_ffn.py` in bfloat16, for R that is a multiple of 8, K and N of 64, N at least 128.

    There may be two arrays `beside`, if the weights are transposed, or none. Arguments beyond its own are

    Args:
      num_sms: multiprocessors of the device.
      name: of the kernel in the compiled program.
      interpret: None, or parameters of Pallas' GPU interpreter.
    """
    (num_rows, contracted), dtype, num_experts = rows[0].shape, rows[0].dtype, group_sizes_E.shape[0]
    num_columns, num_products = weights[0].shape[1 if transposed else 2], len(weights) // len(rows)
    columns = min(COLUMNS // num_products, num_columns)
    num_tiles, num_k = -(-num_columns // columns), contracted // BLOCK_K
    num_strips = columns // BLOCK_K

    # The rows past the last group are one more group, of zeros.
    sizes_G = jnp.append(group_sizes_E, num_rows - jnp.sum(group_sizes_E)).astype(jnp.int32)
    steps, number = steps_by_band(sizes_G, num_rows, BLOCK_M, num_tiles, GROUP_M, ALIGN_M)

    def split(refs: Sequence[Any]) -> tuple[RowSteps, Any, list[Any]]:
        """The lists of steps, their number, and row, weight, beside and output arrays."""
        parts, rest = [], list(refs[len(steps) + 1 :])
        for size in (len(rows), len(weights), len(beside), num_outputs):
            parts.append(rest[:size])
            rest = rest[size:]
        return RowSteps(*refs[: len(steps)]), refs[len(steps)][0], parts

    def place(lists: RowSteps, index: Any) -> tuple[Any, Any, Any]:
        """Group, first row and first column of a tile."""
        column, _ = whole_tile(lists.tile_I[index], columns, num_columns)
        return lists.group_I[index], pl.multiple_of(lists.row_I[index], ALIGN_M), column

    def num_k_steps(group: Any) -> Any:
        return jnp.where(group < num_experts, len(rows) * num_k, 0)

    def num_steps(group: Any) -> Any:
        return num_k_steps(group) + (num_strips if beside else 0)

    def fetch(pipe: Pipeline, buffers: Sequence[Any], *refs: Any) -> None:
        (row_smem, weight_smems, *_), (lists, number, arrays) = buffers, split(refs)
        row_refs, weight_refs, beside_refs, _ = arrays

        def fetch_tile(index: Any, first: Any) -> Any:
            group, row, column = place(lists, index)
            tile_rows = pl.ds(row, BLOCK_M)

            def fetch_products(first: Any, row_ref: Any, factors: Sequence[Any]) -> None:
                @pl.loop(0, num_k)
                def _(k: Any) -> None:
                    slot, part = pipe.producer_acquire(first + k), pl.ds(k * BLOCK_K, BLOCK_K)
                    plgpu.copy_gmem_to_smem(row_ref.at[tile_rows, part], row_smem.at[slot], pipe.loaded.at[slot])
                    for smem, ref in zip(weight_smems, factors, strict=True):
                        at = (group, pl.ds(column, columns), part) if transposed else (group, part, pl.ds(column, columns))
                        plgpu.copy_gmem_to_smem(ref.at[at], smem.at[slot], pipe.loaded.at[slot])

            def fetch_beside(first: Any) -> None:
                places = row_smem, weight_smems[0].at[:, pl.ds(0, BLOCK_M)]

                @pl.loop(0, num_strips)
                def _(i: Any) -> None:
                    slot = pipe.producer_acquire(first + i)
                    for smem, ref in zip(places, beside_refs, strict=True):
                        source = ref.at[tile_rows, pl.ds(column + i * BLOCK_K, BLOCK_K)]
                        plgpu.copy_gmem_to_smem(source, smem.at[slot], pipe.loaded.at[slot])

            @pl.when(group < num_experts)
            def _fetch() -> None:
                for i, row_ref in enumerate(row_refs):
                    fetch_products(first + i * num_k, row_ref, weight_refs[i * num_products : (i + 1) * num_products])

            if beside:
                fetch_beside(first + num_k_steps(group))
            return first + num_steps(group)

        pipe.drain(over_tiles(number, num_blocks, fetch_tile))

    def work(pipe: Pipeline, buffers: Sequence[Any], *refs: Any) -> None:
        (row_smem, weight_smems, staging, plain_staging), (lists, number, arrays) = buffers, split(refs)
        warpgroup, output_refs = jax.lax.axis_index("warpgroup"), arrays[3]
        mine = pl.ds(warpgroup * WG_M, WG_M)

        def products_of(slot: Any, k: Any, accumulators: Sequence[Any]) -> None:
            for accumulator, smem in zip(accumulators, weight_smems, strict=True):
                factor = turned(smem.at[slot]) if transposed else smem.at[slot]
                plgpu.wgmma(accumulator, row_smem.at[slot, mine], factor)

        def beside_of(step: Any, group: Any) -> list[jax.Array]:
            slot = pipe.consumer_wait(step)
            values = [row_smem[slot, mine], weight_smems[0][slot, mine]]
            plgpu.commit_smem()  # These reads are over before a copy may write there.
            pipe.consumer_release(step)
            # What lies past the last group is nothing to compute with.
            return [jnp.where(group < num_experts, value.astype(jnp.float32), 0.0) for value in values]

        def work_on_tile(index: Any, first: Any) -> Any:
            group, row, column = place(lists, index)
            _, done = whole_tile(lists.tile_I[index], columns, num_columns)
            begin, end = (jnp.clip(rows_I[index] - warpgroup * WG_M, 0, WG_M) for rows_I in (lists.begin_I, lists.end_I))
            k_steps = num_k_steps(group)
            products = multiply(pipe, first, k_steps, columns, num_products, products_of)
            for i in range(num_strips):
                others = beside_of(first + k_steps + i, group) if beside else []
                outputs = compute([strip(product, i) for product in products], others)
                new = begin, jnp.where(i * BLOCK_K >= done, end, 0)
                for value, ref in zip(outputs, output_refs, strict=True):
                    at = ref.at[pl.ds(row + warpgroup * WG_M, WG_M), pl.ds(column + i * BLOCK_K, BLOCK_K)]
                    _store_own(value.astype(dtype), *new, staging.at[warpgroup], plain_staging.at[warpgroup], at)
            return first + num_steps(group)

        over_tiles(number, num_blocks, work_on_tile)

    weight_block = (columns, BLOCK_K) if transposed else (BLOCK_K, columns)
    scratch = [
        plgpu.SMEM((STAGES, BLOCK_M, BLOCK_K), dtype, transforms=SWIZZLED),
        [plgpu.SMEM((STAGES, *weight_block), dtype, transforms=SWIZZLED)] * num_products,
        plgpu.SMEM((FETCHING, WG_M, BLOCK_K), dtype, transforms=SWIZZLED),
        plgpu.SMEM((FETCHING, WG_M, BLOCK_K), dtype),
    ]
    return launch(
        fetch,
        work,
        [*steps, number[None], *rows, *weights, *beside],
        outputs=[jax.ShapeDtypeStruct((num_rows, num_columns), dtype)] * num_outputs,
        scratch=scratch,
        loads=1 + num_products,
        num_blocks=num_blocks,
        name=name,
        interpret=interpret,
    )


def _store_own(values: jax.Array, begin: Any, end: Any, staging: Any, plain_staging: Any, place: Any) -> None:
    """Begins to write the rows [begin, end) of WG_M. Pieces of a swizzled tile cannot be copied, and so are staged plain."""
    own = end - begin

    @pl.when(own == WG_M)
    def _() -> None:
        store(values, staging, place)

    def store_piece(begin: Any, size: int) -> None:
        piece = pl.ds(begin, size)
        plgpu.copy_smem_to_gmem(plain_staging.at[piece], place.at[piece])

    @pl.when((own > 0) & (own < WG_M))
    def _() -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # What was staged before.
        write(plain_staging, values)
        plgpu.commit_smem()
        at = begin
        for size in (32, 16, 8, 4, 2, 1):
            pl.when(own & size != 0)(functools.partial(store_piece, at, size))
            at = at + (own & size)
