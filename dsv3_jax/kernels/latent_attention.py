"""Attention over a cache of latents: absorbed for decoding (section 2.1.1 of the report), materialised for prefill.

In the absorbed form all heads share one key of 576 values, the cached latent followed by the rotary key, and one value, the
latent alone. New tokens attend to the cached ones, which each backend walks block by block in its own way, and to
themselves; `latent_attention` combines both parts.

Axes beyond the project's legend: Y pages, Z tokens of a page or of a block, J pages of a sequence.
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

CHUNK = 512
"""Cached tokens that "chunked" reads at a time, rounded down to whole pages, but at least one page."""


class CachedLatents(NamedTuple):
    """Cache of one layer: pages of tokens in a pool that all sequences share, or one contiguous row for every sequence."""

    latent_YZC: jax.Array
    """The normalised latents c_kv, by page and token in it."""
    rope_YZP: jax.Array
    """The rotated rotary keys that all heads share."""
    page_table_BJ: jax.Array | None = None
    """int32, the page of the j-th Z tokens of each sequence. Entries past its length may hold anything. None: a contiguous
    cache [B, S, ...], in which page b is all of sequence b."""


_OPTIONS = Backends(
    "cache_backend",
    auto={"cpu": "chunked", "gpu": "pallas_gpu", "tpu": "pallas_tpu"},
    anywhere=("chunked",),
    only_on={"pallas_tpu": "tpu", "pallas_gpu": "gpu"},
)


def choose_latent_backend(name: str, dtype: Any, widths: tuple[int, int], platform: str | None = None) -> str:
    """Return the backend of `latent_attention` that `name` stands for; "auto" depends on platform, dtype and widths.

    Args and errors as `experts.choose_backend`'s; and `widths`, (C, P): the values of a latent and of a rotary key.
    """
    reasons = {"pallas_gpu": lambda: hopper.unsupported_reason(dtype) or gpu_latent_attention.unsupported_reason(*widths)}
    return _OPTIONS.resolve_backend(name, platform, reasons)


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
    """Compute absorbed attention of T new tokens over the cached latents and, causally, over their own.

    Args:
      q_latent_BTNC: queries projected into the latent space (q_nope W_UK).
      q_rope_BTNP: rotated rotary queries.
      new_latent_BTC, new_rope_BTP: latents and rotated rotary keys of the new tokens, not in the cache yet.
      cached: the cache. Values past a sequence's length, and in unused pages, have no effect.
      cached_length_B: int32, tokens in each sequence's cache, from 0; clipped to its capacity.
      scale: positive factor on the logits.
      backend: "auto", or a name that `choose_latent_backend` returns, which is not checked against the platform.

    Returns:
      The mixture of latents of every head, [B, T, N, C] in the latents' dtype; logits and softmax are float32.

    Raises:
      ValueError: for an unknown backend; and for dtypes, widths or pages that the backend does not take.
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
    """Compute absorbed attention over the cached tokens alone, block by block up to the longest sequence's end.

    Args as `latent_attention`'s, with all table entries and lengths in range.

    Returns:
      The mixture of latents [B, T, N, C] and the logarithm of the sum of exponentials [B, T, N], both float32. For a
      sequence without tokens they are 0 and -inf.
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
    """Return `take`, which reads one block of every sequence's cached tokens, and the number of tokens Z in a block.

    take(i, cached_length_B) returns the i-th block's latents [B, Z, C] and rotary keys [B, Z, P], and a mask [B, Z] of the
    tokens to count: within the sequence's length, and not in an earlier block. Latents of all other tokens are zero.
    """
    num_pages, page_size = cached.latent_YZC.shape[:2]
    if cached.page_table_BJ is None:
        capacity = page_size
        count = size = min(CHUNK, capacity)
    else:
        B, capacity = cached.page_table_BJ.shape
        count = min(max(CHUNK // page_size, 1), capacity)
        size = count * page_size
        page_table_BJ = jnp.clip(cached.page_table_BJ, 0, num_pages - 1)

    def take(i: jax.Array, cached_length_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        # The last block may begin earlier, among tokens that are counted already.
        first = jnp.minimum(i * count, capacity - count)
        if cached.page_table_BJ is None:
            latent_BZC, rope_BZP = (jax.lax.dynamic_slice_in_dim(rows, first, size, 1) for rows in cached[:2])
        else:
            pages = jax.lax.dynamic_slice_in_dim(page_table_BJ, first, count, 1)
            latent_BZC, rope_BZP = (pool[pages].reshape(B, size, -1) for pool in cached[:2])
            first *= page_size
        position_Z = first + jnp.arange(size)
        token_mask_BZ = (position_Z >= i * size) & (position_Z < cached_length_B[:, None])
        # A zero weight times a NaN would still be NaN.
        return jnp.where(token_mask_BZ[..., None], latent_BZC, 0), rope_BZP, token_mask_BZ

    return take, size


_BACKENDS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "pallas_tpu": past_attention_tpu,
    "pallas_gpu": gpu_latent_attention.past_attention_gpu,
    "chunked": past_attention_chunked,
}


# ----------------------------------------------------------------------------------------------------------------------
# The materialised form, for prefill after a prompt's first chunk


_OWN_BLOCK = 512
"""New tokens that `expanded_attention` adds at a time."""


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
    """Compute materialised attention of T new tokens over the cached latents and, causally, over their own.

    Args as `latent_attention`'s, and
      kernel_CNX: W_kvb, which expands a latent to every head's key and value, [nope | v].
      q_nope_BTNH, q_rope_BTNP: queries, the second part rotated.

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
    # The new tokens first: each sees itself, so that every row has a logit from the start.
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
