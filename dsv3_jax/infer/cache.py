"""How large an engine is: its slots, its pages and its longest sequence, all of it checked before a weight is read."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec, Sharding

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.checks import check
from dsv3_jax.model.mla import CacheMetadata, Latents
from dsv3_jax.model.transformer import stack_sizes
from dsv3_jax.parallel.mesh import BATCH_AXES, current_mesh

DEFAULT_MAX_LENGTH = 4096
SMALLEST_CHUNK = 16


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The numbers of an engine. `Sizes.of` makes them out of what is asked for."""

    num_shards: int
    """Equal parts that slots and pages are split in, as a mesh splits the batch."""
    slots_per_shard: int
    """Sequences that a shard decodes at a time."""
    pages_per_shard: int
    page_size: int
    """Tokens in a page."""
    max_length: int
    """Longest prompt and completion together, in tokens."""
    chunk: int
    """Most tokens of a prompt that a shard works on at a time."""
    drafts: int
    """Tokens that the first MTP depth drafts a step; it yields 1 to drafts + 1 tokens."""

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            check(size >= 1 or name == "drafts", f"{name} is {size}; it must be at least 1")
        check(self.drafts >= 0, f"drafts is {self.drafts}; it cannot be negative, use 0")

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        mesh: Mesh | None = None,
        *,
        max_batch: int = 8,
        max_length: int | None = None,
        drafts: int = 0,
        chunk: int = 512,
        page_size: int | None = None,
        cache_tokens: int | None = None,
    ) -> EngineConfig:
        """The sizes of an engine for a model. Arguments and errors as those of `Engine`."""
        check_sizes(
            max_batch=max_batch,
            max_length=max_length,
            drafts=drafts,
            chunk=chunk,
            page_size=page_size,
            cache_tokens=cache_tokens,
        )
        context = config.max_position_embeddings
        can_draft = config.num_nextn_predict_layers > 0
        check(can_draft or not drafts, f"drafts is {drafts}; the model has no MTP depth to draft with, use 0")
        parts = 1 if mesh is None else mesh.shape["context"]
        check(parts == 1, f"mesh.context is {parts}; inference does not split sequences, use 1")
        shards = num_shards(mesh)
        page_size = (128 if jax.default_backend() == "tpu" else 64) if page_size is None else page_size
        slots = -(-max_batch // shards)
        longest = min(DEFAULT_MAX_LENGTH, context) if max_length is None else max_length
        if cache_tokens is None:
            pages = slots * pages_for(longest, drafts, page_size)
        else:
            pages = cache_tokens // shards // page_size
            room = pages * page_size - _places_beyond(drafts)
            longest = min(longest, room) if max_length is None else longest
            check(
                2 <= longest <= room,
                f"cache_tokens is {cache_tokens}, and in pages of {page_size} for each of {shards} parts of the batch the "
                f"longest sequence it holds has {max(room, 0)} tokens; raise it"
                + ("" if max_length is None else f", or lower max_length ({max_length})"),
            )
        check(2 <= longest <= context, f"max_length is {longest}; it must lie in 2..{context} (max_position_embeddings)")
        return cls(shards, slots, pages, page_size, longest, chunk, drafts)

    @property
    def slots(self) -> int:
        """Sequences decoded at a time, in all shards together."""
        return self.num_shards * self.slots_per_shard

    @property
    def pages(self) -> int:
        """Pages of all shards together."""
        return self.num_shards * self.pages_per_shard

    @property
    def cache_tokens(self) -> int:
        """Tokens that the cache has room for."""
        return self.pages * self.page_size

    @property
    def chunk_sizes(self) -> list[int]:
        """What the chunks of its prompts are padded to."""
        return chunk_sizes(min(self.chunk, self.max_length - 1))

    @property
    def pages_of_one(self) -> int:
        """Most pages of a sequence."""
        return pages_for(self.max_length, self.drafts, self.page_size)


def pages_for(length: int, drafts: int, page_size: int) -> int:
    """Pages that a sequence of `length` tokens can need."""
    return math.ceil((length + _places_beyond(drafts)) / page_size)


def _places_beyond(drafts: int) -> int:
    # A step writes up to 2 n + 1 places from a sequence's last token on.
    return 2 * drafts + 1


def chunk_sizes(longest: int) -> list[int]:
    """What chunks of up to `longest` tokens are padded to."""
    sizes = [SMALLEST_CHUNK]
    while sizes[-1] < longest:
        sizes.append(2 * sizes[-1])
    return sizes


def check_sizes(
    *,
    max_batch: int | None,
    max_length: int | None,
    drafts: int | None,
    chunk: int,
    page_size: int | None,
    cache_tokens: int | None,
) -> None:
    """Raises ValueError for what is wrong with any model. None is what the engine, or the command line, chooses."""
    given = {
        "max_batch": max_batch,
        "max_length": max_length,
        "drafts": drafts,
        "chunk": chunk,
        "page_size": page_size,
        "cache_tokens": cache_tokens,
    }
    for name, size in given.items():
        is_integer = isinstance(size, int) and not isinstance(size, bool)
        check(size is None or is_integer, f"{name} is {size!r}; use an integer")
    check(max_batch is None or max_batch >= 1, f"max_batch is {max_batch}; it must be at least 1")
    check(drafts is None or drafts >= 0, f"drafts is {drafts}; it cannot be negative, use 0")
    is_power = chunk >= SMALLEST_CHUNK and not chunk & (chunk - 1)
    check(is_power, f"chunk is {chunk}; it must be a power of two from {SMALLEST_CHUNK}")
    check(page_size is None or page_size >= 1, f"page_size is {page_size}; it must be at least 1")


# ----------------------------------------------------------------------------------------------------------------------
# The latent cache: for every token and layer the normalised c_kv and the rotated shared key, 576 values as published.


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


def append(cache: Cache, new: dict[str, Latents], metadata: CacheMetadata) -> Cache:
    """The cache with each sequence's T new latents written behind its old ones.

    Args:
      cache: the cache before.
      new: latents of the new tokens, [B, T, ...], of some layers.
      places: pages and lengths of the sequences. What falls on a page that is none of the pool's, or past the table, is not
        written: so do rows pass through that belong to nobody.
    """
    write = _write if current_mesh() is None else jax.shard_map(_write, in_specs=(ROWS, ROWS, ROWS), out_specs=ROWS)

    def written(name: str) -> Latents:
        return Latents(*(write(*pair, metadata) for pair in zip(cache[name], new[name], strict=True)))

    return cache | {name: written(name) for name in new}


def _write(pages_YZX: jax.Array, new_BTX: jax.Array, metadata: Any) -> jax.Array:
    num_pages, page_size = pages_YZX.shape[:2]
    place_BT = metadata.cached_length_B[:, None] + jnp.arange(new_BTX.shape[1])
    page_BT = jnp.take_along_axis(metadata.page_table_BJ, place_BT // page_size, axis=1, mode="fill", fill_value=num_pages)
    return pages_YZX.at[page_BT, place_BT % page_size].set(new_BTX.astype(pages_YZX.dtype), mode="drop")
