"""The gradients of attention on Hopper GPUs: two Pallas kernels that compute the probabilities again; see `attention_gpu.py`.

Both take, of every query, minus the logarithm of its sum of exponentials, in units of the logits, and minus the sum of its
output times that one's gradient: the products that these are subtracted from begin with them, not with zero.

Axes beyond the project's legend: M key-value heads, X query/key width, U the query heads that share a key-value head, A the
queries of one step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.kernels.gpu.hopper import (
    BLOCK_M,
    SHARED_BYTES,
    SWIZZLED,
    WG_M,
    Pipeline,
    add_products,
    beside,
    column_numbers,
    constant,
    launch,
    own_rows,
    row_numbers,
    store,
    turned,
)
from dsv3_jax.kernels.vma import varying_alike

STAGES = 3
"""Slots of the rings, at most."""
REGISTERS = 240
"""Of a thread that multiplies: rows of both gradients of WG_M keys are 160 of them."""


def place_of(heads: int, tiles: int, *, last_first: bool) -> tuple[Any, Any, Any]:
    """Sequence, head and tile of the block of threads at hand. Tiles of a head run side by side, from the last or the first."""
    index = jax.lax.axis_index("sm")
    row, tile = jax.lax.div(index, jnp.int32(tiles)), jax.lax.rem(index, jnp.int32(tiles))
    batch, head = jax.lax.div(row, jnp.int32(heads)), jax.lax.rem(row, jnp.int32(heads))
    return batch, head, tiles - 1 - tile if last_first else tile


def key_blocks(first: Any, rows: int, size: int, number: int) -> tuple[Any, Any]:
    """Of blocks of keys: how many each of `rows` queries from position `first` on sees whole, and how many the last sees."""
    whole, some = jax.lax.div(first + 1, jnp.int32(size)), jax.lax.div(first + rows + size - 1, jnp.int32(size))
    return jnp.minimum(whole, number), jnp.minimum(some, number)


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def query_gradient(
    first_1: jax.Array,
    q_BTNX: jax.Array,
    k_BSMX: jax.Array,
    v_BSMW: jax.Array,
    do_BTNW: jax.Array,
    minus_lse_BNT: jax.Array,
    minus_delta_BNT: jax.Array,
    *,
    scale: float,
    interpret: Any,
) -> jax.Array:
    """dq [B, T, N, X]."""
    (B, T, N, X), (S, M, W), dtype = q_BTNX.shape, v_BSMW.shape[1:], q_BTNX.dtype
    blocks, tiles, stages, exponent = S // WG_M, T // BLOCK_M, _backward_stages(X, W), scale * math.log2(math.e)

    def fetch(pipe: Pipeline, buffers: Sequence[Any], first_ref: Any, *refs: Any) -> None:
        (k_smem, v_smem, loaded, *smems), (q_ref, k_ref, v_ref, do_ref, *row_refs, _) = buffers, refs
        batch, head, tile = place_of(N, tiles, last_first=True)
        queries, shared = pl.ds(tile * BLOCK_M, BLOCK_M), jax.lax.div(head, jnp.int32(N // M))
        sources = [ref.at[batch, queries, head] for ref in (q_ref, do_ref)] + [ref.at[batch, head, queries] for ref in row_refs]
        for source, smem in zip(sources, smems, strict=True):
            plgpu.copy_gmem_to_smem(source, smem, loaded)
        steps = key_blocks(first_ref[0] + tile * BLOCK_M, BLOCK_M, WG_M, blocks)[1]

        @pl.loop(0, steps)
        def fetch_keys(step: Any) -> None:
            slot = pipe.producer_acquire(step)
            for ref, smem in ((k_ref, k_smem), (v_ref, v_smem)):
                source = ref.at[batch, pl.ds(step * WG_M, WG_M), shared]
                plgpu.copy_gmem_to_smem(source, smem.at[slot], pipe.loaded.at[slot])

        pipe.drain(steps)

    def work(pipe: Pipeline, buffers: Sequence[Any], first_ref: Any, *refs: Any) -> None:
        (k_smem, v_smem, loaded, *smems), dq_ref = buffers, refs[-1]
        (batch, head, tile), warpgroup = place_of(N, tiles, last_first=True), jax.lax.axis_index("warpgroup")
        q_smem, do_smem, *row_smems = smems
        position = first_ref[0] + tile * BLOCK_M
        steps = key_blocks(position, BLOCK_M, WG_M, blocks)[1]
        position += warpgroup * WG_M
        whole, some = key_blocks(position, WG_M, WG_M, blocks)
        plgpu.barrier_wait(loaded)
        starts = [beside(smem.at[own_rows()], 0, interpret) for smem in row_smems]

        def block(step: Any, dq: jax.Array, *, compare: bool) -> jax.Array:
            slot = pipe.consumer_wait(step)
            k = k_smem.at[slot]
            mine = own_rows()
            factors = [(q_smem.at[mine], turned(k)), (do_smem.at[mine], turned(v_smem.at[slot]))]
            logits, dp = add_products(starts, factors, interpret)
            if compare:
                ahead = column_numbers(logits.shape, interpret) - row_numbers(logits.shape, interpret)
                logits = jnp.where(ahead <= position - step * WG_M, logits, -jnp.inf)
            ds = jnp.exp2(logits * exponent) * dp
            (dq,) = add_products([dq], [(ds.astype(dtype), k)], interpret)
            pipe.consumer_release(step)
            return dq

        dq = jax.lax.fori_loop(0, whole, functools.partial(block, compare=False), constant(0, (WG_M, X), interpret))
        dq = jax.lax.fori_loop(whole, some, functools.partial(block, compare=True), dq)
        pipe.skip(some, steps)
        queries = pl.ds(tile * BLOCK_M + warpgroup * WG_M, WG_M)
        store((dq * scale).astype(dtype), q_smem.at[own_rows()], dq_ref.at[batch, queries, head])

    scratch = [
        plgpu.SMEM((stages, WG_M, X), dtype, transforms=SWIZZLED),
        plgpu.SMEM((stages, WG_M, W), dtype, transforms=SWIZZLED),
        plgpu.Barrier(num_arrivals=4),
        plgpu.SMEM((BLOCK_M, X), dtype, transforms=SWIZZLED),
        plgpu.SMEM((BLOCK_M, W), dtype, transforms=SWIZZLED),
        plgpu.SMEM((BLOCK_M,), jnp.float32),
        plgpu.SMEM((BLOCK_M,), jnp.float32),
    ]
    (dq_BTNX,) = launch(
        fetch,
        work,
        [first_1, q_BTNX, k_BSMX, v_BSMW, do_BTNW, minus_lse_BNT, minus_delta_BNT],
        outputs=[jax.ShapeDtypeStruct(q_BTNX.shape, dtype)],
        scratch=scratch,
        loads=2,
        stages=stages,
        num_blocks=B * N * tiles,
        name="attention_dq",
        interpret=interpret,
        registers=REGISTERS,
    )
    return dq_BTNX


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def key_gradients(
    first_1: jax.Array,
    q_BTNX: jax.Array,
    k_BSMX: jax.Array,
    v_BSMW: jax.Array,
    do_BTNW: jax.Array,
    minus_lse_BNT: jax.Array,
    minus_delta_BNT: jax.Array,
    *,
    scale: float,
    interpret: Any,
) -> list[jax.Array]:
    """dk [B, S, M, X] and dv [B, S, M, W]. Keys are the rows of all products here, queries the columns."""
    (B, T, N, X), (S, M, W), dtype = q_BTNX.shape, v_BSMW.shape[1:], q_BTNX.dtype
    blocks, tiles, stages, U = T // WG_M, S // BLOCK_M, _backward_stages(X, W), N // M
    exponent = scale * math.log2(math.e)
    _, number_A = varying_alike(first_1, jnp.arange(WG_M, dtype=jnp.int32))

    def begin_of(first: Any, key: Any) -> Any:
        """The first block of queries of which one sees the key."""
        return jnp.minimum(jax.lax.div(jnp.maximum(key - first, 0), jnp.int32(WG_M)), blocks)

    def fetch(pipe: Pipeline, buffers: Sequence[Any], first_ref: Any, *refs: Any) -> None:
        k_smem, v_smem, number_smem, loaded, *smems = buffers
        q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, number_ref, *_ = refs
        batch, shared, tile = place_of(M, tiles, last_first=False)
        plgpu.copy_gmem_to_smem(number_ref, number_smem, loaded)
        for ref, smem in ((k_ref, k_smem), (v_ref, v_smem)):
            plgpu.copy_gmem_to_smem(ref.at[batch, pl.ds(tile * BLOCK_M, BLOCK_M), shared], smem, loaded)
        begin = begin_of(first_ref[0], tile * BLOCK_M)
        count = blocks - begin

        def fetch_queries(u: Any, i: Any) -> None:
            slot = pipe.producer_acquire(u * count + i)
            head, queries = shared * U + u, pl.ds((begin + i) * WG_M, WG_M)
            sources = [ref.at[batch, queries, head] for ref in (q_ref, do_ref)]
            sources += [ref.at[batch, head, queries] for ref in (lse_ref, delta_ref)]
            for source, smem in zip(sources, smems, strict=True):
                plgpu.copy_gmem_to_smem(source, smem.at[slot], pipe.loaded.at[slot])

        @pl.loop(0, U)
        def fetch_head(u: Any) -> None:
            pl.loop(0, count)(functools.partial(fetch_queries, u))

        pipe.drain(U * count)

    def work(pipe: Pipeline, buffers: Sequence[Any], first_ref: Any, *refs: Any) -> None:
        (k_smem, v_smem, number_smem, loaded, q_smem, do_smem, lse_smem, delta_smem), (*_, dk_ref, dv_ref) = buffers, refs
        (batch, shared, tile), warpgroup, first = (
            place_of(M, tiles, last_first=False),
            jax.lax.axis_index("warpgroup"),
            first_ref[0],
        )
        begin, key = begin_of(first, tile * BLOCK_M), tile * BLOCK_M + warpgroup * WG_M
        # Of the steps with a head: the first ones are for the other warpgroup, then some keys come after some queries.
        count, some, whole = blocks - begin, begin_of(first, key) - begin, begin_of(first, key + 2 * WG_M - 2) - begin
        plgpu.barrier_wait(loaded)

        def block(step: Any, i: Any, carry: tuple, *, compare: bool) -> tuple:
            dk, dv = carry
            slot = pipe.consumer_wait(step + i)
            q, do = q_smem.at[slot], do_smem.at[slot]
            start = beside(lse_smem.at[slot], 1, interpret)
            if compare:
                # Loaded, for what is computed alike in every step is kept in registers throughout, and there are none left.
                query, row = beside(number_smem, 1, interpret), row_numbers(start.shape, interpret)
                start = jnp.where(row + (key - first - (begin + i) * WG_M) <= query, start, -jnp.inf)
            mine = own_rows()
            (logits,) = add_products([start], [(k_smem.at[mine], turned(q))], interpret)
            # Converted two at a time; where the compiler sees what follows, it does so one by one, with a slower instruction.
            p = jax.lax.optimization_barrier(jnp.exp2(logits * exponent).astype(dtype))
            (dv,) = add_products([dv], [(p, do)], interpret)
            start = beside(delta_smem.at[slot], 1, interpret)
            (dp,) = add_products([start], [(v_smem.at[mine], turned(do))], interpret)
            ds = (p.astype(jnp.float32) * dp).astype(dtype)
            (dk,) = add_products([dk], [(ds, q)], interpret)
            plgpu.commit_smem()  # The rows' numbers are read before others are copied there.
            pipe.consumer_release(step + i)
            return dk, dv

        def of_head(u: Any, carry: tuple) -> tuple:
            step = u * count
            pipe.skip(step, step + some)
            for start, end, compare in ((some, whole, True), (whole, count, False)):
                carry = jax.lax.fori_loop(start, end, functools.partial(block, step, compare=compare), carry)
            return carry

        start = constant(0, (WG_M, X), interpret), constant(0, (WG_M, W), interpret)
        dk, dv = jax.lax.fori_loop(0, U, of_head, start)
        keys, mine = pl.ds(key, WG_M), own_rows()
        store((dk * scale).astype(dtype), k_smem.at[mine], dk_ref.at[batch, keys, shared])
        store(dv.astype(dtype), v_smem.at[mine], dv_ref.at[batch, keys, shared])

    scratch = [
        plgpu.SMEM((BLOCK_M, X), dtype, transforms=SWIZZLED),
        plgpu.SMEM((BLOCK_M, W), dtype, transforms=SWIZZLED),
        plgpu.SMEM((WG_M,), jnp.int32),
        plgpu.Barrier(num_arrivals=3),
        plgpu.SMEM((stages, WG_M, X), dtype, transforms=SWIZZLED),
        plgpu.SMEM((stages, WG_M, W), dtype, transforms=SWIZZLED),
        plgpu.SMEM((stages, WG_M), jnp.float32),
        plgpu.SMEM((stages, WG_M), jnp.float32),
    ]
    return launch(
        fetch,
        work,
        [first_1, q_BTNX, k_BSMX, v_BSMW, do_BTNW, minus_lse_BNT, minus_delta_BNT, number_A],
        outputs=[jax.ShapeDtypeStruct(k_BSMX.shape, dtype), jax.ShapeDtypeStruct(v_BSMW.shape, dtype)],
        scratch=scratch,
        loads=4,
        stages=stages,
        num_blocks=B * M * tiles,
        name="attention_dk_dv",
        interpret=interpret,
        registers=REGISTERS,
    )


def _backward_stages(X: int, W: int) -> int:
    """Slots of WG_M rows of two operands, beside BLOCK_M rows of the two others."""
    row = (X + W) * 2 + 8
    return min(STAGES, (SHARED_BYTES - BLOCK_M * row) // (WG_M * row))
