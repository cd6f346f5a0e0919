"""The latent cache: for every token and layer the normalised c_kv and the rotated shared key, 576 values as published.

Paged: a pool of pages of `page_size` tokens for each layer, and a table that says which pages hold a sequence. One table serves
all layers. On a mesh pages are split like the batch, and a table's numbers are those of its own device's pages. The first MTP
depth, where it drafts, has latents like any other layer; row i of it knows token i + 1.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec, Sharding

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.mla import Latents, Places
from dsv3_jax.model.transformer import stack_sizes
from dsv3_jax.parallel.mesh import BATCH_AXES, current_mesh

Cache = dict[str, Latents]
"""Pages by layer (`moe_layers_0`, ..., and `mtp_0` where it drafts): c_kv [Y, Z, C], k_rope [Y, Z, P], Y pages of Z tokens."""

DRAFTER = "mtp_0"
ROWS = PartitionSpec(BATCH_AXES)
"""Pages, and whatever has one row for each sequence."""


def cached_layers(config: ModelConfig, drafting: bool) -> list[str]:
    """The layers with a cache, bottom first."""
    names = [f"{name}_{i}" for name, size in stack_sizes(config).items() for i in range(size)]
    return [*names, DRAFTER] if drafting else names


def bytes_per_token(config: ModelConfig, drafting: bool) -> int:
    """Bytes that a token takes in the cache: (C + P) values a layer."""
    values = config.kv_lora_rank + config.qk_rope_head_dim
    return len(cached_layers(config, drafting)) * values * jnp.dtype(config.dtype).itemsize


def empty_cache(
    config: ModelConfig, num_pages: int, page_size: int, *, drafting: bool = False, sharding: Sharding | None = None
) -> Cache:
    """A cache of zeros in the computation dtype.

    Args:
      config: the architecture.
      num_pages: pages, of all devices together.
      page_size: tokens in a page.
      drafting: with a layer for the first MTP depth.
      sharding: where it lies; on a mesh pages are split over the batch axes, by ROWS.
    """

    def make() -> Cache:
        def pages(width: int) -> jax.Array:
            return jnp.zeros((num_pages, page_size, width), config.dtype)

        layers = cached_layers(config, drafting)
        return {name: Latents(pages(config.kv_lora_rank), pages(config.qk_rope_head_dim)) for name in layers}

    return jax.jit(make, out_shardings=sharding)()


def num_shards(mesh: Mesh | None) -> int:
    """In how many parts sequences and pages are split."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def append(cache: Cache, new: dict[str, Latents], places: Places) -> Cache:
    """The cache with each sequence's T new latents written behind its old ones.

    Args:
      cache: the cache before.
      new: latents of the new tokens, [B, T, ...], of some layers.
      places: pages and lengths of the sequences. What falls on a page that is none of the pool's, or past the table, is not
        written: so do rows pass through that belong to nobody.
    """
    write = _write if current_mesh() is None else jax.shard_map(_write, in_specs=(ROWS, ROWS, ROWS), out_specs=ROWS)

    def written(name: str) -> Latents:
        return Latents(*(write(*pair, places) for pair in zip(cache[name], new[name], strict=True)))

    return cache | {name: written(name) for name in new}


def _write(pages_YZX: jax.Array, new_BTX: jax.Array, places: Any) -> jax.Array:
    num_pages, page_size = pages_YZX.shape[:2]
    place_BT = places.length_B[:, None] + jnp.arange(new_BTX.shape[1])
    page_BT = jnp.take_along_axis(places.table_BJ, place_BT // page_size, axis=1, mode="fill", fill_value=num_pages)
    return pages_YZX.at[page_BT, place_BT % page_size].set(new_BTX.astype(pages_YZX.dtype), mode="drop")
