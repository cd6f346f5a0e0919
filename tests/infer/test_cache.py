"""The latent cache against rows written one by one in numpy."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.infer.cache import Cache, append, empty_cache
from dsv3_jax.model.mla import Latents
from tests.model.tiny import CONFIG, DENSE_ONLY, MOE_ONLY

LAYERS = {
    "mixed": (CONFIG, ["dense_layers_0", "moe_layers_0", "moe_layers_1"]),
    "dense": (DENSE_ONLY, ["dense_layers_0", "dense_layers_1"]),
    "moe": (MOE_ONLY, ["moe_layers_0", "moe_layers_1"]),
}


@pytest.mark.parametrize(("config", "names"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_empty_cache_has_a_row_of_places_for_every_layer_and_sequence(
    config: ModelConfig, names: list[str], dtype: str
) -> None:
    cache = empty_cache(config.with_dtype(dtype), 3, 10)
    assert list(cache.layers) == names
    for latents in cache.layers.values():
        chex.assert_shape(latents.c_kv, (3, 10, config.kv_lora_rank))
        chex.assert_shape(latents.k_rope, (3, 10, config.qk_rope_head_dim))
        chex.assert_type(list(latents), jnp.dtype(dtype))
    np.testing.assert_array_equal(cache.length_B, [0, 0, 0])
    chex.assert_type(cache.length_B, jnp.int32)


def test_the_published_cache_is_576_values_a_token_and_layer() -> None:
    cache = jax.eval_shape(lambda: empty_cache(ModelConfig(), 1, 1))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers)) == 61 * 576 * 2 == 70_272


def test_append_writes_behind_each_sequence_of_its_own_length() -> None:
    rng = np.random.default_rng(0)
    B, S, widths = 4, 12, (3, 2)
    names = ["dense_layers_0", "moe_layers_0"]
    rows = {name: [rng.standard_normal((B, S, width)).astype(np.float32) for width in widths] for name in names}
    length_B = np.array([0, 5, 9, 2])
    cache = Cache({name: Latents(*map(jnp.asarray, arrays)) for name, arrays in rows.items()}, jnp.asarray(length_B, jnp.int32))
    # T new tokens of which count_B are real: a ragged prompt, single tokens, nothing.
    for T, count_B in ((3, [3, 1, 3, 0]), (1, [1, 1, 0, 1]), (2, [2, 2, 0, 2])):
        new = {name: [rng.standard_normal((B, T, width)).astype(np.float32) for width in widths] for name in names}
        latents = {name: Latents(*map(jnp.asarray, arrays)) for name, arrays in new.items()}
        cache = jax.jit(append)(cache, latents, jnp.asarray(count_B))
        for b in range(B):
            for name in names:
                for old, fresh in zip(rows[name], new[name], strict=True):
                    for t in range(count_B[b]):
                        old[b, length_B[b] + t] = fresh[b, t]
        length_B = length_B + count_B
        np.testing.assert_array_equal(cache.length_B, length_B)
        for name in names:
            for found, expected in zip(cache.layers[name], rows[name], strict=True):
                for b in range(B):
                    np.testing.assert_array_equal(found[b, : length_B[b]], expected[b, : length_B[b]])
    chex.assert_type(cache.length_B, jnp.int32)


def test_append_leaves_the_rows_before_and_the_other_sequences_alone() -> None:
    cache = Cache({"moe_layers_0": Latents(jnp.zeros((2, 6, 1)), jnp.zeros((2, 6, 1)))}, jnp.array([1, 4]))
    new = {"moe_layers_0": Latents(jnp.full((2, 2, 1), 7.0), jnp.full((2, 2, 1), 8.0))}
    latents = append(cache, new, jnp.array([2, 2])).layers["moe_layers_0"]
    np.testing.assert_array_equal(latents.c_kv[..., 0], [[0, 7, 7, 0, 0, 0], [0, 0, 0, 0, 7, 7]])
    np.testing.assert_array_equal(latents.k_rope[..., 0], [[0, 8, 8, 0, 0, 0], [0, 0, 0, 0, 8, 8]])


def test_append_stores_in_the_dtype_of_the_cache() -> None:
    cache = Cache({"moe_layers_0": Latents(*(jnp.zeros((1, 4, 2), jnp.bfloat16),) * 2)}, jnp.zeros(1, jnp.int32))
    new = {"moe_layers_0": Latents(*(jnp.full((1, 1, 2), 1 + 2**-10),) * 2)}
    stored = append(cache, new, jnp.ones(1, jnp.int32)).layers["moe_layers_0"]
    chex.assert_type(list(stored), jnp.bfloat16)
    assert float(stored.c_kv[0, 0, 0]) == 1
