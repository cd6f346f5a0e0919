"""Attention over cached latents on Hopper GPUs: a Pallas kernel in which 64 rows share each fetched block of tokens.

The rows of all heads and queries of a sequence, A = T N of them, meet BLOCK tokens at a time. Rows, and the tokens of a
sequence if the batch is small, are cut into parts until all multiprocessors are busy; every part has a mixture and a
logarithm of the sum of exponentials, and XLA combines those of a sequence.

A mixture of 64 rows of 512 columns fills the registers of two warpgroups, so that each has half of the columns. Both compute
all logits and weights, which are then in the registers where the second product needs them: neither waits for the other, and
one multiplies while the other computes its softmax. Queries and two blocks of latents are all that fits in shared memory; a
block is keys and values at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.kernels.attention import MASKED
from dsv3_jax.kernels.gpu import hopper
from dsv3_jax.kernels.gpu.hopper import BLOCK_K, COLUMNS, CONSUMERS, WG_M, Pipeline, swizzled, transposed
from dsv3_jax.kernels.vma import varying_axes, varying_over

BLOCK = 64
"""Cached tokens of a block, read and multiplied at a time."""
SLOTS = 2
"""Blocks of tokens in shared memory."""
WIDEST = 576
"""Largest C + P: 64 rows of it are 72 KiB, for two blocks and the queries, of 227 KiB of shared memory."""
SMALLEST_PIECE = 16
"""Tokens of the smallest copy: pages, and a contiguous cache, hold a multiple of it."""
COST_OF_PART = 4
"""Time of a part for its queries and results, as a number of blocks that take as long."""


class Part(NamedTuple):
    """Unit of work of a multiprocessor: a slice of rows, and `blocks` blocks of a sequence of `length` tokens."""

    split: Any
    sequence: Any
    rows: Any
    length: Any
    first_block: Any
    blocks: Any


def past_attention_gpu(
    q_latent_BTNC: jax.Array,
    q_rope_BTNP: jax.Array,
    latent_YZC: jax.Array,
    rope_YZP: jax.Array,
    page_table_BJ: jax.Array | None,
    cached_length_B: jax.Array,
    *,
    scale: float,
    num_blocks: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Compute `past_attention_chunked`, attention over the cached tokens alone, by a Pallas kernel on a Hopper GPU.

    Args as there, and
      num_blocks: multiprocessors of the device; None for those of the GPU that the program is lowered for.
      interpret: None, or parameters of Pallas' GPU interpreter.

    Raises:
      ValueError: for a dtype other than bfloat16, for widths and pages that the kernel does not take, and without `num_blocks`
        for a GPU other than Hopper.
    """
    B, T, N, C = q_latent_BTNC.shape
    P, A = q_rope_BTNP.shape[-1], T * N
    page_size = latent_YZC.shape[1]
    reason = unsupported_reason(C, P) or (hopper.unsupported_reason(latent_YZC.dtype) if num_blocks is None else None)
    if latent_YZC.dtype != jnp.bfloat16:
        reason = f"multiplies bfloat16, and got {latent_YZC.dtype.name}"
    elif page_size % SMALLEST_PIECE:
        reason = f"takes pages (or a contiguous cache) of a multiple of {SMALLEST_PIECE} tokens, and got {page_size}"
    if reason is not None:
        raise ValueError(f"attention over the cache by 'pallas_gpu' cannot run: it {reason}; use model.cache_backend chunked")
    num_blocks = num_blocks or hopper.current_gpu().num_blocks
    if page_table_BJ is None:
        page_table_BJ = varying_over(jnp.arange(B, dtype=jnp.int32)[:, None], varying_axes(cached_length_B))
    J = page_table_BJ.shape[1]
    row_blocks = -(-A // WG_M)
    splits = number_of_splits(B * row_blocks, -(-J * page_size // BLOCK), num_blocks)

    missing = row_blocks * WG_M - A
    queries = [jnp.pad(q.reshape(B, A, -1), ((0, 0), (0, missing), (0, 0))) for q in (q_latent_BTNC, q_rope_BTNP)]
    arrays = [page_table_BJ.reshape(-1), cached_length_B, *queries, latent_YZC, rope_YZP]
    mixed_SBAC, lse_SBA = _attend(arrays, scale, splits, num_blocks, interpret)
    mixed_BAC, lse_BA = _combine(mixed_SBAC, lse_SBA)
    return mixed_BAC[:, :A].reshape(B, T, N, C), lse_BA[:, :A].reshape(B, T, N)


def unsupported_reason(C: int, P: int) -> str | None:
    """Return why the kernel does not take these widths, as a predicate ("takes ..., and got 96"); None if it does."""
    if C % (CONSUMERS * BLOCK_K) or P % BLOCK_K:
        return f"takes latents of a multiple of {CONSUMERS * BLOCK_K} values and rotary keys of {BLOCK_K}, and got {C} and {P}"
    if C > CONSUMERS * COLUMNS or C + P > WIDEST:
        return f"has room for {WIDEST} values a token, {CONSUMERS * COLUMNS} of them latent, and got {C} and {P}"
    return None


def number_of_splits(tiles: int, blocks: int, num_blocks: int) -> int:
    """Return the number of parts to cut each sequence into: the fewest that take the least time if all sequences are full.

    There are `tiles` blocks of rows, of all sequences; a sequence has room for `blocks` blocks of tokens.
    """

    def cost(splits: int) -> int:
        return -(-tiles * splits // num_blocks) * (-(-blocks // splits) + COST_OF_PART)

    return min(range(1, min(blocks, num_blocks) + 1), key=cost)


def _attend(arrays: Sequence[jax.Array], scale: float, splits: int, num_blocks: int, interpret: Any) -> list[jax.Array]:
    """Return mixture [S, B, A, C] and logarithm of the sum of exponentials [S, B, A] of S splits: 0 and -inf for empty ones.

    Args as `past_attention_gpu`'s; the arrays are the flat table, lengths, queries [B, A, ...] in whole blocks of rows, pages.
    """
    table, _, q_latent_BAC, _, latent_YZC, rope_YZP = arrays
    (B, A, C), P, page_size, dtype = q_latent_BAC.shape, rope_YZP.shape[2], latent_YZC.shape[1], latent_YZC.dtype
    J, row_blocks, columns = table.shape[0] // B, A // WG_M, C // CONSUMERS
    piece = math.gcd(page_size, BLOCK)
    # Powers of two, with the scale in their exponent.
    exponent = scale * math.log2(math.e)

    def part_of(index: Any, length_ref: Any) -> Part:
        """Return part `index`. Parts with the same tokens are consecutive, so that these come from device memory once."""
        index, row_block = jax.lax.div(index, jnp.int32(row_blocks)), jax.lax.rem(index, jnp.int32(row_blocks))
        b, split = jax.lax.div(index, jnp.int32(splits)), jax.lax.rem(index, jnp.int32(splits))
        length = length_ref[b]
        blocks = jax.lax.div(length + BLOCK - 1, jnp.int32(BLOCK))
        most = jax.lax.div(blocks + splits - 1, jnp.int32(splits))
        first = split * most
        return Part(split, b, pl.ds(row_block * WG_M, WG_M), length, first, jnp.clip(blocks - first, 0, most))

    def after(part: Part, steps: tuple[Any, Any]) -> tuple[Any, Any]:
        """Return the pair of the next part's first steps in the two pipelines, of blocks and of queries."""
        return steps[0] + part.blocks, steps[1] + jnp.minimum(part.blocks, 1)

    def fetch(pipe: Pipeline, buffers: Sequence[Any], *refs: Any) -> None:
        *query_smems, latent_smem, rope_smem, loaded, released = buffers
        queries = Pipeline(loaded, released, stages=1)
        table_ref, length_ref, *query_refs, latent_ref, rope_ref = refs[: len(arrays)]

        def fetch_part(index: Any, steps: tuple[Any, Any]) -> tuple[Any, Any]:
            part = part_of(index, length_ref)

            @pl.when(part.blocks > 0)
            def _() -> None:
                slot = queries.producer_acquire(steps[1])
                for ref, smem in zip(query_refs, query_smems, strict=True):
                    plgpu.copy_gmem_to_smem(ref.at[part.sequence, part.rows], smem.at[slot], queries.loaded)

            @pl.loop(0, part.blocks)
            def _(k: Any) -> None:
                slot = pipe.producer_acquire(steps[0] + k)
                for begin in range(0, BLOCK, piece):
                    token = (part.first_block + k) * BLOCK + begin
                    # The last block may reach beyond the table.
                    j = jnp.minimum(jax.lax.div(token, jnp.int32(page_size)), J - 1)
                    source = table_ref[part.sequence * J + j], pl.ds(jax.lax.rem(token, jnp.int32(page_size)), piece)
                    for ref, smem in ((latent_ref, latent_smem), (rope_ref, rope_smem)):
                        plgpu.copy_gmem_to_smem(ref.at[source], smem.at[slot, pl.ds(begin, piece)], pipe.loaded.at[slot])

            return after(part, steps)

        blocks, parts = hopper.for_each_tile(B * row_blocks * splits, num_blocks, fetch_part, (0, 0))
        pipe.drain(blocks)
        queries.drain(parts)

    def work(pipe: Pipeline, buffers: Sequence[Any], *refs: Any) -> None:
        q_latent_smem, q_rope_smem, latent_smem, rope_smem, loaded, released = buffers
        queries = Pipeline(loaded, released, stages=1)
        length_ref, (mixed_ref, lse_ref) = refs[1], refs[len(arrays) :]
        warpgroup = jax.lax.axis_index("warpgroup")
        own_columns = pl.ds(warpgroup * columns, columns)

        def zero(slot: Any, own: Any) -> None:
            """Zero tokens past the first `own`, in the columns that this warpgroup mixes: zero times NaN would be NaN.

            The other warpgroup may be computing the logits of these tokens, which are masked in any case.
            """
            row = hopper.iota((BLOCK, BLOCK_K), 0, interpret)

            @pl.loop(0, columns // BLOCK_K)
            def _(i: Any) -> None:
                strip = latent_smem.at[slot, :, pl.ds(warpgroup * columns + i * BLOCK_K, BLOCK_K)]
                strip[...] = jnp.where(row < own, strip[...].astype(jnp.float32), 0.0).astype(dtype)

            plgpu.commit_smem()

        def logits_of(slot: Any) -> jax.Array:
            # With an index known to be 0, the descriptors of all operands would stay in registers, of which there are too few.
            only = jax.lax.optimization_barrier(jnp.int32(0))

            def products(accumulator: Any) -> jax.Array:
                plgpu.wgmma(accumulator, q_latent_smem.at[only], transposed(latent_smem.at[slot]))
                plgpu.wgmma(accumulator, q_rope_smem.at[only], transposed(rope_smem.at[slot]))
                return accumulator[...]

            return pl.run_scoped(products, plgpu.ACC((WG_M, BLOCK), jnp.float32))

        def work_on_part(index: Any, steps: tuple[Any, Any]) -> tuple[Any, Any]:
            part = part_of(index, length_ref)

            @pl.when(part.blocks > 0)
            def _() -> None:
                queries.consumer_wait(steps[1])

            def mix(mixed: Any) -> None:
                def block(k: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                    top, total = carry
                    slot, own = pipe.consumer_wait(steps[0] + k), part.length - (part.first_block + k) * BLOCK
                    pl.when(own < BLOCK)(functools.partial(zero, slot, own))
                    logits = logits_of(slot)
                    pl.when(k == part.blocks - 1)(functools.partial(queries.consumer_release, steps[1]))
                    logits = jnp.where(hopper.iota((WG_M, BLOCK), 1, interpret) < own, logits, MASKED)
                    new_top = jnp.maximum(top, logits.max(1))
                    p = jnp.exp2((logits - _columns(new_top, BLOCK)) * exponent)
                    shrink = jnp.exp2((top - new_top) * exponent)
                    mixed[...] = mixed[...] * _columns(shrink, columns)
                    plgpu.wgmma(mixed, p.astype(dtype), latent_smem.at[slot, :, own_columns])
                    total = total * shrink + p.sum(1)
                    plgpu.wgmma_wait(0)
                    pipe.consumer_release(steps[0] + k)
                    return new_top, total

                start = hopper.constant(MASKED, (WG_M,), interpret), hopper.constant(0.0, (WG_M,), interpret)
                top, total = jax.lax.fori_loop(0, part.blocks, block, start)
                any_token = part.blocks > 0
                share = jnp.where(any_token, 1 / total, 0.0)
                destination = mixed_ref.at[part.split, part.sequence, part.rows, own_columns]
                hopper.write(destination, mixed[...] * _columns(share, columns))

                @pl.when(warpgroup == 0)
                def _() -> None:
                    lse = jnp.where(any_token, top * scale + jnp.log(total), -jnp.inf)
                    hopper.write(lse_ref.at[part.split, part.sequence, part.rows], lse)

            pl.run_scoped(mix, plgpu.ACC((WG_M, columns), jnp.float32))
            return after(part, steps)

        hopper.for_each_tile(B * row_blocks * splits, num_blocks, work_on_part, (0, 0))

    return hopper.launch(
        fetch,
        work,
        arrays,
        outputs=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((splits, B, A, C), (splits, B, A))],
        scratch=[
            *(swizzled(1, WG_M, width) for width in (C, P)),
            *(swizzled(SLOTS, BLOCK, width) for width in (C, P)),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=CONSUMERS),
        ],
        loads=2 * (BLOCK // piece),
        num_blocks=num_blocks,
        name="latent_attention",
        interpret=interpret,
        stages=SLOTS,
    )


def _columns(values: jax.Array, columns: int) -> jax.Array:
    """Broadcast one value for each row to all columns: [rows] to [rows, columns]."""
    return jax.lax.broadcast_in_dim(values, (values.shape[0], columns), [0])


def _combine(mixed_SBAC: jax.Array, lse_SBA: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Combine the splits into mixture [B, A, C] and logarithm of the sum of exponentials [B, A]: 0 and -inf without tokens."""
    if mixed_SBAC.shape[0] == 1:
        return mixed_SBAC[0], lse_SBA[0]
    top_BA = lse_SBA.max(0)
    weight_SBA = jnp.where(top_BA > -jnp.inf, jnp.exp(lse_SBA - top_BA), 0)
    total_BA = weight_SBA.sum(0)
    mixed_BAC = (weight_SBA[..., None] * mixed_SBAC).sum(0) / jnp.where(total_BA > 0, total_BA, 1)[..., None]
    return mixed_BAC, top_BA + jnp.log(total_BA)
