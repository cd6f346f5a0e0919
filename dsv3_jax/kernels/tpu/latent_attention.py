"""Attention over cached latents on TPUs: a Pallas kernel through which the pages of each sequence stream once.

The rows of all heads and queries of a sequence, A = T N of them, meet a block of Z tokens at a time: logits [A, Z] on the
matrix unit, the online softmax, and the mixture [A, C] on the matrix unit again. Three things keep that unit busy:

- Blocks are copied to VMEM page by page, explicitly, two blocks ahead of the mixture: a page may be small, a block is not.
- The logits of a block are computed along with the mixture of the one before, which would otherwise wait for its softmax.
- The last block of a sequence prefetches the first one of the next. Only pages with tokens are copied, and a sequence takes as
  many steps as it has blocks, so that the cost of a batch of mixed lengths is that of its tokens.

The rotary keys are narrower than the 128 lanes of a tile. Where pages have a multiple of 128 tokens, XLA lays the tokens along
the lanes, so that no lane is unused, and the kernel reads that layout: pages, or a contiguous cache, should hold a multiple of
128 tokens. Smaller pages work, but XLA copies their rotary keys at every call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.attention import MASKED
from dsv3_jax.kernels.tpu.memory import LANES, check_dtype, sublanes
from dsv3_jax.kernels.vma import shape_beside

LOGITS = 1 << 18
"""Logits of a block, 1 MiB, by the compiler's schedules (docs/log.md): rows times tokens; the tokens have the next bounds."""
SMALLEST_BLOCK, LARGEST_BLOCK = 128, 1024
SLOTS = 3
"""Blocks in VMEM: one for the mixture, one for the logits, one being fetched."""
LARGEST_QUERIES = 3072 * 512
LARGEST_TABLE_BYTES = 900 * 2**10
VMEM_BYTES = 32 << 20
"""The kernel's limit, of 64 MiB or more from v5 on; the compiler's default limit is 16 MiB."""


def past_attention_tpu(
    q_latent_BTNC: jax.Array,
    q_rope_BTNP: jax.Array,
    latent_YZC: jax.Array,
    rope_YZP: jax.Array,
    page_table_BJ: jax.Array | None,
    cached_length_B: jax.Array,
    *,
    scale: float,
    block: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
    """Compute `past_attention_chunked`, attention over the cached tokens alone, by a Pallas kernel on a TPU.

    Args as there, and
      block: tokens of a block, rounded down to whole pages; None for those of `block_tokens`.
      interpret: passed to `pl.pallas_call`, for tests.

    Raises:
      ValueError: for other dtypes than float32 and bfloat16, pages that are not whole tiles, and too many queries or pages.
    """
    B, T, N, C = q_latent_BTNC.shape
    P, A = q_rope_BTNP.shape[-1], T * N
    check_dtype("attention over cached latents by 'pallas_tpu'", latent_YZC.dtype, "model.cache_backend chunked")
    if A * C > LARGEST_QUERIES:
        raise ValueError(
            f"{T} tokens of {N} heads at a time are {A} rows of {C} values; the kernel has room for {LARGEST_QUERIES // C} "
            "rows: verify fewer drafted tokens in a step, or use model.cache_backend chunked"
        )
    block = block or block_tokens(A)
    latent_YZC, page_table_BJ = _in_small_pages(latent_YZC, page_table_BJ, block)
    page_size, J = latent_YZC.shape[1], page_table_BJ.shape[1]
    if page_table_BJ.size * 4 > LARGEST_TABLE_BYTES:
        raise ValueError(
            f"a table of {B} x {J} pages takes {page_table_BJ.size * 4:,} bytes of scalar memory, and there is room for "
            f"{LARGEST_TABLE_BYTES:,}; use larger pages, fewer sequences a device, or model.cache_backend chunked"
        )
    Z = min(max(block // page_size, 1), J) * page_size
    lanes_are_tokens = page_size % LANES == 0
    rope = rope_YZP.swapaxes(1, 2) if lanes_are_tokens else rope_YZP.reshape(-1, page_size, P)

    # Two cores of a device take half of the sequences each; a single core takes one half after the other.
    halves = min(B, 2)
    missing = -B % halves
    queries = (jnp.pad(q.reshape(B, A, -1), ((0, missing), (0, 0), (0, 0))) for q in (q_latent_BTNC, q_rope_BTNP))
    scalars = page_table_BJ.reshape(-1), jnp.pad(cached_length_B, (0, missing))

    def of_sequence(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), lambda half, i, *_: (half * ((B + missing) // halves) + i, 0, 0))

    def out(*shape: int) -> jax.ShapeDtypeStruct:
        return shape_beside(q_latent_BTNC, (B + missing, *shape), jnp.float32)

    pages = pl.BlockSpec(memory_space=pl.ANY)
    mixed_BAC, lse_B1A = pl.pallas_call(
        functools.partial(_kernel, scale=scale, num_pages=J, lanes_are_tokens=lanes_are_tokens),
        out_shape=(out(A, C), out(1, A)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(halves, (B + missing) // halves),
            in_specs=[of_sequence(A, C), of_sequence(A, P), pages, pages],
            out_specs=(of_sequence(A, C), of_sequence(1, A)),
            scratch_shapes=[
                pltpu.VMEM((SLOTS, Z, C), latent_YZC.dtype),
                pltpu.VMEM((SLOTS, P, Z) if lanes_are_tokens else (SLOTS, Z, P), rope.dtype),
                pltpu.VMEM((A, Z), jnp.float32),
                pltpu.VMEM((A, LANES), jnp.float32),
                pltpu.VMEM((A, LANES), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((SLOTS,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            # Checks of every copy's bounds would cost more than the copies; the caller has clipped the table.
            disable_bounds_checks=True,
            vmem_limit_bytes=VMEM_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * B * A * (2 * C + P) * J * page_size,
            transcendentals=B * A * J * page_size,
            bytes_accessed=B * J * page_size * (C + P) * latent_YZC.dtype.itemsize,
        ),
        interpret=interpret,
        name="latent_attention",
    )(*scalars, *queries, latent_YZC, rope)
    return mixed_BAC[:B].reshape(B, T, N, C), lse_B1A[:B].reshape(B, T, N)


def block_tokens(num_rows: int) -> int:
    """Return the tokens of a block for `num_rows` queries times heads: LOGITS / rows, in steps and within bounds."""
    return min(max(LOGITS // num_rows // SMALLEST_BLOCK * SMALLEST_BLOCK, SMALLEST_BLOCK), LARGEST_BLOCK)


def _in_small_pages(latent_YZC: jax.Array, page_table_BJ: jax.Array | None, block: int) -> tuple[jax.Array, jax.Array]:
    """Return latents in pages of at most `block` tokens, and their table, without a copy. ValueError for partial tiles."""
    num_pages, page_size, C = latent_YZC.shape
    rows = sublanes(latent_YZC.dtype)
    if page_size % rows:
        raise ValueError(
            f"pages of {page_size} tokens of {latent_YZC.dtype.name} are no whole tiles of a TPU; choose a page size (of a "
            f"contiguous cache: its capacity) that is a multiple of {rows}, best of {LANES}"
        )
    if page_table_BJ is None:
        page_table_BJ = jnp.arange(num_pages, dtype=jnp.int32)[:, None]
    if page_size <= block:
        return latent_YZC, page_table_BJ
    size = math.gcd(page_size, block)
    part = jnp.arange(page_size // size, dtype=jnp.int32)
    return latent_YZC.reshape(-1, size, C), (page_table_BJ[..., None] * len(part) + part).reshape(page_table_BJ.shape[0], -1)


def _kernel(*refs: Any, scale: float, num_pages: int, lanes_are_tokens: bool) -> None:
    """Write mixture and logarithm of the sum of exponentials of one sequence: body of the kernel, run for each.

    Refs: `table` [B J] and `lengths` [B] scalars; this sequence's queries, mixture and logarithm of the sum of exponentials;
    all pages, in HBM, those of the rotary keys [Y, P, Z] with the cache's own page size if `lanes_are_tokens`. Scratch kept
    from one sequence to the next: the blocks in their slots, the semaphores of their copies, and the slot of this sequence's
    first block. Scratch of this sequence: logits of one block, running maximum and sum of each row, the same in every lane.
    """
    table, lengths, q_latent_1AC, q_rope_1AP, latent_YZC, rope, mixed_1AC, lse_11A, *scratch = refs
    latent_blocks, rope_blocks, logits_AZ, top_A, total_A, first_slot, arrived = scratch
    i, sequences = pl.program_id(1), pl.num_programs(1)
    b = pl.program_id(0) * sequences + i
    page_size, block_size = latent_YZC.shape[1], latent_blocks.shape[1]
    length = lengths[b]
    num_blocks = _ceil(length, block_size)

    @pl.when(i == 0)
    def _start() -> None:
        first_slot[0] = 0

    first = first_slot[0]

    def slot_of(block: Any) -> Any:
        return jax.lax.rem(first + block, SLOTS)

    def rope_page(page: Any) -> Any:
        if not lanes_are_tokens:
            return rope.at[page]
        parts = rope.shape[2] // page_size
        begin = pl.multiple_of(jax.lax.rem(page, parts) * page_size, page_size)
        return rope.at[jax.lax.div(page, parts), :, pl.ds(begin, page_size)]

    def rope_index(slot: Any, tokens: Any) -> tuple:
        return (slot, slice(None), tokens) if lanes_are_tokens else (slot, tokens)

    def each_copy(b: Any, block: Any, slot: Any, act: Callable[[Any], None]) -> None:
        """Call `act` on the copies to `slot` of those pages of the block that hold tokens: starts them or waits for them."""
        filled = _ceil(jnp.maximum(lengths[b] - block * block_size, 0), page_size)
        for j in range(block_size // page_size):

            @pl.when(j < filled)
            def _page(j: int = j) -> None:
                page = table[b * num_pages + block * (block_size // page_size) + j]
                tokens = pl.ds(j * page_size, page_size)
                act(pltpu.make_async_copy(latent_YZC.at[page], latent_blocks.at[slot, tokens], arrived.at[slot]))
                act(pltpu.make_async_copy(rope_page(page), rope_blocks.at[*rope_index(slot, tokens)], arrived.at[slot]))

    def fetch(block: Any) -> None:
        """Start to copy a block of this sequence, or if it is past the last, the first block of the next sequence, if any."""
        own = block < num_blocks

        @pl.when(own | (i + 1 < sequences))
        def _fetch() -> None:
            each_copy(jnp.where(own, b, b + 1), jnp.where(own, block, 0), slot_of(block), lambda copy: copy.start())

    def wait(block: Any) -> None:
        each_copy(b, block, slot_of(block), lambda copy: copy.wait())

    def logits_of(block: Any) -> jax.Array:
        slot = slot_of(block)
        rope_logits = _product(q_rope_1AP[0], rope_blocks[slot], 0 if lanes_are_tokens else 1)
        return _product(q_latent_1AC[0], latent_blocks[slot], 1) + rope_logits

    def mix(block: Any, logits: jax.Array) -> None:
        # Powers of two, with the scale in their exponent: the unit computes these, and the scale costs no product.
        exponent = scale * math.log2(math.e)
        top = top_A[:, :1]
        new_top = jnp.maximum(top, logits.max(1, keepdims=True))
        p = jnp.exp2((logits - new_top) * exponent)
        shrink = jnp.exp2((top - new_top) * exponent)
        top_A[...] = jnp.broadcast_to(new_top, top_A.shape)
        total_A[...] = total_A[...] * shrink + p.sum(1, keepdims=True)
        latent = latent_blocks[slot_of(block)]
        mixed_1AC[0] = mixed_1AC[0] * shrink + _product(p.astype(latent.dtype), latent, 0)

    top_A[...] = jnp.full_like(top_A, MASKED)
    total_A[...] = jnp.zeros_like(total_A)
    mixed_1AC[...] = jnp.zeros_like(mixed_1AC)

    @pl.when(length > 0)
    def _walk() -> None:
        @pl.when((i == 0) | (lengths[jnp.maximum(b - 1, 0)] == 0))
        def _not_prefetched() -> None:
            fetch(0)

        fetch(1)
        wait(0)
        logits_AZ[...] = logits_of(0)

        @pl.loop(0, num_blocks - 1)
        def _block(block: Any) -> None:
            fetch(block + 2)
            wait(block + 1)
            logits = logits_AZ[...]
            ahead = logits_of(block + 1)
            mix(block, logits)
            logits_AZ[...] = ahead

        last = num_blocks - 1
        left, slot = length - last * block_size, slot_of(last)
        # A zero weight times a NaN would still be NaN.
        latent = latent_blocks[slot]
        latent_blocks[slot] = jnp.where(jax.lax.broadcasted_iota(jnp.int32, latent.shape, 0) < left, latent, 0)
        logits = logits_AZ[...]
        mix(last, jnp.where(jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) < left, logits, MASKED))

    first_slot[0] = slot_of(num_blocks)
    total = total_A[:, :1]
    mixed_1AC[0] = mixed_1AC[0] / jnp.where(total > 0, total, 1)
    lse_11A[0] = _as_row(jnp.where(total > 0, top_A[:, :1] * scale + jnp.log(total), -jnp.inf))


def _ceil(size: Any, part: int) -> Any:
    return jax.lax.div(size + part - 1, part)


def _product(left_AX: jax.Array, right: jax.Array, axis: int) -> jax.Array:
    """Return left_AX contracted over X with `axis` of the right side, float32."""
    return jax.lax.dot_general(left_AX, right, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def _as_row(column_A1: jax.Array) -> jax.Array:
    """Transpose [A, 1] to [1, A], without padding to whole tiles."""
    size = column_A1.shape[0]
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return jnp.where(row == column, column_A1, 0).sum(0, keepdims=True)
