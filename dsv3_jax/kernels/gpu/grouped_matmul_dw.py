"""Pallas kernel for Hopper GPUs: for every group, the sum over its rows of outer products, the gradient of its weights.

The rows are the contracted dimension, and a group may begin at any row. Steps over them begin at the last multiple of ALIGN_M
rows up to its start; the first and the last may hold rows of other groups, or of none, which are zeroed in shared memory.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.kernels.gpu import hopper
from dsv3_jax.kernels.gpu.hopper import ALIGN_M, BLOCK_K, BLOCK_M, COLUMNS, CONSUMERS, STAGES, WG_M, Pipeline, swizzled

GROUP_M = 16
"""Tiles along the left array's columns that share the right arrays' while these are in the L2 cache."""


def grouped_matmul_dw(
    left_RX: jax.Array,
    rights: Sequence[jax.Array],
    group_sizes_E: jax.Array,
    *,
    num_blocks: int,
    name: str,
    interpret: Any = None,
) -> list[jax.Array]:
    """`Products.weights` in bfloat16, for R that is a multiple of 8, X and Y of 64 and at least 128.

    Args as there and of `grouped_matmul`.
    """
    (_, X), Y, dtype, num_experts = left_RX.shape, rights[0].shape[1], left_RX.dtype, group_sizes_E.shape[0]
    columns = min(COLUMNS // len(rights), Y)
    num_left, num_right, num_strips = -(-X // BLOCK_M), -(-Y // columns), columns // BLOCK_K
    num_tiles = num_left * num_right
    start_E = jnp.cumsum(group_sizes_E, dtype=jnp.int32) - group_sizes_E

    def tile_at(index: Any) -> tuple[Any, Any, Any]:
        """Return the group, and the tile's row and column in the grid of its output."""
        group, within = jax.lax.div(index, jnp.int32(num_tiles)), jax.lax.rem(index, jnp.int32(num_tiles))
        band, within = (f(within, jnp.int32(GROUP_M * num_right)) for f in (jax.lax.div, jax.lax.rem))
        of_band = jnp.minimum(num_left - band * GROUP_M, GROUP_M)
        return group, band * GROUP_M + jax.lax.rem(within, of_band), jax.lax.div(within, of_band)

    def steps_of(start: Any, size: Any) -> tuple[Any, Any]:
        """Return how many rows the first step begins before the group, and the number of steps."""
        before = jax.lax.rem(start, jnp.int32(ALIGN_M))
        return before, jnp.where(size > 0, jax.lax.div(before + size + BLOCK_K - 1, jnp.int32(BLOCK_K)), 0)

    def fetch(pipe: Pipeline, buffers: Sequence[Any], start_ref: Any, size_ref: Any, left_ref: Any, *refs: Any) -> None:
        left_smem, right_smems, *_ = buffers

        def fetch_tile(index: Any, first: Any) -> Any:
            group, left, right = tile_at(index)
            left, right = hopper.clamped_tile(left, BLOCK_M, X)[0], hopper.clamped_tile(right, columns, Y)[0]
            before, steps = steps_of(start_ref[group], size_ref[group])
            start = pl.multiple_of(start_ref[group] - before, ALIGN_M)

            @pl.loop(0, steps)
            def _(k: Any) -> None:
                slot, part = pipe.producer_acquire(first + k), pl.ds(start + k * BLOCK_K, BLOCK_K)
                plgpu.copy_gmem_to_smem(left_ref.at[part, pl.ds(left, BLOCK_M)], left_smem.at[slot], pipe.loaded.at[slot])
                for smem, ref in zip(right_smems, refs[: len(rights)], strict=True):
                    plgpu.copy_gmem_to_smem(ref.at[part, pl.ds(right, columns)], smem.at[slot], pipe.loaded.at[slot])

            return first + steps

        pipe.drain(hopper.for_each_tile(num_experts * num_tiles, num_blocks, fetch_tile))

    def work(pipe: Pipeline, buffers: Sequence[Any], start_ref: Any, size_ref: Any, _left_ref: Any, *refs: Any) -> None:
        left_smem, right_smems, staging, zeroed = buffers
        warpgroup, output_refs = jax.lax.axis_index("warpgroup"), refs[len(rights) :]
        mine = pl.ds(warpgroup * WG_M, WG_M)

        def zero(slot: Any, begin: Any, end: Any) -> None:
            """Zero rows outside of [begin, end): each warpgroup in the left columns that it reads, and in some right ones."""
            row = hopper.iota((BLOCK_K, BLOCK_K), 0, interpret)
            own = (begin <= row) & (row < end)

            def zero_in(part: Any) -> None:
                part[...] = jnp.where(own, part[...].astype(jnp.float32), 0.0).astype(dtype)

            def zero_strip(i: int) -> None:
                for smem in right_smems:
                    zero_in(smem.at[slot, :, pl.ds(i * BLOCK_K, BLOCK_K)])

            zero_in(left_smem.at[slot, :, mine])
            for i in range(num_strips):
                pl.when(warpgroup == i % CONSUMERS)(functools.partial(zero_strip, i))
            plgpu.commit_smem()
            plgpu.barrier_arrive(zeroed)
            plgpu.barrier_wait(zeroed)

        def work_on_tile(index: Any, first: Any) -> Any:
            group, left, right = tile_at(index)
            left, done_rows = hopper.clamped_tile(left, BLOCK_M, X)
            right, done_columns = hopper.clamped_tile(right, columns, Y)
            before, steps = steps_of(start_ref[group], size_ref[group])

            def products_of(slot: Any, k: Any, accumulators: Sequence[Any]) -> None:
                begin, end = before - k * BLOCK_K, before + size_ref[group] - k * BLOCK_K
                pl.when((begin > 0) | (end < BLOCK_K))(functools.partial(zero, slot, begin, end))
                for accumulator, smem in zip(accumulators, right_smems, strict=True):
                    plgpu.wgmma(accumulator, hopper.transposed(left_smem.at[slot, :, mine]), smem.at[slot])

            products = hopper.multiply(pipe, first, steps, columns, len(rights), products_of)
            rows = pl.ds(left + warpgroup * WG_M, WG_M)

            def store_strip(i: int) -> None:
                for product, ref in zip(products, output_refs, strict=True):
                    at = ref.at[group, rows, pl.ds(right + i * BLOCK_K, BLOCK_K)]
                    hopper.store(hopper.strip(product, i).astype(dtype), staging.at[warpgroup], at)

            for i in range(num_strips):
                new = (warpgroup * WG_M >= done_rows) & (i * BLOCK_K >= done_columns)
                pl.when(new)(functools.partial(store_strip, i))
            return first + steps

        hopper.for_each_tile(num_experts * num_tiles, num_blocks, work_on_tile)

    scratch = [
        swizzled(STAGES, BLOCK_K, BLOCK_M),
        [swizzled(STAGES, BLOCK_K, columns)] * len(rights),
        swizzled(CONSUMERS, WG_M, BLOCK_K),
        plgpu.Barrier(num_arrivals=CONSUMERS),
    ]
    return hopper.launch(
        fetch,
        work,
        [start_E, group_sizes_E, left_RX, *rights],
        outputs=[jax.ShapeDtypeStruct((num_experts, X, Y), dtype)] * len(rights),
        scratch=scratch,
        loads=1 + len(rights),
        num_blocks=num_blocks,
        name=name,
        interpret=interpret,
    )
