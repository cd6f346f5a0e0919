"""Attention over a cache of latents, as decoding needs it: the absorbed form of MLA (section 2.1.1 of the report).

All heads share one key of 576 values, the cached latent and the rotary key beside it, and one value, the latent alone.
The tokens at hand attend to what is cached, which `latent_attention_tpu.py` and the function here walk block by block, each
in its own way, and to themselves; both parts meet in `latent_attention`.

Axes beyond the project's legend: Y pages, Z tokens of a page or of what is worked on at a time, J pages of a sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.attention import MASKED, OnlineSoftmax
from dsv3_jax.kernels.backend import Backends
from dsv3_jax.kernels.gpu import hopper
from dsv3_jax.kernels.gpu import latent_attention as gpu_latent_attention
from dsv3_jax.kernels.tpu.latent_attention import past_attention_tpu
from dsv3_jax.kernels.vma import varying_alike

# Tokens that the chunked walk takes at a time, in whole pages.
CHUNK = 512


class CachedLatents(NamedTuple):
    """The latents of the tokens so far: pages from a common pool, or one stretch of its own for every sequence."""

    latent_YZC: jax.Array
    """The normalised c_kv, page by page."""
    rope_YZP: jax.Array
    """The rotated shared key."""
    page_table_BJ: jax.Array | None = None
    """int32, the page of the j-th Z tokens of each sequence. Entries past its length may hold anything. None: page b is
    all of sequence b, so that a contiguous cache [B, S, ...] is one."""


_Past = Callable[..., tuple[jax.Array, jax.Array]]


_OPTIONS = Backends(
    "cache_backend",
    auto={"cpu": "chunked", "gpu": "pallas_gpu", "tpu": "pallas_tpu"},
    anywhere=("chunked",),
    only_on={"pallas_tpu": "tpu", "pallas_gpu": "gpu"},
)


def choose_latent_backend(name: str, dtype: Any, widths: tuple[int, int], platform: str | None = None) -> str:
    """The backend of `latent_attention` that `name` stands for.

    Args:
      name: a backend, or "auto".
      dtype: of queries and latents.
      widths: C and P.
      platform: as `choose_backend` for the experts takes it, whose errors this raises, too.
    """
    return _OPTIONS.resolve_backend(
        name,
        platform,
        {"pallas_gpu": lambda: hopper.unsupported_reason(dtype) or gpu_latent_attention.unsupported_reason(*widths)},
    )


def latent_attention(
    q_latent_BTNC: jax.Array,
    q_rope_BTNP: jax.Array,
    new_latent_BTC: jax.Array,
    new_rope_BTP: jax.Array,
    cached: CachedLatents,
    cached_length_B: jax.Array,
    *,
    scale: float,
    backend: str,
) -> jax.Array:
    """Attention of T new tokens over the cached latents and, causally, over their own.

    Args:
      q_latent_BTNC: queries taken into the latent space (q_nope W_UK).
      q_rope_BTNP: rotated rotary queries.
      new_latent_BTC, new_rope_BTP: latents and rotated rotary keys of the new tokens themselves, not in the cache yet.
      cached: the cache. What lies past a sequence's length, and in pages of nobody, is never read as data.
      cached_length_B: int32, tokens in each sequence's cache, from 0; at most what it has room for counts.
      scale: positive factor on the logits.
      backend: a name that `choose_latent_backend` knows.

    Returns:
      The mixture of latents of every head, [B, T, N, C] in the latents' dtype; logits and softmax are float32.

    Raises:
      ValueError: for an unknown backend, and for pages that the backend cannot work with.
    """
    # A backend that is named was chosen for a platform that need not be the default one.
    if backend not in _BACKENDS:
        backend = choose_latent_backend(backend, new_latent_BTC.dtype, (new_latent_BTC.shape[-1], new_rope_BTP.shape[-1]))
    past = _BACKENDS[backend]
    q_latent_BTNC, q_rope_BTNP, new_latent_BTC, new_rope_BTP, cached, cached_length_B = varying_alike(
        q_latent_BTNC, q_rope_BTNP, new_latent_BTC, new_rope_BTP, cached, cached_length_B
    )
    num_pages, page_size = cached.latent_YZC.shape[:2]
    if cached.page_table_BJ is not None:
        cached = cached._replace(page_table_BJ=jnp.clip(cached.page_table_BJ, 0, num_pages - 1))
    room = page_size * (1 if cached.page_table_BJ is None else cached.page_table_BJ.shape[1])
    past_BTNC, past_lse_BTN = past(q_latent_BTNC, q_rope_BTNP, *cached, jnp.clip(cached_length_B, 0, room), scale=scale)

    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    own = einsum("BTNC,BSC->BTNS", q_latent_BTNC, new_latent_BTC) + einsum("BTNP,BSP->BTNS", q_rope_BTNP, new_rope_BTP)
    own_BTNS = jnp.where(jnp.tri(own.shape[1], dtype=bool)[:, None], own * scale, MASKED)
    top_BTN = jnp.maximum(past_lse_BTN, own_BTNS.max(-1))
    p_BTNS = jnp.exp(own_BTNS - top_BTN[..., None])
    weight_BTN = jnp.exp(past_lse_BTN - top_BTN)
    mixed_BTNC = einsum("BTNS,BSC->BTNC", p_BTNS.astype(new_latent_BTC.dtype), new_latent_BTC)
    mixed_BTNC = (mixed_BTNC + weight_BTN[..., None] * past_BTNC) / (weight_BTN + p_BTNS.sum(-1))[..., None]
    return mixed_BTNC.astype(new_latent_BTC.dtype)


def past_attention_chunked(
    q_latent_BTNC: jax.Array,
    q_rope_BTNP: jax.Array,
    latent_YZC: jax.Array,
    rope_YZP: jax.Array,
    page_table_BJ: jax.Array | None,
    cached_length_B: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention over the cached tokens alone, a chunk at a time up to the longest sequence's end, with the online softmax.

    Args as `latent_attention`'s, with every entry of the table in range, every length within it.

    Returns:
      The mixture of latents [B, T, N, C] and the logarithm of the sum of exponentials [B, T, N], both float32. Of a
      sequence without any token they are 0 and -inf.
    """
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    take, size = blocks_of(CachedLatents(latent_YZC, rope_YZP, page_table_BJ))

    def step(i: jax.Array, running: OnlineSoftmax) -> OnlineSoftmax:
        latent_BZC, rope_BZP, token_mask_BZ = take(i, cached_length_B)
        logits = einsum("BTNC,BZC->BTNZ", q_latent_BTNC, latent_BZC) + einsum("BTNP,BZP->BTNZ", q_rope_BTNP, rope_BZP)
        logits = jnp.where(token_mask_BZ[:, None, None], logits * scale, MASKED)
        return running.fold(logits, latent_BZC, "BTNZ,BZC->BTNC")

    start = OnlineSoftmax.empty(q_latent_BTNC, q_latent_BTNC.shape[:3], q_latent_BTNC.shape[3])
    top, total, mixed = jax.lax.fori_loop(0, (cached_length_B.max() + size - 1) // size, step, start)
    any_B = (cached_length_B > 0)[:, None, None]
    total = jnp.where(any_B, total, 1)
    return mixed / total[..., None], jnp.where(any_B, top + jnp.log(total), -jnp.inf)


_Take = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


def blocks_of(cached: CachedLatents) -> tuple[_Take, int]:
    """The cached tokens of every sequence, a block at a time.

    Returns:
      take(i, cached_length_B), which gives the i-th block's latents [B, Z, C] and rotary keys [B, Z, P], and which of them are
      to be counted [B, Z]: not what lies past a sequence's length (there the latents are zero), nor what the block before had.
        And
      the number of tokens in a block.
    """
    slices, size = _rows(cached) if cached.page_table_BJ is None else _pages(cached)

    def take(i: jax.Array, cached_length_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        latent_BZC, rope_BZP, first = slices(i)
        place_Z = first + jnp.arange(size)
        # The last block may begin before its place, among tokens that are counted already.
        token_mask_BZ = (place_Z >= i * size) & (place_Z < cached_length_B[:, None])
        # A zero weight times a NaN would still be NaN.
        return jnp.where(token_mask_BZ[..., None], latent_BZC, 0), rope_BZP, token_mask_BZ

    return take, size


def _rows(cached: CachedLatents) -> tuple[Callable[[jax.Array], tuple], int]:
    """The i-th block of every sequence, and the place of its first token, where each has a row."""
    room = cached.latent_YZC.shape[1]
    size = min(CHUNK, room)

    def slices(i: jax.Array) -> tuple:
        first = jnp.minimum(i * size, room - size)
        latent_BZC, rope_BZP = (jax.lax.dynamic_slice_in_dim(pages, first, size, 1) for pages in cached[:2])
        return latent_BZC, rope_BZP, first

    return slices, size


def _pages(cached: CachedLatents) -> tuple[Callable[[jax.Array], tuple], int]:
    """The same out of pages."""
    assert cached.page_table_BJ is not None
    B, J = cached.page_table_BJ.shape
    num_pages, page_size = cached.latent_YZC.shape[:2]
    count = min(max(CHUNK // page_size, 1), J)
    page_table_BJ = jnp.clip(cached.page_table_BJ, 0, num_pages - 1)

    def slices(i: jax.Array) -> tuple:
        first = jnp.minimum(i * count, J - count)
        at_BJ = jax.lax.dynamic_slice_in_dim(page_table_BJ, first, count, 1)
        latent_BZC, rope_BZP = (pages[at_BJ].reshape(B, count * page_size, -1) for pages in cached[:2])
        return latent_BZC, rope_BZP, first * page_size

    return slices, count * page_size


_BACKENDS: dict[str, _Past] = {
    "pallas_tpu": past_attention_tpu,
    "pallas_gpu": gpu_latent_attention.past_attention_gpu,
    "chunked": past_attention_chunked,
}


# ----------------------------------------------------------------------------------------------------------------------
# Attention over a cache of latents in the materialised form: what prefill needs after a prompt's first chunk.


_OWN_BLOCK = 512


def expanded_attention(
    kernel_CNX: jax.Array,
    q_nope_BTNH: jax.Array,
    q_rope_BTNP: jax.Array,
    new_latent_BTC: jax.Array,
    new_rope_BTP: jax.Array,
    cached: CachedLatents,
    cached_length_B: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """Attention of T new tokens over the cached latents and, causally, over their own.

    Args:
      kernel_CNX: W_kvb, which expands a latent to every head's key and value, [nope | v].
      q_nope_BTNH, q_rope_BTNP: queries, the second part rotated.
      new_latent_BTC, new_rope_BTP: latents and rotated rotary keys of the new tokens themselves, not in the cache yet.
      cached: the cache. What lies past a sequence's length, and in pages of nobody, is never read as data.
      cached_length_B: int32, tokens in each sequence's cache, from 0.
      scale: positive factor on the logits.

    Returns:
      The mixture of values of every head, [B, T, N, W] in the latents' dtype; logits and softmax are float32.
    """
    T, H = q_nope_BTNH.shape[1], q_nope_BTNH.shape[-1]
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def fold(running: OnlineSoftmax, latent_BZC: jax.Array, rope_BZP: jax.Array, seen_BTZ: jax.Array) -> OnlineSoftmax:
        k_BZNH, v_BZNW = jnp.split(jnp.einsum("BZC,CNX->BZNX", latent_BZC, kernel_CNX), [H], axis=-1)
        logits = einsum("BTNH,BZNH->BTNZ", q_nope_BTNH, k_BZNH) + einsum("BTNP,BZP->BTNZ", q_rope_BTNP, rope_BZP)
        logits = jnp.where(seen_BTZ[:, :, None], logits * scale, MASKED)
        return running.fold(logits, v_BZNW, "BTNZ,BZNW->BTNW")

    rows = q_nope_BTNH.shape[:3]
    running = OnlineSoftmax.empty(q_nope_BTNH, rows, kernel_CNX.shape[2] - H)
    # The queries' own tokens first: each sees itself, so that no row is ever without a logit.
    for first in range(0, T, _OWN_BLOCK):
        own = slice(first, first + _OWN_BLOCK)
        causal_TZ = jnp.arange(T)[:, None] >= jnp.arange(T)[own]
        seen_BTZ = jnp.broadcast_to(causal_TZ, (rows[0], *causal_TZ.shape))
        running = fold(running, new_latent_BTC[:, own], new_rope_BTP[:, own], seen_BTZ)

    take, size = blocks_of(cached)

    def step(i: jax.Array, running: OnlineSoftmax) -> OnlineSoftmax:
        latent_BZC, rope_BZP, token_mask_BZ = take(i, cached_length_B)
        return fold(running, latent_BZC, rope_BZP, jnp.broadcast_to(token_mask_BZ[:, None], (*rows[:2], size)))

    _, total, mixed = jax.lax.fori_loop(0, (cached_length_B.max() + size - 1) // size, step, running)
    return (mixed / total[..., None]).astype(new_latent_BTC.dtype)
