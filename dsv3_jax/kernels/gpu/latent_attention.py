"""Attention over cached latents on NVIDIA's Hopper GPUs: a Pallas kernel in which 64 rows share each block that is fetched.

The rows of all heads and queries of a sequence, A = T N of them, meet BLOCK tokens at a time. Rows, and the tokens of a
sequence if the batch is small, are cut into parts, until the multiprocessors are all at work; every part has a mixture and a
logarithm of the sum of exponentials, and XLA puts those of a sequence together.

A mixture of 64 rows of 512 columns fills the registers of two warpgroups, so that each has half of the columns. Both compute
all logits and weights, which are then in the registers where the second product needs them: the one does not wait for the
other, and multiplies while the other is at its softmax. Queries and two blocks of latents are all that shared memory has room
for; a block is keys and values at once.
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

from dsv3_jax.kernels.gpu import hopper
from dsv3_jax.kernels.gpu.hopper import (
    BLOCK_K,
    COLUMNS,
    FETCHING,
    SWIZZLED,
    WG_M,
    Pipeline,
    column_numbers,
    constant,
    launch,
    over_tiles,
    row_numbers,
    turned,
    write,
)
from dsv3_jax.kernels.attention import MASKED
from dsv3_jax.kernels.vma import varying_axes, varying_over

BLOCK = 64
"""Tokens at a time."""
SLOTS = 2
"""Blocks in shared memory."""
WIDEST = 576
"""Values of a token and of a query: 72 KiB a block and for the queries, three times, of 227 KiB."""
SMALLEST_PIECE = 16
"""Tokens of the smallest copy: pages, and a contiguous cache, hold a multiple of it."""
COST_OF_PART = 4
"""What a part costs besides its blocks, for queries and results, in blocks."""


class Part(NamedTuple):
    """What one multiprocessor does at a time: some rows, some blocks of tokens."""

    split: Any
    sequence: Any
    rows: Any
    length: Any
    """Tokens of the sequence."""
    first: Any
    """Block."""
    blocks: Any
    """Number of blocks, from 0."""


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
    """Attention over the cached tokens alone; the contract is that of `past_attention_chunked`.

    Args as there, and
      num_sms: multiprocessors of the device; None for those of the GPU that the program is lowered for.
      interpret: None, or parameters of Pallas' GPU interpreter.

    Raises:
      ValueError: for another dtype than bfloat16, for widths and pages that the kernel does not take, and without `num_blocks`
        for another GPU than Hopper.
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
        raise ValueError(f"attention over cached latents by 'pallas_gpu' {reason}; use the backend chunked")
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
    mixed_BAC, lse_BA = _together(mixed_SBAC, lse_SBA)
    return mixed_BAC[:, :A].reshape(B, T, N, C), lse_BA[:, :A].reshape(B, T, N)


def unsupported_reason(C: int, P: int) -> str | None:
    """Why the kernel does not take latents and rotary keys so wide, to be read after its name; None if it does."""
    if C % (FETCHING * BLOCK_K) or P % BLOCK_K:
        return f"takes latents of a multiple of {FETCHING * BLOCK_K} values and rotary keys of {BLOCK_K}, and got {C} and {P}"
    if C > FETCHING * COLUMNS or C + P > WIDEST:
        return f"has room for {WIDEST} values a token, {FETCHING * COLUMNS} of them latent, and got {C} and {P}"
    return None


def number_of_splits(tiles: int, blocks: int, num_blocks: int) -> int:
    """In how many parts the longest sequence is cut: the fewest that take the least time, if all sequences are so long.

    Args:
      tiles: blocks of rows, of all sequences.
      blocks: blocks of tokens that a sequence has room for.
      num_sms: multiprocessors.
    """

    def cost(splits: int) -> int:
        return -(-tiles * splits // num_blocks) * (-(-blocks // splits) + COST_OF_PART)

    return min(range(1, min(blocks, num_blocks) + 1), key=cost)


def _attend(
    arrays: Sequence[jax.Array], scale: float, splits: int, num_blocks: int, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """The mixture and the logarithm of the sum of exponentials of every split: 0 and -inf of an empty one.

    Args as `past_attention_gpu`'s; the arrays are the flat table, lengths, queries [B, A, ...] in whole blocks of rows, pages.
    """
    table, _, q_latent_BAC, _, latent_YZC, rope_YZP = arrays
    (B, A, C), P, page_size, dtype = q_latent_BAC.shape, rope_YZP.shape[2], latent_YZC.shape[1], latent_YZC.dtype
    J, row_blocks, columns = table.shape[0] // B, A // WG_M, C // FETCHING
    piece = math.gcd(page_size, BLOCK)
    # Powers of two, with the scale in their exponent.
    exponent = scale * math.log2(math.e)

    def part_of(index: Any, length_ref: Any) -> Part:
        """Parts with the same tokens come together, so that these are fetched from device memory once."""
        index, row_block = jax.lax.div(index, jnp.int32(row_blocks)), jax.lax.rem(index, jnp.int32(row_blocks))
        b, split = jax.lax.div(index, jnp.int32(splits)), jax.lax.rem(index, jnp.int32(splits))
        length = length_ref[b]
        blocks = jax.lax.div(length + BLOCK - 1, jnp.int32(BLOCK))
        most = jax.lax.div(blocks + splits - 1, jnp.int32(splits))
        first = split * most
        return Part(split, b, pl.ds(row_block * WG_M, WG_M), length, first, jnp.clip(blocks - first, 0, most))

    def after(part: Part, steps: tuple[Any, Any]) -> tuple[Any, Any]:
        """The next part's first steps, of the blocks and of the queries."""
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
                    token = (part.first + k) * BLOCK + begin
                    # The last block may reach beyond the table.
                    j = jnp.minimum(jax.lax.div(token, jnp.int32(page_size)), J - 1)
                    source = table_ref[part.sequence * J + j], pl.ds(jax.lax.rem(token, jnp.int32(page_size)), piece)
                    for ref, smem in ((latent_ref, latent_smem), (rope_ref, rope_smem)):
                        plgpu.copy_gmem_to_smem(ref.at[source], smem.at[slot, pl.ds(begin, piece)], pipe.loaded.at[slot])

            return after(part, steps)

        blocks, parts = over_tiles(B * row_blocks * splits, num_blocks, fetch_part, (0, 0))
        pipe.drain(blocks)
        queries.drain(parts)

    def work(pipe: Pipeline, buffers: Sequence[Any], *refs: Any) -> None:
        q_latent_smem, q_rope_smem, latent_smem, rope_smem, loaded, released = buffers
        queries = Pipeline(loaded, released, stages=1)
        length_ref, (mixed_ref, lse_ref) = refs[1], refs[len(arrays) :]
        warpgroup = jax.lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * columns, columns)

        def zero(slot: Any, own: Any) -> None:
            """Zeroes tokens past the first `own`, in the columns that this warpgroup mixes.

            A zero weight times a NaN would still be NaN. The other warpgroup may be at the logits of these tokens, which are
            masked whatever they are.
            """
            row = row_numbers((BLOCK, BLOCK_K), interpret)

            @pl.loop(0, columns // BLOCK_K)
            def _(i: Any) -> None:
                strip = latent_smem.at[slot, :, pl.ds(warpgroup * columns + i * BLOCK_K, BLOCK_K)]
                strip[...] = jnp.where(row < own, strip[...].astype(jnp.float32), 0.0).astype(dtype)

            plgpu.commit_smem()

        def logits_of(slot: Any) -> jax.Array:
            # Known to be 0, the descriptors of all operands would be kept in registers that there are not.
            only = jax.lax.optimization_barrier(jnp.int32(0))

            def products(accumulator: Any) -> jax.Array:
                plgpu.wgmma(accumulator, q_latent_smem.at[only], turned(latent_smem.at[slot]))
                plgpu.wgmma(accumulator, q_rope_smem.at[only], turned(rope_smem.at[slot]))
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
                    slot, own = pipe.consumer_wait(steps[0] + k), part.length - (part.first + k) * BLOCK
                    pl.when(own < BLOCK)(functools.partial(zero, slot, own))
                    logits = logits_of(slot)
                    pl.when(k == part.blocks - 1)(functools.partial(queries.consumer_release, steps[1]))
                    logits = jnp.where(column_numbers((WG_M, BLOCK), interpret) < own, logits, MASKED)
                    new_top = jnp.maximum(top, logits.max(1))
                    p = jnp.exp2((logits - _columns(new_top, BLOCK)) * exponent)
                    shrink = jnp.exp2((top - new_top) * exponent)
                    mixed[...] = mixed[...] * _columns(shrink, columns)
                    plgpu.wgmma(mixed, p.astype(dtype), latent_smem.at[slot, :, mine])
                    total = total * shrink + p.sum(1)
                    plgpu.wgmma_wait(0)
                    pipe.consumer_release(steps[0] + k)
                    return new_top, total

                start = constant(MASKED, (WG_M,), interpret), constant(0.0, (WG_M,), interpret)
                top, total = jax.lax.fori_loop(0, part.blocks, block, start)
                any_token = part.blocks > 0
                share = jnp.where(any_token, 1 / total, 0.0)
                write(mixed_ref.at[part.split, part.sequence, part.rows, mine], mixed[...] * _columns(share, columns))

                @pl.when(warpgroup == 0)
                def _() -> None:
                    lse = jnp.where(any_token, top * scale + jnp.log(total), -jnp.inf)
                    write(lse_ref.at[part.split, part.sequence, part.rows], lse)

            pl.run_scoped(mix, plgpu.ACC((WG_M, columns), jnp.float32))
            return after(part, steps)

        over_tiles(B * row_blocks * splits, num_blocks, work_on_part, (0, 0))

    scratch = [
        *(plgpu.SMEM((1, WG_M, width), dtype, transforms=SWIZZLED) for width in (C, P)),
        *(plgpu.SMEM((SLOTS, BLOCK, width), dtype, transforms=SWIZZLED) for width in (C, P)),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=FETCHING),
    ]
    mixed_SBAC, lse_SBA = launch(
        fetch,
        work,
        arrays,
        outputs=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((splits, B, A, C), (splits, B, A))],
        scratch=scratch,
        loads=2 * (BLOCK // piece),
        num_blocks=num_blocks,
        name="latent_attention",
        interpret=interpret,
        stages=SLOTS,
    )
    return mixed_SBAC, lse_SBA


def _columns(values: jax.Array, columns: int) -> jax.Array:
    """One value for each row, in all columns."""
    return jax.lax.broadcast_in_dim(values, (values.shape[0], columns), [0])


def _together(mixed_SBAC: jax.Array, lse_SBA: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the splits are together."""
    if mixed_SBAC.shape[0] == 1:
        return mixed_SBAC[0], lse_SBA[0]
    top_BA = lse_SBA.max(0)
    weight_SBA = jnp.where(top_BA > -jnp.inf, jnp.exp(lse_SBA - top_BA), 0)
    total_BA = weight_SBA.sum(0)
    mixed_BAC = (weight_SBA[..., None] * mixed_SBAC).sum(0) / jnp.where(total_BA > 0, total_BA, 1)[..., None]
    return mixed_BAC, top_BA + jnp.log(total_BA)
