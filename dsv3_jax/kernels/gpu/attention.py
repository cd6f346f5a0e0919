"""Causal attention on Hopper GPUs: Pallas kernels for values and gradients, with the contract of `causal_attention`.

The forward kernel has a block of threads for every BLOCK_M queries of a head; keys and values stream past, with the online
softmax. It keeps the logarithm of every row's sum of exponentials, from which the backward kernels recompute the
probabilities: one kernel for the gradients of keys and values, where queries stream past, and one for that of the queries,
where keys do. Each sums in registers: every result is written once, by one block of threads, and summed in a fixed order.

Keys after a warpgroup's last query are skipped, and positions are compared only in blocks where some key comes after some
query. Of a head's tiles, those with the most work start first.

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

from dsv3_jax.kernels.gpu import hopper
from dsv3_jax.kernels.gpu.hopper import BLOCK_K, BLOCK_M, CONSUMERS, SHARED_BYTES, WG_M, Pipeline, swizzled, transposed
from dsv3_jax.kernels.vma import varying_alike

WIDEST = 256
"""Largest width of keys and of values: the columns of a product of one instruction."""
WIDTHS = 320
"""Largest sum of key and value width: both gradients of WG_M keys are in registers, with room for other values."""
REGISTERS = 240
"""Registers of a consumer's thread. Forward, the logits and probabilities of WG_M queries and BLOCK_M keys and the output are
160 of them; backward, both gradients of WG_M keys are."""
BACKWARD_STAGES = 3
"""Largest number of slots of the backward pipelines."""


def attention_hopper(
    q_BTNX: jax.Array, k_BSMX: jax.Array, v_BSMW: jax.Array, *, scale: float, first: jax.Array | int = 0, interpret: Any = None
) -> jax.Array:
    """Compute `causal_attention`, [B, T, N, W], in bfloat16 on a Hopper GPU, differentiable in q, k and v.

    Lengths are padded to whole tiles; padded keys come after every query that counts, and padded queries are cut.
    Args as there, with a positive scale and all queries among the keys, first + T <= S; and
      interpret: None, or parameters of Pallas' GPU interpreter. For tests.

    Raises:
      ValueError: for other dtypes, widths that are no multiples of 64 or too large, and N that is no multiple of M.
    """
    dtypes = [jnp.dtype(a.dtype).name for a in (q_BTNX, k_BSMX, v_BSMW)]
    (N, X), (M, W) = q_BTNX.shape[2:], v_BSMW.shape[2:]
    reason = unsupported_reason(X, W)
    if dtypes != ["bfloat16"] * 3:
        reason = f"takes bfloat16, and got q, k and v in {', '.join(dtypes)}"
    elif N % M:
        reason = f"takes heads that share keys and values evenly, and got {N} that share {M}"
    if reason is not None:
        raise ValueError(f"attention by 'pallas_gpu' cannot run: it {reason}; use model.attention_backend chunked")
    padded = (jnp.pad(a, ((0, 0), (0, -a.shape[1] % BLOCK_M), (0, 0), (0, 0))) for a in (q_BTNX, k_BSMX, v_BSMW))
    inputs = varying_alike(jnp.asarray(first, jnp.int32)[None], *padded)
    return _attend(inputs, scale, interpret)[:, : q_BTNX.shape[1]]


def unsupported_reason(X: int, W: int) -> str | None:
    """Return why the kernels do not take these widths of keys and values, as a predicate ("takes ..."); None if they do."""
    if any(width % BLOCK_K or not 0 < width <= WIDEST for width in (X, W)) or X + W > WIDTHS:
        return (
            f"takes keys and values whose widths are multiples of {BLOCK_K} up to {WIDEST}, together up to {WIDTHS}, "
            f"and got {X} and {W}"
        )
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attend(inputs: Sequence[jax.Array], scale: float, interpret: Any) -> jax.Array:
    return _attend_forward(inputs, scale, interpret)[0]


def _attend_forward(inputs: Sequence[jax.Array], scale: float, interpret: Any) -> tuple[jax.Array, tuple]:
    o_BTNW, minus_lse_BNT = _values(inputs, scale=scale, interpret=interpret)
    return o_BTNW, (inputs, o_BTNW, minus_lse_BNT)


def _attend_backward(scale: float, interpret: Any, residuals: tuple, do_BTNW: jax.Array) -> tuple:
    inputs, o_BTNW, minus_lse_BNT = residuals
    minus_delta_BNT = -jnp.sum(do_BTNW.astype(jnp.float32) * o_BTNW.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    arrays = varying_alike(*inputs, do_BTNW, minus_lse_BNT, minus_delta_BNT)
    dk_BSMX, dv_BSMW = _key_gradients(arrays, scale=scale, interpret=interpret)
    return ((None, _query_gradient(arrays, scale=scale, interpret=interpret), dk_BSMX, dv_BSMW),)


_attend.defvjp(_attend_forward, _attend_backward)


def _tile_of_block(heads: int, tiles: int, *, last_first: bool) -> tuple[Any, Any, Any]:
    """Return this block's sequence, head and tile indices. A head's tiles are consecutive, from the last or the first on."""
    index = jax.lax.axis_index("sm")
    row, tile = jax.lax.div(index, jnp.int32(tiles)), jax.lax.rem(index, jnp.int32(tiles))
    batch, head = jax.lax.div(row, jnp.int32(heads)), jax.lax.rem(row, jnp.int32(heads))
    return batch, head, tiles - 1 - tile if last_first else tile


def _key_blocks(first: Any, rows: int, size: int, number: int) -> tuple[Any, Any]:
    """Return how many blocks of keys all `rows` queries from position `first` on see whole, and how many the last sees."""
    whole, some = jax.lax.div(first + 1, jnp.int32(size)), jax.lax.div(first + rows + size - 1, jnp.int32(size))
    return jnp.minimum(whole, number), jnp.minimum(some, number)


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def _values(inputs: Sequence[jax.Array], *, scale: float, interpret: Any) -> list[jax.Array]:
    """Return the output [B, T, N, W], and minus each query's logarithm of the sum of exponentials over the scale, [B, N, T]."""
    _, q_BTNX, _, v_BSMW = inputs
    (B, T, N, X), (S, M, W), dtype = q_BTNX.shape, v_BSMW.shape[1:], q_BTNX.dtype
    # Keys at a time: their logits share the registers with the output.
    size = BLOCK_M if W <= BLOCK_M else WG_M
    stages = min(2 * BLOCK_M // size, (SHARED_BYTES - BLOCK_M * (X + BLOCK_K) * 2) // (size * (X + W) * 2))
    blocks, tiles, exponent = S // size, T // BLOCK_M, scale * math.log2(math.e)

    def fetch(k_pipe: Pipeline, buffers: Sequence[Any], first_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, *_: Any) -> None:
        q_smem, k_smem, v_smem, _, _, q_loaded, v_loaded, v_released = buffers
        batch, head, tile = _tile_of_block(N, tiles, last_first=True)
        v_pipe, shared = Pipeline(v_loaded, v_released, stages), jax.lax.div(head, jnp.int32(N // M))
        plgpu.copy_gmem_to_smem(q_ref.at[batch, pl.ds(tile * BLOCK_M, BLOCK_M), head], q_smem, q_loaded)
        steps = _key_blocks(first_ref[0] + tile * BLOCK_M, BLOCK_M, size, blocks)[1]

        @pl.loop(0, steps)
        def fetch_keys(step: Any) -> None:
            keys = pl.ds(step * size, size)
            # Each has its own pipeline: keys are released before the values are waited for.
            for pipe, ref, smem in ((k_pipe, k_ref, k_smem), (v_pipe, v_ref, v_smem)):
                slot = pipe.producer_acquire(step)
                plgpu.copy_gmem_to_smem(ref.at[batch, keys, shared], smem.at[slot], pipe.loaded.at[slot])

        k_pipe.drain(steps)
        v_pipe.drain(steps)

    def work(k_pipe: Pipeline, buffers: Sequence[Any], first_ref: Any, *refs: Any) -> None:
        (q_smem, k_smem, v_smem, lse_smem, staging, q_loaded, v_loaded, v_released), (*_, o_ref, lse_ref) = buffers, refs
        (batch, head, tile), warpgroup = _tile_of_block(N, tiles, last_first=True), jax.lax.axis_index("warpgroup")
        v_pipe = Pipeline(v_loaded, v_released, stages)
        queries = pl.ds(tile * BLOCK_M + warpgroup * WG_M, WG_M)
        position = first_ref[0] + tile * BLOCK_M
        steps = _key_blocks(position, BLOCK_M, size, blocks)[1]
        position += warpgroup * WG_M
        whole, some = _key_blocks(position, WG_M, size, blocks)
        plgpu.barrier_wait(q_loaded)

        def block(step: Any, carry: tuple, *, compare: bool) -> tuple:
            o, top, total = carry
            logits = hopper.product(q_smem.at[hopper.warpgroup_rows()], transposed(k_smem.at[k_pipe.consumer_wait(step)]))
            k_pipe.consumer_release(step)
            if compare:
                ahead = hopper.iota(logits.shape, 1, interpret) - hopper.iota(logits.shape, 0, interpret)
                logits = jnp.where(ahead <= position - step * size, logits, -jnp.inf)
            new_top = jnp.maximum(top, logits.max(1) * exponent)
            p = jnp.exp2(logits * exponent - jax.lax.broadcast_in_dim(new_top, logits.shape, (0,)))
            shrink = jnp.exp2(top - new_top)
            o *= jax.lax.broadcast_in_dim(shrink, o.shape, (0,))
            (o,) = hopper.add_products([o], [(p.astype(dtype), v_smem.at[v_pipe.consumer_wait(step)])], interpret)
            v_pipe.consumer_release(step)
            return o, new_top, total * shrink + p.sum(1)

        # Every query sees the first key, so that `top` is finite from the first block on.
        initial = (0, (WG_M, W)), (-jnp.inf, (WG_M,)), (0, (WG_M,))
        start = tuple(hopper.constant(value, shape, interpret) for value, shape in initial)
        carry = jax.lax.fori_loop(0, whole, functools.partial(block, compare=False), start)
        o, top, total = jax.lax.fori_loop(whole, some, functools.partial(block, compare=True), carry)
        k_pipe.skip(some, steps)
        v_pipe.skip(some, steps)
        o *= jax.lax.broadcast_in_dim(1 / total, o.shape, (0,))
        lse_smem[warpgroup] = -top / exponent - jnp.log(total) / scale
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[batch, head, queries])
        for i in range(W // BLOCK_K):
            destination = o_ref.at[batch, queries, head, pl.ds(i * BLOCK_K, BLOCK_K)]
            hopper.store(hopper.strip(o, i).astype(dtype), staging.at[warpgroup], destination)

    return hopper.launch(
        fetch,
        work,
        inputs,
        outputs=[jax.ShapeDtypeStruct((B, T, N, W), dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
        scratch=[
            swizzled(BLOCK_M, X),
            swizzled(stages, size, X),
            swizzled(stages, size, W),
            plgpu.SMEM((CONSUMERS, WG_M), jnp.float32),
            swizzled(CONSUMERS, WG_M, BLOCK_K),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        ],
        loads=1,
        stages=stages,
        num_blocks=B * N * tiles,
        name="attention",
        interpret=interpret,
        registers=REGISTERS,
    )


# ----------------------------------------------------------------------------------------------------------------------
# The gradients
#
# Both kernels take, for every query, minus the logarithm of its sum of exponentials, over the scale, and minus the sum of its
# output times its gradient: the products from which these are subtracted start with them instead of zero.


def _backward_stages(X: int, W: int) -> int:
    """Return the number of slots of WG_M rows of two operands that fit in addition to BLOCK_M rows of the two others."""
    row = (X + W) * 2 + 8
    return min(BACKWARD_STAGES, (SHARED_BYTES - BLOCK_M * row) // (WG_M * row))


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def _query_gradient(arrays: Sequence[jax.Array], *, scale: float, interpret: Any) -> jax.Array:
    """Return dq [B, T, N, X]. The arrays are those of `_attend_backward`: inputs, do, minus lse, minus delta."""
    _, q_BTNX, _, v_BSMW, *_ = arrays
    (B, T, N, X), (S, M, W), dtype = q_BTNX.shape, v_BSMW.shape[1:], q_BTNX.dtype
    blocks, tiles, stages, exponent = S // WG_M, T // BLOCK_M, _backward_stages(X, W), scale * math.log2(math.e)

    def fetch(pipe: Pipeline, buffers: Sequence[Any], first_ref: Any, *refs: Any) -> None:
        (k_smem, v_smem, loaded, *smems), (q_ref, k_ref, v_ref, do_ref, *row_refs, _) = buffers, refs
        batch, head, tile = _tile_of_block(N, tiles, last_first=True)
        queries, shared = pl.ds(tile * BLOCK_M, BLOCK_M), jax.lax.div(head, jnp.int32(N // M))
        sources = [ref.at[batch, queries, head] for ref in (q_ref, do_ref)] + [ref.at[batch, head, queries] for ref in row_refs]
        for source, smem in zip(sources, smems, strict=True):
            plgpu.copy_gmem_to_smem(source, smem, loaded)
        steps = _key_blocks(first_ref[0] + tile * BLOCK_M, BLOCK_M, WG_M, blocks)[1]

        @pl.loop(0, steps)
        def fetch_keys(step: Any) -> None:
            slot = pipe.producer_acquire(step)
            for ref, smem in ((k_ref, k_smem), (v_ref, v_smem)):
                source = ref.at[batch, pl.ds(step * WG_M, WG_M), shared]
                plgpu.copy_gmem_to_smem(source, smem.at[slot], pipe.loaded.at[slot])

        pipe.drain(steps)

    def work(pipe: Pipeline, buffers: Sequence[Any], first_ref: Any, *refs: Any) -> None:
        (k_smem, v_smem, loaded, q_smem, do_smem, *row_smems), dq_ref = buffers, refs[-1]
        (batch, head, tile), warpgroup = _tile_of_block(N, tiles, last_first=True), jax.lax.axis_index("warpgroup")
        position = first_ref[0] + tile * BLOCK_M
        steps = _key_blocks(position, BLOCK_M, WG_M, blocks)[1]
        position += warpgroup * WG_M
        whole, some = _key_blocks(position, WG_M, WG_M, blocks)
        plgpu.barrier_wait(loaded)
        starts = [hopper.broadcast_vector(smem.at[hopper.warpgroup_rows()], 0, interpret) for smem in row_smems]

        def block(step: Any, dq: jax.Array, *, compare: bool) -> jax.Array:
            slot = pipe.consumer_wait(step)
            k = k_smem.at[slot]
            own = hopper.warpgroup_rows()
            factors = [(q_smem.at[own], transposed(k)), (do_smem.at[own], transposed(v_smem.at[slot]))]
            logits, dp = hopper.add_products(starts, factors, interpret)
            if compare:
                ahead = hopper.iota(logits.shape, 1, interpret) - hopper.iota(logits.shape, 0, interpret)
                logits = jnp.where(ahead <= position - step * WG_M, logits, -jnp.inf)
            ds = jnp.exp2(logits * exponent) * dp
            (dq,) = hopper.add_products([dq], [(ds.astype(dtype), k)], interpret)
            pipe.consumer_release(step)
            return dq

        dq = jax.lax.fori_loop(0, whole, functools.partial(block, compare=False), hopper.constant(0, (WG_M, X), interpret))
        dq = jax.lax.fori_loop(whole, some, functools.partial(block, compare=True), dq)
        pipe.skip(some, steps)
        queries = pl.ds(tile * BLOCK_M + warpgroup * WG_M, WG_M)
        hopper.store((dq * scale).astype(dtype), q_smem.at[hopper.warpgroup_rows()], dq_ref.at[batch, queries, head])

    (dq_BTNX,) = hopper.launch(
        fetch,
        work,
        arrays,
        outputs=[jax.ShapeDtypeStruct(q_BTNX.shape, dtype)],
        scratch=[
            swizzled(stages, WG_M, X),
            swizzled(stages, WG_M, W),
            plgpu.Barrier(num_arrivals=4),
            swizzled(BLOCK_M, X),
            swizzled(BLOCK_M, W),
            plgpu.SMEM((BLOCK_M,), jnp.float32),
            plgpu.SMEM((BLOCK_M,), jnp.float32),
        ],
        loads=2,
        stages=stages,
        num_blocks=B * N * tiles,
        name="attention_dq",
        interpret=interpret,
        registers=REGISTERS,
    )
    return dq_BTNX


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def _key_gradients(arrays: Sequence[jax.Array], *, scale: float, interpret: Any) -> list[jax.Array]:
    """Return dk [B, S, M, X] and dv [B, S, M, W]. Keys are the rows of all products here, queries the columns."""
    first_1, q_BTNX, k_BSMX, v_BSMW, *_ = arrays
    (B, T, N, X), (S, M, W), dtype = q_BTNX.shape, v_BSMW.shape[1:], q_BTNX.dtype
    blocks, tiles, stages, U = T // WG_M, S // BLOCK_M, _backward_stages(X, W), N // M
    exponent = scale * math.log2(math.e)
    _, number_A = varying_alike(first_1, jnp.arange(WG_M, dtype=jnp.int32))

    def begin_of(first: Any, key: Any) -> Any:
        """Return the first block of WG_M queries of which one sees the key; `blocks` if none does."""
        return jnp.minimum(jax.lax.div(jnp.maximum(key - first, 0), jnp.int32(WG_M)), blocks)

    def fetch(pipe: Pipeline, buffers: Sequence[Any], first_ref: Any, *refs: Any) -> None:
        k_smem, v_smem, number_smem, loaded, *smems = buffers
        q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, number_ref, *_ = refs
        batch, shared, tile = _tile_of_block(M, tiles, last_first=False)
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
        batch, shared, tile = _tile_of_block(M, tiles, last_first=False)
        warpgroup, first = jax.lax.axis_index("warpgroup"), first_ref[0]
        begin, key = begin_of(first, tile * BLOCK_M), tile * BLOCK_M + warpgroup * WG_M
        # Of a head's steps the first ones are for the other warpgroup; in the next ones some keys come after some queries.
        count, some, whole = blocks - begin, begin_of(first, key) - begin, begin_of(first, key + 2 * WG_M - 2) - begin
        plgpu.barrier_wait(loaded)

        def block(step: Any, i: Any, carry: tuple, *, compare: bool) -> tuple:
            dk, dv = carry
            slot = pipe.consumer_wait(step + i)
            q, do = q_smem.at[slot], do_smem.at[slot]
            start = hopper.broadcast_vector(lse_smem.at[slot], 1, interpret)
            if compare:
                # Loaded, since loop invariants are kept in registers throughout, and there are none left.
                query, row = hopper.broadcast_vector(number_smem, 1, interpret), hopper.iota(start.shape, 0, interpret)
                start = jnp.where(row + (key - first - (begin + i) * WG_M) <= query, start, -jnp.inf)
            own = hopper.warpgroup_rows()
            (logits,) = hopper.add_products([start], [(k_smem.at[own], transposed(q))], interpret)
            # The barrier keeps conversions in pairs: fused with its uses, each is done alone, by a slower instruction.
            p = jax.lax.optimization_barrier(jnp.exp2(logits * exponent).astype(dtype))
            (dv,) = hopper.add_products([dv], [(p, do)], interpret)
            start = hopper.broadcast_vector(delta_smem.at[slot], 1, interpret)
            (dp,) = hopper.add_products([start], [(v_smem.at[own], transposed(do))], interpret)
            ds = (p.astype(jnp.float32) * dp).astype(dtype)
            (dk,) = hopper.add_products([dk], [(ds, q)], interpret)
            plgpu.commit_smem()  # The rows' numbers are read before others are copied there.
            pipe.consumer_release(step + i)
            return dk, dv

        def of_head(u: Any, carry: tuple) -> tuple:
            step = u * count
            pipe.skip(step, step + some)
            for start, end, compare in ((some, whole, True), (whole, count, False)):
                carry = jax.lax.fori_loop(start, end, functools.partial(block, step, compare=compare), carry)
            return carry

        start = hopper.constant(0, (WG_M, X), interpret), hopper.constant(0, (WG_M, W), interpret)
        dk, dv = jax.lax.fori_loop(0, U, of_head, start)
        keys, own = pl.ds(key, WG_M), hopper.warpgroup_rows()
        hopper.store((dk * scale).astype(dtype), k_smem.at[own], dk_ref.at[batch, keys, shared])
        hopper.store(dv.astype(dtype), v_smem.at[own], dv_ref.at[batch, keys, shared])

    return hopper.launch(
        fetch,
        work,
        [*arrays, number_A],
        outputs=[jax.ShapeDtypeStruct(k_BSMX.shape, dtype), jax.ShapeDtypeStruct(v_BSMW.shape, dtype)],
        scratch=[
            swizzled(BLOCK_M, X),
            swizzled(BLOCK_M, W),
            plgpu.SMEM((WG_M,), jnp.int32),
            plgpu.Barrier(num_arrivals=3),
            swizzled(stages, WG_M, X),
            swizzled(stages, WG_M, W),
            plgpu.SMEM((stages, WG_M), jnp.float32),
            plgpu.SMEM((stages, WG_M), jnp.float32),
        ],
        loads=4,
        stages=stages,
        num_blocks=B * M * tiles,
        name="attention_dk_dv",
        interpret=interpret,
        registers=REGISTERS,
    )
