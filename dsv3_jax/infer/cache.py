"""The latent cache: for every token and layer the normalised c_kv and the rotated shared key, 576 values as published.

Contiguous: each sequence of the batch owns a row of `capacity` places. Laid out per layer, for the unrolled model.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.mla import Latents
from dsv3_jax.model.stack import stack_sizes


@struct.dataclass
class Cache:
    """Latents of the tokens so far."""

    layers: dict[str, Latents]
    """By layer name (`moe_layers_0`, ...): c_kv [B, S, C] and k_rope [B, S, P]."""
    length_B: jax.Array
    """Filled places of each sequence, int32."""


def empty_cache(config: ModelConfig, batch: int, capacity: int) -> Cache:
    """A cache of `capacity` tokens for each of `batch` sequences, in the computation dtype."""
    names = [f"{name}_{i}" for name, size in stack_sizes(config).items() for i in range(size)]

    def places(width: int) -> jax.Array:
        return jnp.zeros((batch, capacity, width), config.dtype)

    layers = {name: Latents(places(config.kv_lora_rank), places(config.qk_rope_head_dim)) for name in names}
    return Cache(layers, jnp.zeros(batch, jnp.int32))


def append(cache: Cache, new: dict[str, Latents], count_B: jax.Array) -> Cache:
    """The cache with each sequence's T new latents written behind its old ones.

    Args:
      cache: the cache before; what it has no room for is dropped (sequences that have ended still pass through).
      new: latents of the new tokens, [B, T, ...] by layer.
      count_B: how many of the T are real; those after are written too, and overwritten by the next call.
    """

    def write(old_BSX: jax.Array, new_BTX: jax.Array) -> jax.Array:
        place_BT = cache.length_B[:, None] + jnp.arange(new_BTX.shape[1])
        row_B1 = jnp.arange(new_BTX.shape[0])[:, None]
        return old_BSX.at[row_B1, place_BT].set(new_BTX.astype(old_BSX.dtype), mode="drop")

    return Cache(jax.tree.map(write, cache.layers, new), cache.length_B + count_B)
