"""Attention over a cache of latents in the materialised form: what prefill needs after a prompt's first chunk.

Keys and values of all heads are expanded from the latents (section 2.1.1 of the report, eqs. 1-5), a block of tokens at a
time and up to the longest sequence's end, so that neither they nor the logits of a long prompt ever exist whole. With many
queries this is cheaper than taking each of them into the latent space, as `latent_attention` does. Forward only.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.latent_attention import CachedLatents, blocks_of
from dsv3_jax.kernels.online_softmax import MASKED, Running

_OWN_BLOCK = 512


def expanded_attention(
    kernel_CNX: jax.Array,
    q_nope_BTNH: jax.Array,
    q_rope_BTNP: jax.Array,
    new_latent_BTC: jax.Array,
    new_rope_BTP: jax.Array,
    cached: CachedLatents,
    length_B: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """Attention of T new tokens over the cached latents and, causally, over their own.

    Args:
      kernel_CNX: W_kvb, which expands a latent to every head's key and value, [nope | v].
      q_nope_BTNH, q_rope_BTNP: queries, the second part rotated.
      new_latent_BTC, new_rope_BTP: latents and rotated rotary keys of the new tokens themselves, not in the cache yet.
      cached: the cache. What lies past a sequence's length, and in pages of nobody, is never read as data.
      length_B: int32, tokens in each sequence's cache, from 0.
      scale: positive factor on the logits.

    Returns:
      The mixture of values of every head, [B, T, N, W] in the latents' dtype; logits and softmax are float32.
    """
    T, H = q_nope_BTNH.shape[1], q_nope_BTNH.shape[-1]
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def fold(running: Running, latent_BZC: jax.Array, rope_BZP: jax.Array, seen_BTZ: jax.Array) -> Running:
        k_BZNH, v_BZNW = jnp.split(jnp.einsum("BZC,CNX->BZNX", latent_BZC, kernel_CNX), [H], axis=-1)
        logits = einsum("BTNH,BZNH->BTNZ", q_nope_BTNH, k_BZNH) + einsum("BTNP,BZP->BTNZ", q_rope_BTNP, rope_BZP)
        logits = jnp.where(seen_BTZ[:, :, None], logits * scale, MASKED)
        return running.fold(logits, v_BZNW, "BTNZ,BZNW->BTNW")

    rows = q_nope_BTNH.shape[:3]
    running = Running.of_nothing(q_nope_BTNH, rows, kernel_CNX.shape[2] - H)
    # The queries' own tokens first: each sees itself, so that no row is ever without a logit.
    for first in range(0, T, _OWN_BLOCK):
        own = slice(first, first + _OWN_BLOCK)
        causal_TZ = jnp.arange(T)[:, None] >= jnp.arange(T)[own]
        seen_BTZ = jnp.broadcast_to(causal_TZ, (rows[0], *causal_TZ.shape))
        running = fold(running, new_latent_BTC[:, own], new_rope_BTP[:, own], seen_BTZ)

    take, size = blocks_of(cached)

    def step(i: jax.Array, running: Running) -> Running:
        latent_BZC, rope_BZP, counted_BZ = take(i, length_B)
        return fold(running, latent_BZC, rope_BZP, jnp.broadcast_to(counted_BZ[:, None], (*rows[:2], size)))

    _, total, mixed = jax.lax.fori_loop(0, (length_B.max() + size - 1) // size, step, running)
    return (mixed / total[..., None]).astype(new_latent_BTC.dtype)
