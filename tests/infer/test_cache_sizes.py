"""The sizes of an engine: what is worked out, and what no engine can have."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dsv3_jax.config import MeshConfig
from dsv3_jax.infer.cache import EngineConfig, chunk_sizes
from dsv3_jax.parallel.mesh import make_mesh
from tests.model.tiny import CONFIG, DENSE_ONLY

CONTEXT = 64
MODEL = dataclasses.replace(CONFIG, max_position_embeddings=CONTEXT)


def test_what_is_not_given_is_worked_out() -> None:
    sizes = EngineConfig.of(MODEL)
    assert sizes == EngineConfig(1, slots_per_shard=8, pages_per_shard=16, page_size=64, max_length=64, chunk=512, drafts=0)
    # 64 tokens, and the place that a step writes beyond them.
    assert (sizes.slots, sizes.pages_of_one, sizes.pages, sizes.cache_tokens) == (8, 2, 16, 1024)
    long = dataclasses.replace(MODEL, max_position_embeddings=5000)
    assert (EngineConfig.of(long).max_length, EngineConfig.of(long, max_length=5000).max_length) == (4096, 5000)


@pytest.mark.parametrize(("drafts", "pages"), [(0, 7), (1, 7), (2, 8)])
def test_a_sequence_has_room_for_what_a_step_writes_beyond_it(drafts: int, pages: int) -> None:
    assert EngineConfig.of(MODEL, max_length=53, drafts=drafts, page_size=8).pages_of_one == pages


def test_slots_and_pages_are_split_over_the_batch_axes() -> None:
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    sizes = EngineConfig.of(MODEL, mesh, max_batch=5, page_size=16, cache_tokens=300)
    assert (sizes.num_shards, sizes.slots, sizes.slots_per_shard) == (4, 8, 2)
    assert (sizes.pages_per_shard, sizes.pages, sizes.cache_tokens) == (4, 16, 256)


def test_the_longest_sequence_is_what_the_cache_holds() -> None:
    assert EngineConfig.of(MODEL, cache_tokens=64).max_length == 63
    assert EngineConfig.of(MODEL, cache_tokens=128).max_length == 64
    assert EngineConfig.of(MODEL, cache_tokens=64, page_size=16, drafts=2).max_length == 59
    mesh = make_mesh(MeshConfig(data=8))
    assert EngineConfig.of(MODEL, mesh, cache_tokens=8 * 32, page_size=16).max_length == 31


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(EngineConfig) if field.name != "drafts"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        dataclasses.replace(EngineConfig.of(MODEL), **{name: 0})


def test_a_negative_number_of_drafts_is_refused() -> None:
    with pytest.raises(ValueError, match="drafts is -1; it cannot be negative"):
        dataclasses.replace(EngineConfig.of(MODEL), drafts=-1)


def test_chunks_are_padded_to_powers_of_two() -> None:
    assert chunk_sizes(1) == [16]
    assert chunk_sizes(64) == [16, 32, 64]
    assert chunk_sizes(65) == [16, 32, 64, 128]
    # No prompt of an engine is longer than what leaves room for a token.
    assert EngineConfig.of(MODEL).chunk_sizes == [16, 32, 64]
    assert EngineConfig.of(MODEL, chunk=32).chunk_sizes == [16, 32]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": CONTEXT + 1}, "max_length is 65; it must lie in 2..64"),
        ({"max_length": 1}, "max_length is 1"),
        ({"max_batch": 0}, "max_batch is 0; it must be at least 1"),
        ({"drafts": -1}, "drafts is -1; it cannot be negative"),
        ({"drafts": True}, "drafts is True; use an integer"),
        ({"cache_tokens": 1e3}, "cache_tokens is 1000.0; use an integer"),
        ({"max_batch": 2.5}, "max_batch is 2.5; use an integer"),
        ({"chunk": 48}, "chunk is 48; it must be a power of two from 16"),
        ({"page_size": 0}, "page_size is 0; it must be at least 1"),
        (
            {"cache_tokens": 63},
            "cache_tokens is 63, and in pages of 64 for each of 1 parts of .* has 0 tokens; raise it$",
        ),
        ({"cache_tokens": 64, "max_length": 64}, r"holds has 63 tokens; raise it, or lower max_length \(64\)"),
    ],
)
def test_what_no_engine_can_have_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig.of(MODEL, **arguments)


def test_a_model_without_a_depth_cannot_draft() -> None:
    with pytest.raises(ValueError, match="drafts is 1; the model has no MTP depth to draft with, use 0"):
        EngineConfig.of(DENSE_ONLY, drafts=1)


def test_sequences_are_not_split() -> None:
    with pytest.raises(ValueError, match=r"mesh\.context is 2; inference does not split sequences, use 1"):
        EngineConfig.of(MODEL, make_mesh(MeshConfig(data=4, context=2)))
