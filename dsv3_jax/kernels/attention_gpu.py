"""Causal attention on Hopper GPUs: Pallas kernels for the values and the gradients, under the contract of `causal_attention`.

The forward kernel has a block of threads for every TILE queries of a head, a row of which stays in one warpgroup; keys and values
pass by in blocks, with the online softmax. It keeps the logarithm of every row's sum, from which the backward kernels compute the
probabilities again: one for the gradients of keys and values, where queries pass by, and one for that of the queries, where keys do.
Each adds up in registers, so that every result is written once and no two blocks write to the same place.

Blocks of keys after a warpgroup's last query are passed over, and positions compared only where some key comes after some query.
The longest loops are started first.

Axes beyond the project's legend: M key-value heads, X query/key width, U the query heads that share a key-value head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.kernels.hopper import (
    FETCHING,
    HALF,
    STEP,
    SWIZZLED,
    TILE,
    Ring,
    add_product,
    column_numbers,
    constant,
    launch,
    load_beside,
    products_of,
    row_numbers,
    store,
    strip,
)
from dsv3_jax.kernels.varying import varying_alike

WIDEST = 256
"""Columns of a product of one instruction."""
WIDTHS = 320
"""Key and value width together: rows of both gradients of HALF keys, in registers, leave room for the rest."""
STAGES = 3
"""Slots of the backward kernels' rings, at most."""
SHARED_BYTES = 227 * 1024 - 2048
"""Shared memory of a block, less the barriers and what lies between the arrays."""


def attention_hopper(
    q_BTNX: jax.Array,
    k_BSMX: jax.Array,
    v_BSMW: jax.Array,
    *,
    scale: float,
    first: jax.Array | int = 0,
    interpret: Any = None,
) -> jax.Array:
    """softmax(q k^T * scale, over positions up to the query's own) v, differentiable in q, k and v.

    Lengths are padded to whole tiles; padded keys come after every query that counts, and padded queries are cut.

    Args:
      q_BTNX: queries of N heads, bfloat16.
      k_BSMX: keys of M heads; M divides N, and query head n reads key-value head n * M // N.
      v_BSMW: values of the same M heads.
      scale: factor on the logits, positive.
      first: position of the first query among the keys; not 0 where other devices hold the queries before it. All queries
        lie among the keys: first + T <= S.
      interpret: None, or parameters of Pallas' GPU interpreter. For tests.

    Returns:
      [B, T, N, W] in bfloat16; logits and softmax are float32.

    Raises:
      ValueError: for other dtypes, for widths that are no multiples of 64 or too large, and for heads that do not divide.
    """
    _require(q_BTNX, k_BSMX, v_BSMW)
    T, S = q_BTNX.shape[1], k_BSMX.shape[1]
    padded = (jnp.pad(a, ((0, 0), (0, -a.shape[1] % TILE), (0, 0), (0, 0))) for a in (q_BTNX, k_BSMX, v_BSMW))
    del S
    arrays = varying_alike(*padded, jnp.asarray(first, jnp.int32)[None])
    return _attend(*arrays, scale, interpret)[:, :T]


def _require(q_BTNX: jax.Array, k_BSMX: jax.Array, v_BSMW: jax.Array) -> None:
    remedy = "or use attention_backend chunked"
    dtypes = [jnp.dtype(a.dtype).name for a in (q_BTNX, k_BSMX, v_BSMW)]
    if dtypes != ["bfloat16"] * 3:
        raise ValueError(f"attention for Hopper got q, k and v in {', '.join(dtypes)}; it takes bfloat16, {remedy}")
    N, X = q_BTNX.shape[2:]
    M, W = v_BSMW.shape[2:]
    if any(width % STEP or not 0 < width <= WIDEST for width in (X, W)) or X + W > WIDTHS:
        raise ValueError(
            f"attention for Hopper got keys of width {X} and values of width {W}; it takes multiples of {STEP} up to {WIDEST}, "
            f"together up to {WIDTHS}, {remedy}"
        )
    if N % M:
        raise ValueError(f"attention for Hopper got {N} heads that share {M} of keys and values; it takes a divisor, {remedy}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q_BTNX: jax.Array, k_BSMX: jax.Array, v_BSMW: jax.Array, first_1: jax.Array, scale: float, interpret: Any) -> jax.Array:
    return _attend_forward(q_BTNX, k_BSMX, v_BSMW, first_1, scale, interpret)[0]


def _attend_forward(
    q_BTNX: jax.Array, k_BSMX: jax.Array, v_BSMW: jax.Array, first_1: jax.Array, scale: float, interpret: Any
) -> tuple:
    o_BTNW, lse_BNT = _values(q_BTNX, k_BSMX, v_BSMW, first_1, scale=scale, interpret=interpret)
    return o_BTNW, (q_BTNX, k_BSMX, v_BSMW, first_1, o_BTNW, lse_BNT)


def _attend_backward(scale: float, interpret: Any, residuals: tuple, do_BTNW: jax.Array) -> tuple:
    q_BTNX, k_BSMX, v_BSMW, first_1, o_BTNW, lse_BNT = residuals
    delta_BNT = jnp.einsum("BTNW,BTNW->BNT", do_BTNW, o_BTNW, preferred_element_type=jnp.float32)
    arguments = varying_alike(first_1, q_BTNX, k_BSMX, v_BSMW, do_BTNW, lse_BNT, delta_BNT)
    dk_BSMX, dv_BSMW = _key_gradients(*arguments, scale=scale, interpret=interpret)
    return _query_gradient(*arguments, scale=scale, interpret=interpret), dk_BSMX, dv_BSMW, None


_attend.defvjp(_attend_forward, _attend_backward)


def _place(heads: int, tiles: int) -> tuple[Any, Any, Any]:
    """Sequence, head and tile of the block of threads at hand; the tiles of a head run side by side."""
    index = jax.lax.axis_index("sm")
    row = jax.lax.div(index, jnp.int32(tiles))
    return jax.lax.div(row, jnp.int32(heads)), jax.lax.rem(row, jnp.int32(heads)), jax.lax.rem(index, jnp.int32(tiles))


def _turned(ref: Any) -> Any:
    return plgpu.transpose_ref(ref, (1, 0))


def _log2(values: jax.Array) -> jax.Array:
    return jnp.log(values) * math.log2(math.e)


def _skip(rings: Sequence[Ring], begin: Any, end: Any) -> None:
    """Lets steps pass by that the other warpgroup needs."""

    @pl.loop(begin, end)
    def _(step: Any) -> None:
        for ring in rings:
            ring.filled(step)
            ring.release(step)


def _key_blocks(first: Any, rows: int, size: int, number: int) -> tuple[Any, Any]:
    """Of blocks of keys, how many all of `rows` queries from position `first` on see whole, and how many the last of them sees."""
    whole, some = jax.lax.div(first + 1, jnp.int32(size)), jax.lax.div(first + rows + size - 1, jnp.int32(size))
    return jnp.minimum(whole, number), jnp.minimum(some, number)


def _values(
    q_BTNX: jax.Array, k_BSMX: jax.Array, v_BSMW: jax.Array, first_1: jax.Array, *, scale: float, interpret: Any
) -> list[jax.Array]:
    """Output, and per query the logarithm of the sum, base 2: [B, T, N, W] and [B, N, T]."""
    (B, T, N, X), (S, M, W), dtype = q_BTNX.shape, v_BSMW.shape[1:], q_BTNX.dtype
    # Its probabilities, in float32 and in bfloat16, are in registers beside the output.
    size = TILE if W <= TILE else HALF
    stages = min(2 * TILE // size, (SHARED_BYTES - TILE * (X + STEP) * 2) // (size * (X + W) * 2))
    blocks, tiles, exponent = S // size, T // TILE, scale * math.log2(math.e)

    def place() -> tuple[Any, Any, Any]:
        batch, head, tile = _place(N, tiles)
        return batch, head, tiles - 1 - tile

    def fetch(k_ring: Ring, buffers: Sequence[Any], first_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, *_: Any) -> None:
        (q_smem, k_smem, v_smem, _, _, q_loaded, v_loaded, v_released), (batch, head, tile) = buffers, place()
        v_ring, shared = Ring(v_loaded, v_released, stages), jax.lax.div(head, jnp.int32(N // M))
        plgpu.copy_gmem_to_smem(q_ref.at[batch, pl.ds(tile * TILE, TILE), head], q_smem, q_loaded)
        steps = _key_blocks(first_ref[0] + tile * TILE, TILE, size, blocks)[1]

        @pl.loop(0, steps)
        def _(step: Any) -> None:
            keys = pl.ds(step * size, size)
            for ring, ref, smem in ((k_ring, k_ref, k_smem), (v_ring, v_ref, v_smem)):
                slot = ring.free(step)
                plgpu.copy_gmem_to_smem(ref.at[batch, keys, shared], smem.at[slot], ring.loaded.at[slot])

        k_ring.drain(steps)
        v_ring.drain(steps)

    def work(k_ring: Ring, buffers: Sequence[Any], first_ref: Any, *refs: Any) -> None:
        (q_smem, k_smem, v_smem, lse_smem, staging, q_loaded, v_loaded, v_released), (*_, o_ref, lse_ref) = buffers, refs
        (batch, head, tile), warpgroup = place(), jax.lax.axis_index("warpgroup")
        v_ring, mine = Ring(v_loaded, v_released, stages), q_smem.at[pl.ds(warpgroup * HALF, HALF)]
        queries = pl.ds(tile * TILE + warpgroup * HALF, HALF)
        position = first_ref[0] + tile * TILE
        steps = _key_blocks(position, TILE, size, blocks)[1]
        position += warpgroup * HALF
        whole, some = _key_blocks(position, HALF, size, blocks)
        plgpu.barrier_wait(q_loaded)

        def block(step: Any, carry: tuple, *, compare: bool) -> tuple:
            o, top, total = carry
            (logits,) = products_of((mine, _turned(k_smem.at[k_ring.filled(step)])))
            k_ring.release(step)
            if compare:
                ahead = column_numbers(logits.shape, interpret) - row_numbers(logits.shape, interpret)
                logits = jnp.where(ahead <= position - step * size, logits, -jnp.inf)
            new_top = jnp.maximum(top, logits.max(1) * exponent)
            p = jnp.exp2(logits * exponent - jax.lax.broadcast_in_dim(new_top, logits.shape, (0,)))
            shrink = jnp.exp2(top - new_top)
            o *= jax.lax.broadcast_in_dim(shrink, o.shape, (0,))
            o = add_product(o, p.astype(dtype), v_smem.at[v_ring.filled(step)], interpret)
            v_ring.release(step)
            return o, new_top, total * shrink + p.sum(1)

        # Every query sees the first key, so that `top` is finite from the first block on.
        start = [constant(value, shape, interpret) for value, shape in ((0, (HALF, W)), (-jnp.inf, (HALF,)), (0, (HALF,)))]
        carry = jax.lax.fori_loop(0, whole, functools.partial(block, compare=False), tuple(start))
        o, top, total = jax.lax.fori_loop(whole, some, functools.partial(block, compare=True), carry)
        _skip([k_ring, v_ring], some, steps)
        o /= jax.lax.broadcast_in_dim(total, o.shape, (0,))
        lse_smem[warpgroup] = top + _log2(total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[batch, head, queries])
        for i in range(W // STEP):
            place_of_strip = o_ref.at[batch, queries, head, pl.ds(i * STEP, STEP)]
            store(strip(o, i).astype(dtype), staging.at[warpgroup], place_of_strip)

    scratch = [
        plgpu.SMEM((TILE, X), dtype, transforms=SWIZZLED),
        plgpu.SMEM((stages, size, X), dtype, transforms=SWIZZLED),
        plgpu.SMEM((stages, size, W), dtype, transforms=SWIZZLED),
        plgpu.SMEM((FETCHING, HALF), jnp.float32),
        plgpu.SMEM((FETCHING, HALF, STEP), dtype, transforms=SWIZZLED),
        plgpu.Barrier(),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_arrivals=FETCHING, num_barriers=stages),
    ]
    return launch(
        fetch,
        work,
        [first_1, q_BTNX, k_BSMX, v_BSMW],
        outputs=[jax.ShapeDtypeStruct((B, T, N, W), dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
        scratch=scratch,
        loads=1,
        stages=stages,
        num_sms=B * N * tiles,
        name="attention",
        interpret=interpret,
    )


def _backward_stages(X: int, W: int) -> int:
    """Slots of HALF rows of two operands, beside TILE rows of the two others."""
    row = (X + W) * 2 + 8
    return min(STAGES, (SHARED_BYTES - TILE * row) // (HALF * row))


def _query_gradient(
    first_1: jax.Array,
    q_BTNX: jax.Array,
    k_BSMX: jax.Array,
    v_BSMW: jax.Array,
    do_BTNW: jax.Array,
    lse_BNT: jax.Array,
    delta_BNT: jax.Array,
    *,
    scale: float,
    interpret: Any,
) -> jax.Array:
    """dq [B, T, N, X]."""
    (B, T, N, X), (S, M, W), dtype = q_BTNX.shape, v_BSMW.shape[1:], q_BTNX.dtype
    blocks, tiles, stages, exponent = S // HALF, T // TILE, _backward_stages(X, W), scale * math.log2(math.e)

    def place() -> tuple[Any, Any, Any]:
        batch, head, tile = _place(N, tiles)
        return batch, head, tiles - 1 - tile

    def fetch(ring: Ring, buffers: Sequence[Any], first_ref: Any, *refs: Any) -> None:
        (k_smem, v_smem, loaded, *smems), (q_ref, k_ref, v_ref, do_ref, *row_refs, _) = buffers, refs
        (batch, head, tile), queries = place(), None
        queries, shared = pl.ds(tile * TILE, TILE), jax.lax.div(head, jnp.int32(N // M))
        sources = [ref.at[batch, queries, head] for ref in (q_ref, do_ref)] + [ref.at[batch, head, queries] for ref in row_refs]
        for source, smem in zip(sources, smems, strict=True):
            plgpu.copy_gmem_to_smem(source, smem, loaded)
        steps = _key_blocks(first_ref[0] + tile * TILE, TILE, HALF, blocks)[1]

        @pl.loop(0, steps)
        def _(step: Any) -> None:
            slot = ring.free(step)
            for ref, smem in ((k_ref, k_smem), (v_ref, v_smem)):
                source = ref.at[batch, pl.ds(step * HALF, HALF), shared]
                plgpu.copy_gmem_to_smem(source, smem.at[slot], ring.loaded.at[slot])

        ring.drain(steps)

    def work(ring: Ring, buffers: Sequence[Any], first_ref: Any, *refs: Any) -> None:
        (k_smem, v_smem, loaded, *smems), dq_ref = buffers, refs[-1]
        (batch, head, tile), warpgroup = place(), jax.lax.axis_index("warpgroup")
        q_smem, do_smem, lse_smem, delta_smem = (smem.at[pl.ds(warpgroup * HALF, HALF)] for smem in smems)
        position = first_ref[0] + tile * TILE
        steps = _key_blocks(position, TILE, HALF, blocks)[1]
        position += warpgroup * HALF
        whole, some = _key_blocks(position, HALF, HALF, blocks)
        plgpu.barrier_wait(loaded)
        lse, delta = (load_beside(smem, 0, interpret) for smem in (lse_smem, delta_smem))

        def block(step: Any, dq: jax.Array, *, compare: bool) -> jax.Array:
            slot = ring.filled(step)
            k = k_smem.at[slot]
            logits, dp = products_of((q_smem, _turned(k)), (do_smem, _turned(v_smem.at[slot])))
            if compare:
                ahead = column_numbers(logits.shape, interpret) - row_numbers(logits.shape, interpret)
                logits = jnp.where(ahead <= position - step * HALF, logits, -jnp.inf)
            p = jnp.exp2(logits * exponent - jax.lax.broadcast_in_dim(lse, logits.shape, (0,)))
            ds = p * (dp - jax.lax.broadcast_in_dim(delta, dp.shape, (0,)))
            dq = add_product(dq, ds.astype(dtype), k, interpret)
            ring.release(step)
            return dq

        dq = jax.lax.fori_loop(0, whole, functools.partial(block, compare=False), constant(0, (HALF, X), interpret))
        dq = jax.lax.fori_loop(whole, some, functools.partial(block, compare=True), dq)
        _skip([ring], some, steps)
        queries = pl.ds(tile * TILE + warpgroup * HALF, HALF)
        store((dq * scale).astype(dtype), q_smem, dq_ref.at[batch, queries, head])

    scratch = [
        plgpu.SMEM((stages, HALF, X), dtype, transforms=SWIZZLED),
        plgpu.SMEM((stages, HALF, W), dtype, transforms=SWIZZLED),
        plgpu.Barrier(num_arrivals=4),
        plgpu.SMEM((TILE, X), dtype, transforms=SWIZZLED),
        plgpu.SMEM((TILE, W), dtype, transforms=SWIZZLED),
        plgpu.SMEM((TILE,), jnp.float32),
        plgpu.SMEM((TILE,), jnp.float32),
    ]
    (dq_BTNX,) = launch(
        fetch,
        work,
        [first_1, q_BTNX, k_BSMX, v_BSMW, do_BTNW, lse_BNT, delta_BNT],
        outputs=[jax.ShapeDtypeStruct(q_BTNX.shape, dtype)],
        scratch=scratch,
        loads=2,
        stages=stages,
        num_sms=B * N * tiles,
        name="attention_dq",
        interpret=interpret,
    )
    return dq_BTNX


def _key_gradients(
    first_1: jax.Array,
    q_BTNX: jax.Array,
    k_BSMX: jax.Array,
    v_BSMW: jax.Array,
    do_BTNW: jax.Array,
    lse_BNT: jax.Array,
    delta_BNT: jax.Array,
    *,
    scale: float,
    interpret: Any,
) -> list[jax.Array]:
    """dk [B, S, M, X] and dv [B, S, M, W]. Keys are the rows of all products here, queries the columns."""
    (B, T, N, X), (S, M, W), dtype = q_BTNX.shape, v_BSMW.shape[1:], q_BTNX.dtype
    blocks, tiles, stages, U = T // HALF, S // TILE, _backward_stages(X, W), N // M
    exponent = scale * math.log2(math.e)

    def begin_of(first: Any, key: Any) -> Any:
        """The first block of queries of which one sees the key."""
        return jnp.minimum(jax.lax.div(jnp.maximum(key - first, 0), jnp.int32(HALF)), blocks)

    def fetch(ring: Ring, buffers: Sequence[Any], first_ref: Any, *refs: Any) -> None:
        (k_smem, v_smem, loaded, *smems), (q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *_) = buffers, refs
        batch, shared, tile = _place(M, tiles)
        for ref, smem in ((k_ref, k_smem), (v_ref, v_smem)):
            plgpu.copy_gmem_to_smem(ref.at[batch, pl.ds(tile * TILE, TILE), shared], smem, loaded)
        begin = begin_of(first_ref[0], tile * TILE)
        count = blocks - begin

        @pl.loop(0, U)
        def _(u: Any) -> None:
            @pl.loop(0, count)
            def _(i: Any) -> None:
                slot = ring.free(u * count + i)
                head, queries = shared * U + u, pl.ds((begin + i) * HALF, HALF)
                sources = [ref.at[batch, queries, head] for ref in (q_ref, do_ref)]
                sources += [ref.at[batch, head, queries] for ref in (lse_ref, delta_ref)]
                for source, smem in zip(sources, smems, strict=True):
                    plgpu.copy_gmem_to_smem(source, smem.at[slot], ring.loaded.at[slot])

        ring.drain(U * count)

    def work(ring: Ring, buffers: Sequence[Any], first_ref: Any, *refs: Any) -> None:
        (k_smem, v_smem, loaded, q_smem, do_smem, lse_smem, delta_smem), (*_, dk_ref, dv_ref) = buffers, refs
        (batch, shared, tile), warpgroup, first = _place(M, tiles), jax.lax.axis_index("warpgroup"), first_ref[0]
        k_smem, v_smem = (smem.at[pl.ds(warpgroup * HALF, HALF)] for smem in (k_smem, v_smem))
        begin, key = begin_of(first, tile * TILE), tile * TILE + warpgroup * HALF
        # Of the steps with one head: the first ones are for the other warpgroup, then some keys come after some queries.
        count, some, whole = blocks - begin, begin_of(first, key) - begin, begin_of(first, key + 2 * HALF - 2) - begin
        plgpu.barrier_wait(loaded)

        def block(step: Any, i: Any, carry: tuple, *, compare: bool) -> tuple:
            dk, dv = carry
            slot = ring.filled(step + i)
            q, do = q_smem.at[slot], do_smem.at[slot]
            (logits,) = products_of((k_smem, _turned(q)))
            if compare:
                ahead = row_numbers(logits.shape, interpret) - column_numbers(logits.shape, interpret)
                logits = jnp.where(ahead <= first + (begin + i) * HALF - key, logits, -jnp.inf)
            lse = load_beside(lse_smem.at[slot], 1, interpret)
            p = jnp.exp2(logits * exponent - jax.lax.broadcast_in_dim(lse, logits.shape, (1,))).astype(dtype)
            dv = add_product(dv, p, do, interpret)
            (dp,) = products_of((v_smem, _turned(do)))
            delta = load_beside(delta_smem.at[slot], 1, interpret)
            ds = p.astype(jnp.float32) * (dp - jax.lax.broadcast_in_dim(delta, dp.shape, (1,)))
            dk = add_product(dk, ds.astype(dtype), q, interpret)
            ring.release(step + i)
            return dk, dv

        def of_head(u: Any, carry: tuple) -> tuple:
            step = u * count
            _skip([ring], step, step + some)
            for start, end, compare in ((some, whole, True), (whole, count, False)):
                carry = jax.lax.fori_loop(start, end, functools.partial(block, step, compare=compare), carry)
            return carry

        start = constant(0, (HALF, X), interpret), constant(0, (HALF, W), interpret)
        dk, dv = jax.lax.fori_loop(0, U, of_head, start)
        keys = pl.ds(key, HALF)
        store((dk * scale).astype(dtype), k_smem, dk_ref.at[batch, keys, shared])
        store(dv.astype(dtype), v_smem, dv_ref.at[batch, keys, shared])

    scratch = [
        plgpu.SMEM((TILE, X), dtype, transforms=SWIZZLED),
        plgpu.SMEM((TILE, W), dtype, transforms=SWIZZLED),
        plgpu.Barrier(num_arrivals=2),
        plgpu.SMEM((stages, HALF, X), dtype, transforms=SWIZZLED),
        plgpu.SMEM((stages, HALF, W), dtype, transforms=SWIZZLED),
        plgpu.SMEM((stages, HALF), jnp.float32),
        plgpu.SMEM((stages, HALF), jnp.float32),
    ]
    return launch(
        fetch,
        work,
        [first_1, q_BTNX, k_BSMX, v_BSMW, do_BTNW, lse_BNT, delta_BNT],
        outputs=[jax.ShapeDtypeStruct(k_BSMX.shape, dtype), jax.ShapeDtypeStruct(v_BSMW.shape, dtype)],
        scratch=scratch,
        loads=4,
        stages=stages,
        num_sms=B * M * tiles,
        name="attention_dk_dv",
        interpret=interpret,
    )
