"""Causal attention on a TPU: JAX's splash attention, a Pallas kernel, under the contract of `causal_attention`.

Splash walks a grid of tiles and is told of each whether no, some or all of its queries look at its keys; where some do,
it compares positions in registers. That table is all it knows of the mask. It is computed here from the position of the
first query, which may be traced: on a mesh a device has the queries of its part of the sequence, and all devices run one
program.

Axes beyond the project's legend: M key-value heads, X query/key width, h and m the heads of all sequences of the batch.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

LANES = 128
"""A block is a multiple of the vector lanes."""
Block = tuple[int, int, int]
"""Queries and keys of a grid step, and keys that are multiplied at once."""
FORWARD: Block = 1024, 1024, 256
BACKWARD: Block = 1024, 1024, 256
"""What takes the fewest instructions at the published widths (docs/log.md; benchmarks/tune_splash.py searches again)."""
PUBLISHED_ROW_BYTES = 2 * (256 + 128)
"""Fast memory that a key of 192 and a value of 128 take in bfloat16; rows are padded to the lanes."""
CORES = 2
"""The heads are walked in two independent halves: a v5p chip has two cores, which would otherwise share no backward pass."""


def splash_attention(
    q_BTNX: jax.Array,
    k_BSMX: jax.Array,
    v_BSMW: jax.Array,
    *,
    scale: float,
    first: jax.Array | int = 0,
    forward: Block = FORWARD,
    backward: Block = BACKWARD,
    interpret: Any = False,
) -> jax.Array:
    """softmax(q k^T * scale, over positions up to the query's own) v, differentiable in q, k and v.

    The kernel has no scale: q is scaled in float32 and rounded once more to its dtype (docs/numerics.md). Lengths are
    padded to whole blocks; what is padded lies behind every query, and its own rows are cut.

    Args:
      q_BTNX: queries of N heads.
      k_BSMX: keys of M heads; M divides N, and query head n reads key-value head n * M // N.
      v_BSMW: values of the same M heads.
      scale: factor on the logits.
      first: position of the first query among the keys; not 0 where other devices hold the queries before it. Every query
        lies among the keys: first + T <= S.
      forward, backward: queries and keys of a grid step; multiples of 128.
      interpret: run it as JAX operations, on any platform; for tests. As `pallas_call` takes it.

    Returns:
      [B, T, N, W] in v's dtype; logits and softmax are float32.

    Raises:
      ValueError: if q, k and v differ in dtype.
    """
    if not q_BTNX.dtype == k_BSMX.dtype == v_BSMW.dtype:
        raise ValueError(
            f"splash attention got q {q_BTNX.dtype}, k {k_BSMX.dtype} and v {v_BSMW.dtype}; cast them to one dtype, or use "
            "attention_backend=chunked"
        )
    B, T, N, X = q_BTNX.shape
    S, M, W = v_BSMW.shape[1:]
    row_bytes = (_whole(X, LANES) + _whole(W, LANES)) * q_BTNX.dtype.itemsize
    forward, backward = (_evenly(_smaller(block, row_bytes), T, S) for block in (forward, backward))
    sizes = splash.BlockSizes(
        **dict(zip(("block_q", "block_kv", "block_kv_compute"), forward, strict=True)),
        **dict(zip(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), backward, strict=True)),
        use_fused_bwd_kernel=True,
    )
    queries = _whole(T, math.lcm(sizes.block_q, sizes.block_q_dkv))
    keys = _whole(S, math.lcm(sizes.block_kv, sizes.block_kv_dkv))
    scaled = (q_BTNX.astype(jnp.float32) * scale).astype(q_BTNX.dtype)
    q_hTX = _by_head(scaled, queries)
    k_mSX, v_mSW = _by_head(k_BSMX, keys), _by_head(v_BSMW, keys)
    kernel = splash.SplashAttentionKernel(
        _table(first, queries, keys, sizes.block_q, sizes.block_kv, by_key=False),
        None,
        _table(first, queries, keys, sizes.block_q_dkv, sizes.block_kv_dkv, by_key=True),
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=_seen,
        interpret=interpret,
    )
    parts = CORES if B * M % CORES == 0 else 1
    split = (array.reshape(parts, -1, *array.shape[1:]) for array in (q_hTX, k_mSX, v_mSW))
    o_BNTW = jax.vmap(kernel)(*split).reshape(B, N, queries, W)
    return o_BNTW[:, :, :T].swapaxes(1, 2)


def _smaller(block: Block, row_bytes: int) -> Block:
    """The block for wide heads or float32, so that as many bytes of keys and values are in fast memory at a time."""
    queries, keys, at_once = block
    shrink = 2 ** math.ceil(math.log2(max(1, row_bytes / PUBLISHED_ROW_BYTES)))
    queries, keys = (max(LANES, size // shrink) for size in (queries, keys))
    return queries, keys, min(at_once, keys)


def _evenly(block: Block, T: int, S: int) -> Block:
    """No larger than `block`, and no larger than it takes to cover the sequence in as many blocks, so that little is padded."""
    queries, keys, at_once = block
    at_once = min(at_once, _whole(S, LANES))
    return _part(T, queries, LANES), _part(S, keys, at_once), at_once


def _part(length: int, block: int, multiple: int) -> int:
    """The least multiple of which as many cover the length as of `block`."""
    return min(block, _whole(-(-length // -(-length // block)), multiple))


def _whole(length: int, block: int) -> int:
    return -(-length // block) * block


def _by_head(array_BTNX: jax.Array, length: int) -> jax.Array:
    """[B * N, length, X]: to the kernel the sequences of a batch are so many more heads."""
    B, T, N, X = array_BTNX.shape
    by_head = array_BTNX.swapaxes(1, 2).reshape(B * N, T, X)
    return jnp.pad(by_head, ((0, 0), (0, length - T), (0, 0)))


def _seen(query: jax.Array, key: jax.Array) -> jax.Array:
    return query >= key


def _table(first: jax.Array | int, queries: int, keys: int, block_q: int, block_kv: int, *, by_key: bool) -> mask_info.MaskInfo:
    """What splash knows of the mask: each tile's kind, and which block to fetch while a tile is passed over.

    Kinds are 0 (no query looks at a key: the tile is skipped), 1 (some do) and 2 (all do). A skipped tile names the block of
    the next tile that runs, so that it travels meanwhile: with keys innermost that is the next row's first block of keys,
    with queries innermost (`by_key`) the first block of queries that looks at the column.
    """
    i, j = jnp.arange(queries // block_q)[:, None], jnp.arange(keys // block_kv)
    first_query = first + i * block_q
    runs = j * block_kv < first_query + block_q
    kind = jnp.where(runs, jnp.where((j + 1) * block_kv <= first_query + 1, 2, 1), 0)
    if by_key:
        begin = jnp.maximum(j * block_kv - first, 0) // block_q
        fetch = jnp.minimum(jnp.maximum(i, begin), len(i) - 1)
    else:
        fetch = jnp.where(runs, j, 0)
    places = first + jnp.arange(queries)
    return mask_info.MaskInfo(
        # One table for all heads. Scalar memory is scarce.
        data_next=fetch[None].astype(jnp.int16),
        mask_next=None,
        block_mask=kind[None].astype(jnp.int8),
        partial_mask_blocks=None,
        q_sequence=places.astype(jnp.int32),
    )
