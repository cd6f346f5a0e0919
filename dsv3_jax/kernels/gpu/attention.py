"""Causal attention on Hopper GPUs: Pallas kernels for the values and the gradients, under the contract of `causal_attention`.

The forward kernel has a block of threads for every BLOCK_M queries of a head; keys and values pass by, with the online softmax.
It keeps the logarithm of every row's sum, which gives the backward kernels of `attention_gradients_gpu.py` the probabilities
again: one for the gradients of keys and values, where queries pass by, and one for that of the queries, where keys do. Each
adds up in registers: every result is written once, by one block of threads, and always added up in the same order.

Keys after a warpgroup's last query are passed over, and positions are compared only where some key comes after some query. Of a
head's tiles, those with the most to do are started first.

Axes beyond the project's legend: M key-value heads, X query/key width, U the query heads that share a key-value head.
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

from dsv3_jax.kernels.gpu.attention_gradients import key_blocks, key_gradients, place_of, query_gradient
from dsv3_jax.kernels.gpu.hopper import (
    BLOCK_K,
    BLOCK_M,
    FETCHING,
    SHARED_BYTES,
    SWIZZLED,
    WG_M,
    Pipeline,
    add_products,
    column_numbers,
    constant,
    launch,
    own_rows,
    product_of,
    row_numbers,
    store,
    strip,
    turned,
)
from dsv3_jax.kernels.vma import varying_alike

WIDEST = 256
"""Columns of a product of one instruction."""
WIDTHS = 320
"""Key and value width together: rows of both gradients of WG_M keys, in registers, leave room for the rest."""
REGISTERS = 240
"""Of a thread that multiplies: WG_M queries' logits for BLOCK_M keys, their probabilities and the output are 160 of them."""


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
    _check(q_BTNX, k_BSMX, v_BSMW)
    padded = (jnp.pad(a, ((0, 0), (0, -a.shape[1] % BLOCK_M), (0, 0), (0, 0))) for a in (q_BTNX, k_BSMX, v_BSMW))
    arrays = varying_alike(*padded, jnp.asarray(first, jnp.int32)[None])
    return _attend(*arrays, scale, interpret)[:, : q_BTNX.shape[1]]


def unsupported_reason(X: int, W: int) -> str | None:
    """Why the kernels do not take keys and values so wide, to be read after their name; None if they do."""
    if any(width % BLOCK_K or not 0 < width <= WIDEST for width in (X, W)) or X + W > WIDTHS:
        return (
            f"takes keys and values whose widths are multiples of {BLOCK_K} up to {WIDEST}, together up to {WIDTHS}, "
            f"and got {X} and {W}"
        )
    return None


def _check(q_BTNX: jax.Array, k_BSMX: jax.Array, v_BSMW: jax.Array) -> None:
    dtypes = [jnp.dtype(a.dtype).name for a in (q_BTNX, k_BSMX, v_BSMW)]
    N, X = q_BTNX.shape[2:]
    M, W = v_BSMW.shape[2:]
    reason = unsupported_reason(X, W)
    if dtypes != ["bfloat16"] * 3:
        reason = f"takes bfloat16, and got q, k and v in {', '.join(dtypes)}"
    elif N % M:
        reason = f"takes heads that share keys and values evenly, and got {N} that share {M}"
    if reason is not None:
        raise ValueError(f"attention by 'pallas_gpu' {reason}; use attention_backend chunked")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
    q_BTNX: jax.Array, k_BSMX: jax.Array, v_BSMW: jax.Array, first_1: jax.Array, scale: float, interpret: Any
) -> jax.Array:
    return _attend_forward(q_BTNX, k_BSMX, v_BSMW, first_1, scale, interpret)[0]


def _attend_forward(
    q_BTNX: jax.Array, k_BSMX: jax.Array, v_BSMW: jax.Array, first_1: jax.Array, scale: float, interpret: Any
) -> tuple:
    o_BTNW, minus_lse_BNT = _values(q_BTNX, k_BSMX, v_BSMW, first_1, scale=scale, interpret=interpret)
    return o_BTNW, (q_BTNX, k_BSMX, v_BSMW, first_1, o_BTNW, minus_lse_BNT)


def _attend_backward(scale: float, interpret: Any, residuals: tuple, do_BTNW: jax.Array) -> tuple:
    q_BTNX, k_BSMX, v_BSMW, first_1, o_BTNW, minus_lse_BNT = residuals
    minus_delta_BNT = -jnp.sum(do_BTNW.astype(jnp.float32) * o_BTNW.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    arguments = varying_alike(first_1, q_BTNX, k_BSMX, v_BSMW, do_BTNW, minus_lse_BNT, minus_delta_BNT)
    dk_BSMX, dv_BSMW = key_gradients(*arguments, scale=scale, interpret=interpret)
    return query_gradient(*arguments, scale=scale, interpret=interpret), dk_BSMX, dv_BSMW, None


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def _values(
    q_BTNX: jax.Array, k_BSMX: jax.Array, v_BSMW: jax.Array, first_1: jax.Array, *, scale: float, interpret: Any
) -> list[jax.Array]:
    """The output [B, T, N, W]; and of every query minus the logarithm of its sum of exponentials, in units of the logits."""
    (B, T, N, X), (S, M, W), dtype = q_BTNX.shape, v_BSMW.shape[1:], q_BTNX.dtype
    # Keys at a time: their logits are in registers beside the output.
    size = BLOCK_M if W <= BLOCK_M else WG_M
    stages = min(2 * BLOCK_M // size, (SHARED_BYTES - BLOCK_M * (X + BLOCK_K) * 2) // (size * (X + W) * 2))
    blocks, tiles, exponent = S // size, T // BLOCK_M, scale * math.log2(math.e)

    def fetch(k_pipe: Pipeline, buffers: Sequence[Any], first_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, *_: Any) -> None:
        (q_smem, k_smem, v_smem, _, _, q_loaded, v_loaded, v_released), (batch, head, tile) = (
            buffers,
            place_of(N, tiles, last_first=True),
        )
        v_pipe, shared = Pipeline(v_loaded, v_released, stages), jax.lax.div(head, jnp.int32(N // M))
        plgpu.copy_gmem_to_smem(q_ref.at[batch, pl.ds(tile * BLOCK_M, BLOCK_M), head], q_smem, q_loaded)
        steps = key_blocks(first_ref[0] + tile * BLOCK_M, BLOCK_M, size, blocks)[1]

        @pl.loop(0, steps)
        def fetch_keys(step: Any) -> None:
            keys = pl.ds(step * size, size)
            # Each in a ring of its own: keys are released before the values are waited for.
            for pipe, ref, smem in ((k_pipe, k_ref, k_smem), (v_pipe, v_ref, v_smem)):
                slot = pipe.producer_acquire(step)
                plgpu.copy_gmem_to_smem(ref.at[batch, keys, shared], smem.at[slot], pipe.loaded.at[slot])

        k_pipe.drain(steps)
        v_pipe.drain(steps)

    def work(k_pipe: Pipeline, buffers: Sequence[Any], first_ref: Any, *refs: Any) -> None:
        (q_smem, k_smem, v_smem, lse_smem, staging, q_loaded, v_loaded, v_released), (*_, o_ref, lse_ref) = buffers, refs
        (batch, head, tile), warpgroup = place_of(N, tiles, last_first=True), jax.lax.axis_index("warpgroup")
        v_pipe = Pipeline(v_loaded, v_released, stages)
        queries = pl.ds(tile * BLOCK_M + warpgroup * WG_M, WG_M)
        position = first_ref[0] + tile * BLOCK_M
        steps = key_blocks(position, BLOCK_M, size, blocks)[1]
        position += warpgroup * WG_M
        whole, some = key_blocks(position, WG_M, size, blocks)
        plgpu.barrier_wait(q_loaded)

        def block(step: Any, carry: tuple, *, compare: bool) -> tuple:
            o, top, total = carry
            logits = product_of(q_smem.at[own_rows()], turned(k_smem.at[k_pipe.consumer_wait(step)]))
            k_pipe.consumer_release(step)
            if compare:
                ahead = column_numbers(logits.shape, interpret) - row_numbers(logits.shape, interpret)
                logits = jnp.where(ahead <= position - step * size, logits, -jnp.inf)
            new_top = jnp.maximum(top, logits.max(1) * exponent)
            p = jnp.exp2(logits * exponent - jax.lax.broadcast_in_dim(new_top, logits.shape, (0,)))
            shrink = jnp.exp2(top - new_top)
            o *= jax.lax.broadcast_in_dim(shrink, o.shape, (0,))
            (o,) = add_products([o], [(p.astype(dtype), v_smem.at[v_pipe.consumer_wait(step)])], interpret)
            v_pipe.consumer_release(step)
            return o, new_top, total * shrink + p.sum(1)

        # Every query sees the first key, so that `top` is finite from the first block on.
        start = [constant(value, shape, interpret) for value, shape in ((0, (WG_M, W)), (-jnp.inf, (WG_M,)), (0, (WG_M,)))]
        carry = jax.lax.fori_loop(0, whole, functools.partial(block, compare=False), tuple(start))
        o, top, total = jax.lax.fori_loop(whole, some, functools.partial(block, compare=True), carry)
        k_pipe.skip(some, steps)
        v_pipe.skip(some, steps)
        o *= jax.lax.broadcast_in_dim(1 / total, o.shape, (0,))
        lse_smem[warpgroup] = -top / exponent - jnp.log(total) / scale
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[batch, head, queries])
        for i in range(W // BLOCK_K):
            at = o_ref.at[batch, queries, head, pl.ds(i * BLOCK_K, BLOCK_K)]
            store(strip(o, i).astype(dtype), staging.at[warpgroup], at)

    scratch = [
        plgpu.SMEM((BLOCK_M, X), dtype, transforms=SWIZZLED),
        plgpu.SMEM((stages, size, X), dtype, transforms=SWIZZLED),
        plgpu.SMEM((stages, size, W), dtype, transforms=SWIZZLED),
        plgpu.SMEM((FETCHING, WG_M), jnp.float32),
        plgpu.SMEM((FETCHING, WG_M, BLOCK_K), dtype, transforms=SWIZZLED),
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
        num_blocks=B * N * tiles,
        name="attention",
        interpret=interpret,
        registers=REGISTERS,
    )
