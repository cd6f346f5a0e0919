"""`expert_ffn` by Pallas kernels for Hopper GPUs: the six of grouped.py.

They take bfloat16 only: of float32 the matrix units would read ten bits of the fraction, and a float32 model asks for more.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.kernels.gpu import hopper
from dsv3_jax.kernels.gpu.hopper import ALIGN_M, BLOCK_K, BLOCK_M, COLUMNS, CONSUMERS, STAGES, WG_M, Pipeline, swizzled
from dsv3_jax.kernels.grouped import Epilogue, RowSteps, expert_ffn_by, split_refs, steps_by_band

GROUP_M = 16
"""Tiles of rows, or of the left array's columns, that share the other operand while it is in the L2 cache."""
WIDTH = 64
"""D and F are padded to a multiple of it, the columns of a swizzle, and to at least twice it, one half a warpgroup."""


class Hopper(NamedTuple):
    """Implementation of `Products` for a GPU in bfloat16: R a multiple of 8, D and F multiples of 64, at least 128."""

    num_blocks: int
    """Multiprocessors of the device."""
    interpret: Any = None
    """None, or parameters of Pallas' GPU interpreter."""

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
        """Compute `Products.grouped_matmul`. `extras` are empty, or two with transposed weights.

        Tiles of rows begin at the last multiple of ALIGN_M rows up to their group's start, so that its first and last tile
        reach into other groups. They are computed whole, and only the group's own rows of the results are stored, in pieces of
        powers of two.
        """
        num_blocks, interpret = self
        (num_rows, contracted), dtype, num_experts = rows[0].shape, rows[0].dtype, group_sizes_E.shape[0]
        num_columns, num_products = weights[0].shape[1 if transposed else 2], len(weights) // len(rows)
        columns = min(COLUMNS // num_products, num_columns)
        num_tiles, num_k = -(-num_columns // columns), contracted // BLOCK_K
        num_strips = columns // BLOCK_K

        # The rows past the last group are one more group, of zeros.
        sizes_G = jnp.append(group_sizes_E, num_rows - jnp.sum(group_sizes_E)).astype(jnp.int32)
        steps, number = steps_by_band(sizes_G, num_rows, BLOCK_M, num_tiles, GROUP_M, ALIGN_M)

        def unpack(refs: Sequence[Any]) -> tuple[RowSteps, Any, list[Any]]:
            """Split a kernel's references: return lists of steps, their number, and [rows, weights, extras, outputs]."""
            sizes = len(steps), 1, len(rows), len(weights), len(extras), num_outputs
            lists, (number_ref,), *arrays, _ = split_refs(refs, *sizes)
            return RowSteps(*lists), number_ref[0], arrays

        def tile_at(lists: RowSteps, index: Any) -> tuple[Any, Any, Any]:
            """Return group, first row and first column of the tile of step `index`."""
            column, _ = hopper.clamped_tile(lists.tile_I[index], columns, num_columns)
            return lists.group_I[index], pl.multiple_of(lists.row_I[index], ALIGN_M), column

        def num_k_steps(group: Any) -> Any:
            return jnp.where(group < num_experts, len(rows) * num_k, 0)

        def num_steps(group: Any) -> Any:
            return num_k_steps(group) + (num_strips if extras else 0)

        def fetch(pipe: Pipeline, buffers: Sequence[Any], *refs: Any) -> None:
            (row_smem, weight_smems, *_), (lists, number, arrays) = buffers, unpack(refs)
            row_refs, weight_refs, extra_refs, _ = arrays

            def fetch_tile(index: Any, first: Any) -> Any:
                group, row, column = tile_at(lists, index)
                tile_rows = pl.ds(row, BLOCK_M)

                def fetch_products(first: Any, row_ref: Any, factors: Sequence[Any]) -> None:
                    @pl.loop(0, num_k)
                    def _(k: Any) -> None:
                        slot, part = pipe.producer_acquire(first + k), pl.ds(k * BLOCK_K, BLOCK_K)
                        plgpu.copy_gmem_to_smem(row_ref.at[tile_rows, part], row_smem.at[slot], pipe.loaded.at[slot])
                        for smem, ref in zip(weight_smems, factors, strict=True):
                            at = (group, pl.ds(column, columns), part) if transposed else (group, part, pl.ds(column, columns))
                            plgpu.copy_gmem_to_smem(ref.at[at], smem.at[slot], pipe.loaded.at[slot])

                def fetch_extras(first: Any) -> None:
                    smems = row_smem, weight_smems[0].at[:, pl.ds(0, BLOCK_M)]

                    @pl.loop(0, num_strips)
                    def _(i: Any) -> None:
                        slot = pipe.producer_acquire(first + i)
                        for smem, ref in zip(smems, extra_refs, strict=True):
                            source = ref.at[tile_rows, pl.ds(column + i * BLOCK_K, BLOCK_K)]
                            plgpu.copy_gmem_to_smem(source, smem.at[slot], pipe.loaded.at[slot])

                @pl.when(group < num_experts)
                def _fetch() -> None:
                    for i, row_ref in enumerate(row_refs):
                        fetch_products(first + i * num_k, row_ref, weight_refs[i * num_products : (i + 1) * num_products])

                if extras:
                    fetch_extras(first + num_k_steps(group))
                return first + num_steps(group)

            pipe.drain(hopper.for_each_tile(number, num_blocks, fetch_tile))

        def work(pipe: Pipeline, buffers: Sequence[Any], *refs: Any) -> None:
            (row_smem, weight_smems, staging, plain_staging), (lists, number, arrays) = buffers, unpack(refs)
            warpgroup, output_refs = jax.lax.axis_index("warpgroup"), arrays[3]
            mine = pl.ds(warpgroup * WG_M, WG_M)

            def products_of(slot: Any, k: Any, accumulators: Sequence[Any]) -> None:
                for accumulator, smem in zip(accumulators, weight_smems, strict=True):
                    factor = hopper.transposed(smem.at[slot]) if transposed else smem.at[slot]
                    plgpu.wgmma(accumulator, row_smem.at[slot, mine], factor)

            def extras_of(step: Any, group: Any) -> list[jax.Array]:
                slot = pipe.consumer_wait(step)
                values = [row_smem[slot, mine], weight_smems[0][slot, mine]]
                plgpu.commit_smem()  # These reads end before a copy may write there.
                pipe.consumer_release(step)
                # Rows past the last group may hold NaN.
                return [jnp.where(group < num_experts, value.astype(jnp.float32), 0.0) for value in values]

            def work_on_tile(index: Any, first: Any) -> Any:
                group, row, column = tile_at(lists, index)
                _, done = hopper.clamped_tile(lists.tile_I[index], columns, num_columns)
                begin, end = (jnp.clip(rows_I[index] - warpgroup * WG_M, 0, WG_M) for rows_I in (lists.begin_I, lists.end_I))
                k_steps = num_k_steps(group)
                products = hopper.multiply(pipe, first, k_steps, columns, num_products, products_of)
                for i in range(num_strips):
                    others = extras_of(first + k_steps + i, group) if extras else []
                    outputs = epilogue([hopper.strip(product, i) for product in products], others)
                    new = begin, jnp.where(i * BLOCK_K >= done, end, 0)
                    for value, ref in zip(outputs, output_refs, strict=True):
                        at = ref.at[pl.ds(row + warpgroup * WG_M, WG_M), pl.ds(column + i * BLOCK_K, BLOCK_K)]
                        _store_own(value.astype(dtype), *new, staging.at[warpgroup], plain_staging.at[warpgroup], at)
                return first + num_steps(group)

            hopper.for_each_tile(number, num_blocks, work_on_tile)

        weight_block = (columns, BLOCK_K) if transposed else (BLOCK_K, columns)
        return hopper.launch(
            fetch,
            work,
            [*steps, number[None], *rows, *weights, *extras],
            outputs=[jax.ShapeDtypeStruct((num_rows, num_columns), dtype)] * num_outputs,
            scratch=[
                swizzled(STAGES, BLOCK_M, BLOCK_K),
                [swizzled(STAGES, *weight_block)] * num_products,
                swizzled(CONSUMERS, WG_M, BLOCK_K),
                plgpu.SMEM((CONSUMERS, WG_M, BLOCK_K), dtype),
            ],
            loads=1 + num_products,
            num_blocks=num_blocks,
            name=f"expert_{name}",
            interpret=interpret,
        )

    def grouped_matmul_dw(
        self, name: str, left_RX: jax.Array, rights: Sequence[jax.Array], group_sizes_E: jax.Array, /
    ) -> list[jax.Array]:
        """Compute `Products.grouped_matmul_dw`.

        The rows are the contracted dimension, and a group may begin at any row. Steps over them begin at the last multiple of
        ALIGN_M rows up to its start; the first and the last may hold rows of other groups, or of none, which are zeroed in
        shared memory.
        """
        num_blocks, interpret = self
        (_, X), Y, dtype, num_experts = left_RX.shape, rights[0].shape[1], left_RX.dtype, group_sizes_E.shape[0]
        columns = min(COLUMNS // len(rights), Y)
        num_left, num_right, num_strips = -(-X // BLOCK_M), -(-Y // columns), columns // BLOCK_K
        num_tiles = num_left * num_right
        start_E = jnp.cumsum(group_sizes_E, dtype=jnp.int32) - group_sizes_E

        def tile_at(index: Any) -> tuple[Any, Any, Any]:
            """Return the group of tile `index`, and its row and column in the group's grid of output tiles."""
            group, within = jax.lax.div(index, jnp.int32(num_tiles)), jax.lax.rem(index, jnp.int32(num_tiles))
            band, within = (f(within, jnp.int32(GROUP_M * num_right)) for f in (jax.lax.div, jax.lax.rem))
            of_band = jnp.minimum(num_left - band * GROUP_M, GROUP_M)
            return group, band * GROUP_M + jax.lax.rem(within, of_band), jax.lax.div(within, of_band)

        def steps_of(start: Any, size: Any) -> tuple[Any, Any]:
            """Return the number of rows before the group in its first step, and the group's number of steps."""
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
                """Zero rows outside of [begin, end): each warpgroup in its own left columns, and in some right ones."""
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

        return hopper.launch(
            fetch,
            work,
            [start_E, group_sizes_E, left_RX, *rights],
            outputs=[jax.ShapeDtypeStruct((num_experts, X, Y), dtype)] * len(rights),
            scratch=[
                swizzled(STAGES, BLOCK_K, BLOCK_M),
                [swizzled(STAGES, BLOCK_K, columns)] * len(rights),
                swizzled(CONSUMERS, WG_M, BLOCK_K),
                plgpu.Barrier(num_arrivals=CONSUMERS),
            ],
            loads=1 + len(rights),
            num_blocks=num_blocks,
            name=f"expert_{name}",
            interpret=interpret,
        )


def _store_own(values: jax.Array, begin: Any, end: Any, staging: Any, plain_staging: Any, destination: Any) -> None:
    """Begin to write rows [begin, end) of the WG_M `values`, if any; fewer than WG_M go in pieces, staged unswizzled."""
    own = end - begin

    @pl.when(own == WG_M)
    def _() -> None:
        hopper.store(values, staging, destination)

    def store_piece(begin: Any, size: int) -> None:
        piece = pl.ds(begin, size)
        plgpu.copy_smem_to_gmem(plain_staging.at[piece], destination.at[piece])

    @pl.when((own > 0) & (own < WG_M))
    def _() -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # For the values staged before.
        hopper.write(plain_staging, values)
        plgpu.commit_smem()
        at = begin
        for size in (32, 16, 8, 4, 2, 1):
            pl.when(own & size != 0)(functools.partial(store_piece, at, size))
            at = at + (own & size)


def expert_ffn_pallas_gpu(
    x_RD: jax.Array, w_gate_EDF: jax.Array, w_up_EDF: jax.Array, w_down_EFD: jax.Array, group_sizes_E: jax.Array
) -> jax.Array:
    """Compute `expert_ffn`, y [R, D], in bfloat16 on the current Hopper GPU; ValueError for other devices or dtypes."""
    reason = hopper.unsupported_reason(x_RD.dtype)
    if reason is not None:
        raise ValueError(f"the expert backend 'pallas_gpu' cannot run: it {reason}; use model.expert_backend tiles")
    products = Hopper(hopper.current_gpu().num_blocks)
    return expert_ffn_on(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, products)


def expert_ffn_on(
    x_RD: jax.Array,
    w_gate_EDF: jax.Array,
    w_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
    group_sizes_E: jax.Array,
    products: Hopper,
) -> jax.Array:
    """Compute `expert_ffn`, y [R, D], by `products`. R, D and F are padded with zeros to sizes that the kernels take."""
    num_rows, (D, F) = x_RD.shape[0], w_gate_EDF.shape[1:]
    more_D, more_F = ((0, max(-width % WIDTH, 2 * WIDTH - width)) for width in (D, F))
    more_R = 0, -num_rows % ALIGN_M
    if more_D[1] or more_F[1] or more_R[1]:
        x_RD = jnp.pad(x_RD, (more_R, more_D))
    if more_D[1] or more_F[1]:
        w_gate_EDF, w_up_EDF = (jnp.pad(w, ((0, 0), more_D, more_F)) for w in (w_gate_EDF, w_up_EDF))
        w_down_EFD = jnp.pad(w_down_EFD, ((0, 0), more_F, more_D))
    return expert_ffn_by(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, products)[:num_rows, :D]
