"""Sizes of an engine (slots, pages, longest sequence), checked before weights are read, and its paged latent cache."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec, Sharding

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.checks import NonNegativeInt, PositiveInt, check, check_fields, check_value
from dsv3_jax.model.mla import CacheMetadata, Latents
from dsv3_jax.model.transformer import stack_sizes
from dsv3_jax.parallel.mesh import BATCH_AXES, current_mesh

DEFAULT_MAX_LENGTH = 4096
SMALLEST_CHUNK = 16
ENGINE_FIELDS = "max_batch", "max_length", "drafts", "chunk", "page_size", "cache_tokens"
"""Names of the size arguments of `Engine`, `EngineConfig.of` and the command line, in the order that `check_sizes` takes."""


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine, complete and checked; `EngineConfig.of` derives them from the arguments of `Engine`."""

    num_shards: PositiveInt
    """Number of equal parts that the mesh splits slots and pages into; 1 without a mesh."""
    slots_per_shard: PositiveInt
    """Most sequences that one shard decodes at a time."""
    pages_per_shard: PositiveInt
    page_size: PositiveInt
    """Tokens in a page."""
    max_length: PositiveInt
    """Longest prompt and completion together, in tokens."""
    chunk: PositiveInt
    """Most tokens of a prompt that a shard prefills in one step."""
    drafts: NonNegativeInt
    """Tokens that the first MTP depth drafts in a step, which yields 1 to drafts + 1 tokens."""

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        mesh: Mesh | None = None,
        max_batch: int = 8,
        max_length: int | None = None,
        drafts: int = 0,
        chunk: int = 512,
        page_size: int | None = None,
        cache_tokens: int | None = None,
    ) -> EngineConfig:
        """Derive the sizes from arguments of `Engine`, of which None is a default. Raises ValueError for impossible ones."""
        check_sizes(max_batch, max_length, drafts, chunk, page_size, cache_tokens)
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
            room = pages * page_size - _lookahead(drafts)
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
        """Most sequences decoded at a time, over all shards."""
        return self.num_shards * self.slots_per_shard

    @property
    def pages(self) -> int:
        """Number of pages in the cache, over all shards."""
        return self.num_shards * self.pages_per_shard

    @property
    def cache_tokens(self) -> int:
        """Capacity of the cache over all shards, in tokens."""
        return self.pages * self.page_size

    @property
    def chunk_sizes(self) -> list[int]:
        """Lengths in tokens that chunks of prompts are padded to, ascending: 16, 32, ..."""
        return chunk_sizes(min(self.chunk, self.max_length - 1))

    @property
    def pages_of_one(self) -> int:
        """Most pages that one sequence may need, which is the width of a page table."""
        return pages_for(self.max_length, self.drafts, self.page_size)


def pages_for(length: int, drafts: int, page_size: int) -> int:
    """Return the number of pages for `length` tokens and for the positions past the last one that a step may write."""
    return math.ceil((length + _lookahead(drafts)) / page_size)


def _lookahead(drafts: int) -> int:
    """Return the number of positions that a step may write, from that of a sequence's last token on."""
    return 2 * drafts + 1


def chunk_sizes(longest: int) -> list[int]:
    """Return the lengths that chunks of up to `longest` tokens are padded to: 16, 32, ..., the last at least `longest`."""
    sizes = [SMALLEST_CHUNK]
    while sizes[-1] < longest:
        sizes.append(2 * sizes[-1])
    return sizes


def check_sizes(*sizes: int | None) -> None:
    """Raise ValueError if one of the sizes, in the order of `ENGINE_FIELDS`, is invalid for every model; None is accepted."""
    for name, size in zip(ENGINE_FIELDS, sizes, strict=True):
        check_value(name, size, (NonNegativeInt if name == "drafts" else PositiveInt) | None)
        if name == "chunk" and size is not None:
            check(size in chunk_sizes(size), f"chunk is {size}; it must be a power of two from {SMALLEST_CHUNK}")


# ----------------------------------------------------------------------------------------------------------------------
# The latent cache: the normalised c_kv and the rotated shared key of every token and layer, 576 values in DeepSeek-V3.


Cache = dict[str, Latents]
"""Pages by layer (`moe_layers_0`, ..., and `mtp_0` for drafting): c_kv [Y, Z, C], k_rope [Y, Z, P], Y pages of Z tokens."""

DRAFTER = "mtp_0"
ROWS = PartitionSpec(BATCH_AXES)
"""PartitionSpec that splits the first axis, of pages or of sequences, over the batch axes of the mesh."""


def cached_layers(config: ModelConfig, drafting: bool) -> list[str]:
    """Return the layers' names in the cache, bottom first: `dense_layers_0`, ..., `moe_layers_0`, ..., if drafting `mtp_0`."""
    names = [f"{name}_{i}" for name, size in stack_sizes(config).items() for i in range(size)]
    return [*names, DRAFTER] if drafting else names


def bytes_per_token(config: ModelConfig, drafting: bool) -> int:
    """Return the bytes that one token takes in the cache: C + P values in each of `cached_layers`."""
    values = config.kv_lora_rank + config.qk_rope_head_dim
    return len(cached_layers(config, drafting)) * values * jnp.dtype(config.dtype).itemsize


def empty_cache(
    config: ModelConfig, num_pages: int, page_size: int, *, drafting: bool = False, sharding: Sharding | None = None
) -> Cache:
    """Return a cache of zeros in the computation dtype.

    `num_pages` counts the pages of all shards, which `sharding` splits; `drafting` adds a layer for the first MTP depth.
    """

    def pages(width: int) -> jax.Array:
        return jnp.zeros((num_pages, page_size, width), config.dtype)

    def make() -> Cache:
        layers = cached_layers(config, drafting)
        return {name: Latents(pages(config.kv_lora_rank), pages(config.qk_rope_head_dim)) for name in layers}

    return jax.jit(make, out_shardings=sharding)()


def num_shards(mesh: Mesh | None) -> int:
    """Return the number of parts that a mesh splits sequences and pages into (data * fsdp * expert); 1 without one."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def append(cache: Cache, new: dict[str, Latents], metadata: CacheMetadata) -> Cache:
    """Return the cache with each sequence's T new latents, [B, T, ...] of some layers, written after its cached ones.

    Writes past the page table, or to a page number outside the pool as in rows without a sequence, are dropped.
    """
    write = _write if current_mesh() is None else jax.shard_map(_write, in_specs=(ROWS, ROWS, ROWS), out_specs=ROWS)

    def written(pages: Latents, latents: Latents) -> Latents:
        return Latents(write(pages.c_kv, latents.c_kv, metadata), write(pages.k_rope, latents.k_rope, metadata))

    return cache | {name: written(cache[name], latents) for name, latents in new.items()}


def _write(pages_YZX: jax.Array, new_BTX: jax.Array, metadata: CacheMetadata) -> jax.Array:
    num_pages, page_size = pages_YZX.shape[:2]
    assert metadata.page_table_BJ is not None
    position_BT = metadata.cached_length_B[:, None] + jnp.arange(new_BTX.shape[1])
    page_BT = jnp.take_along_axis(metadata.page_table_BJ, position_BT // page_size, axis=1, mode="fill", fill_value=num_pages)
    return pages_YZX.at[page_BT, position_BT % page_size].set(new_BTX.astype(pages_YZX.dtype), mode="drop")
