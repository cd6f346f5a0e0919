"""Causal attention on TPUs: JAX's splash attention, a Pallas kernel, with the contract of `causal_attention`.

Splash walks a grid of tiles with a table of their kinds: no, some or all of a tile's queries see its keys; for "some" it
compares positions in registers. The table is made here from the position of the first query, which may be traced: on a mesh a
device has the queries of its part of the sequence, and all devices run one program. Documents are splash's segments, numbered
by their starts, and tiles before all of a block's documents are skipped.

Axes beyond the project's legend: M key-value heads, X query/key width, h and m the heads of all sequences of the batch.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from dsv3_jax.kernels.documents import first_seen
from dsv3_jax.kernels.tpu.memory import LANES, check_dtype, round_up

Block = tuple[int, int, int]
"""(queries of a grid step, keys of a grid step, keys multiplied at once); each a multiple of LANES."""
FORWARD: Block = 1024, 1024, 512
BACKWARD: Block = 1024, 1024, 256
"""Both are for all chips, from their schedules at the published widths (docs/log.md, benchmarks/tune_splash.py)."""
ROW_BYTES = 2 * (256 + 128)
"""Bytes in VMEM of a key of 192 and a value of 128, bfloat16, padded to whole lanes: FORWARD and BACKWARD are for these."""
DQ_COPIES = 4
"""Most blocks of keys for a backward pass in one kernel, which leaves a query gradient for each of them, to be summed. With
more, these copies would take too much memory: a second kernel computes that gradient, in 1.3 times the instructions."""
CORES = 2
"""Independent parts into which the heads are split: a v5p chip has two cores, and splash gives a backward pass to one."""


def splash_attention(
    q_BTNX: jax.Array,
    k_BSMX: jax.Array,
    v_BSMW: jax.Array,
    *,
    scale: float,
    first: jax.Array | int = 0,
    segment_starts_BT: jax.Array | None = None,
    forward: Block = FORWARD,
    backward: Block = BACKWARD,
    interpret: Any = False,
) -> jax.Array:
    """Compute `causal_attention`, [B, T, N, W], in float32 or bfloat16, differentiable in q, k and v.

    The kernel has no scale: q is scaled in float32 and rounded once more to its dtype (docs/numerics.md). Lengths are
    padded to whole blocks; padded keys come after every query that counts, and padded queries are cut.

    Args as there, with all queries among the keys, first + T <= S; and
      forward, backward: largest blocks; reduced for wider heads, float32 and short sequences.
      interpret: passed to `pl.pallas_call`, for tests.

    Raises:
      ValueError: if q, k and v differ in dtype, or are neither float32 nor bfloat16.
    """
    if not q_BTNX.dtype == k_BSMX.dtype == v_BSMW.dtype:
        raise ValueError(
            f"splash attention got q {q_BTNX.dtype}, k {k_BSMX.dtype} and v {v_BSMW.dtype}; cast them to one dtype, or use "
            "model.attention_backend chunked"
        )
    check_dtype("splash attention", q_BTNX.dtype, "model.attention_backend chunked")
    B, T, N, X = q_BTNX.shape
    S, M, W = v_BSMW.shape[1:]
    row_bytes = (round_up(X, LANES) + round_up(W, LANES)) * q_BTNX.dtype.itemsize
    forward = _evenly(_smaller(forward, row_bytes), T, S)
    queries, keys = round_up(T, forward[0]), round_up(S, forward[1])
    backward = _dividing(_smaller(backward, row_bytes), queries, keys)
    scaled = (q_BTNX.astype(jnp.float32) * scale).astype(q_BTNX.dtype)
    by_head = _by_head(scaled, queries), _by_head(k_BSMX, keys), _by_head(v_BSMW, keys)
    if segment_starts_BT is None:
        parts = CORES if B * M % CORES == 0 else 1
        segments: tuple[Any, ...] = ()
        earliest = None
    else:
        # A sequence has its own segments.
        halves = CORES if M % CORES == 0 else 1
        parts = B * halves
        ids = _segments(segment_starts_BT, first, queries, keys, S)
        segments = (jax.tree.map(lambda ids: jnp.repeat(ids, halves, axis=0), ids),)
        earliest = ids.q.min(0)
    split = (array.reshape(parts, -1, *array.shape[1:]) for array in by_head)
    o: Any = jax.vmap(_kernel(first, earliest, queries, keys, forward, backward, interpret))(*split, *segments)
    return o.reshape(B, N, queries, W)[:, :, :T].swapaxes(1, 2)


def _segments(segment_starts_BT: jax.Array, first: jax.Array | int, queries: int, keys: int, S: int) -> splash.SegmentIds:
    """Return segment ids of all padded queries [B, queries] and keys [B, keys]: their document's start; -1: unseen.

    No device needs the others' starts: of the keys before the queries only those of the first query's document can be seen,
    and of those after none.
    """
    ids_BT = first_seen(segment_starts_BT, first)
    T = ids_BT.shape[1]
    same_BS = jnp.where(jnp.arange(S) >= ids_BT[:, :1], ids_BT[:, :1], -1)
    ids_BS = jax.lax.dynamic_update_slice_in_dim(same_BS, ids_BT, first, 1)
    # Padded queries see what the last one does, so that each has a key; padded keys come after every query that counts.
    q = jnp.pad(ids_BT, ((0, 0), (0, queries - T)), mode="edge")
    return splash.SegmentIds(q, jnp.pad(ids_BS, ((0, 0), (0, keys - S)), constant_values=-1))


def _smaller(block: Block, row_bytes: int) -> Block:
    """Return `block`, queries and keys divided by row_bytes / ROW_BYTES rounded up to a power of two; each at least LANES."""
    shrink = 2 ** math.ceil(math.log2(max(1, row_bytes / ROW_BYTES)))
    queries, keys = (max(LANES, size // shrink) for size in block[:2])
    return queries, keys, min(block[2], keys)


def _evenly(block: Block, T: int, S: int) -> Block:
    """Return `block` shrunk so that as many blocks cover T queries and S keys as before, with padding below 256 a block."""
    queries, keys, at_once = block

    def part(length: int, size: int, multiple: int) -> int:
        return min(size, round_up(-(-length // -(-length // size)), multiple))

    # Of a block with an odd multiple of the lanes, only that few keys could be multiplied at once.
    keys = part(S, keys, 2 * LANES if min(S, keys) > 2 * LANES else LANES)
    return part(T, queries, LANES), keys, _divisor(keys, at_once)


def _dividing(block: Block, queries: int, keys: int) -> Block:
    """Return the largest block, up to `block`, that divides the padded numbers of queries and keys."""
    keys_of_block = _divisor(keys, block[1])
    return _divisor(queries, block[0]), keys_of_block, _divisor(keys_of_block, block[2])


def _divisor(length: int, largest: int) -> int:
    """Return the largest divisor of `length` up to `largest` that is a multiple of LANES; both arguments are multiples."""
    return next(size for size in range(min(length, largest), 0, -LANES) if length % size == 0)


def _by_head(array_BTNX: jax.Array, length: int) -> jax.Array:
    """Return [B * N, length, X], T padded with zeros to `length`: to the kernel, the sequences of a batch are more heads."""
    B, T, N, X = array_BTNX.shape
    by_head = array_BTNX.swapaxes(1, 2).reshape(B * N, T, X)
    return jnp.pad(by_head, ((0, 0), (0, length - T), (0, 0)))


def _kernel(
    first: jax.Array | int, earliest: jax.Array | None, queries: int, keys: int, forward: Block, backward: Block, interpret: Any
) -> Any:
    """Return splash's function of q [h, queries, X], k [m, keys, X], v [m, keys, W]; `earliest` as in `_table_of_documents`."""
    if earliest is None:
        table = functools.partial(_table, first, queries, keys)
    else:
        table = functools.partial(_table_of_documents, first, earliest, keys)
    fused = keys // backward[1] <= DQ_COPIES
    block_q, block_kv = (None, None) if fused else backward[:2]
    sizes = splash.BlockSizes(*forward, *backward, block_q, block_kv, use_fused_bwd_kernel=fused)
    return splash.SplashAttentionKernel(
        table(*forward[:2]),
        None if fused else table(*backward[:2]),
        table(*backward[:2], queries_innermost=True),
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=operator.ge,
        interpret=interpret,
    )


def _table(
    first: jax.Array | int, queries: int, keys: int, block_q: int, block_kv: int, *, queries_innermost: bool = False
) -> MaskInfo:
    """Return splash's table of the mask: the kind of each tile, and the block to fetch for it.

    Kinds are 0 (no query sees a key: the tile is skipped), 1 (some do) and 2 (all do). A skipped tile carries the index of
    the next tile to run, so that its block is prefetched: the first block of keys, where keys are the inner axis of the grid;
    else the first block of queries that sees these keys.
    """
    i, j = jnp.arange(queries // block_q)[:, None], jnp.arange(keys // block_kv)
    first_query = first + i * block_q
    runs = j * block_kv < first_query + block_q
    full = (j + 1) * block_kv <= first_query + 1
    if queries_innermost:
        begin = jnp.maximum(j * block_kv - first, 0) // block_q
        fetch = jnp.minimum(jnp.maximum(i, begin), len(i) - 1)
    else:
        fetch = jnp.where(runs, j, 0)
    positions: Any = (first + jnp.arange(queries)).astype(jnp.int32)
    return MaskInfo(
        # One table for all heads, in small integers, since it is in scalar memory.
        data_next=fetch[None].astype(jnp.int16),
        mask_next=None,
        block_mask=jnp.where(runs, jnp.where(full, 2, 1), 0)[None].astype(jnp.int8),
        partial_mask_blocks=None,
        q_sequence=positions,
    )


def _table_of_documents(
    first: jax.Array | int, earliest: jax.Array, keys: int, block_q: int, block_kv: int, *, queries_innermost: bool = False
) -> MaskInfo:
    """Return `_table` for documents: tiles whose keys come before all that the queries see are skipped, too; kinds are 0 and 1.

    `earliest` [queries] is the first key that each query sees in any sequence.
    """
    info: Any = _table(first, len(earliest), keys, block_q, block_kv, queries_innermost=queries_innermost)
    causal = info.block_mask[0] > 0
    begins = earliest.reshape(-1, block_q).min(1)[:, None]
    runs = causal & ((jnp.arange(keys // block_kv) + 1) * block_kv > begins)
    fetch = _next_to_run(runs.T, next_line=0).T if queries_innermost else _next_to_run(runs, next_line=1)
    return info._replace(data_next=fetch[None].astype(jnp.int16), block_mask=runs[None].astype(jnp.int8))


def _next_to_run(runs: jax.Array, next_line: int) -> jax.Array:
    """Return for every step of a row the next that runs, or itself; after the last of these, the first of row + next_line.

    With queries innermost that is the same row, for the next head. Where none runs, it is the row's last step.
    """
    width = runs.shape[1]
    following = jax.lax.cummin(jnp.where(runs, jnp.arange(width), width), axis=1, reverse=True)
    first = jnp.roll(following[:, :1], -next_line, axis=0)
    return jnp.minimum(jnp.where(following < width, following, first), width - 1)
