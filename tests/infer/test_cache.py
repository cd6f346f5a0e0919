"""The paged cache against rows written one by one in numpy."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.infer.cache import ROWS, append, bytes_per_token, cached_layers, empty_cache
from dsv3_jax.model.mla import CacheMetadata, Latents
from dsv3_jax.parallel.mesh import make_mesh
from tests.model.tiny import CONFIG, DENSE_ONLY, MOE_ONLY

LAYERS = {
    "mixed": (CONFIG, ["dense_layers_0", "moe_layers_0", "moe_layers_1"]),
    "dense": (DENSE_ONLY, ["dense_layers_0", "dense_layers_1"]),
    "moe": (MOE_ONLY, ["moe_layers_0", "moe_layers_1"]),
}


@pytest.mark.parametrize(("config", "names"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("drafting", [False, True])
def test_an_empty_cache_has_pages_for_every_layer(config: ModelConfig, names: list[str], dtype: str, drafting: bool) -> None:
    cache = empty_cache(config.with_dtype(dtype), 3, 10, drafting=drafting)
    assert cache.keys() == {*names, *(["mtp_0"] if drafting else [])} == set(cached_layers(config, drafting))
    for latents in cache.values():
        chex.assert_shape(latents.c_kv, (3, 10, config.kv_lora_rank))
        chex.assert_shape(latents.k_rope, (3, 10, config.qk_rope_head_dim))
        chex.assert_type(list(latents), jnp.dtype(dtype))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == 30 * bytes_per_token(config.with_dtype(dtype), drafting)


def test_the_published_cache_is_576_values_a_token_and_layer() -> None:
    cache = jax.eval_shape(lambda: empty_cache(ModelConfig(), 1, 1))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) == 61 * 576 * 2 == 70_272
    assert bytes_per_token(ModelConfig(), False) == 70_272
    assert bytes_per_token(ModelConfig(), True) == 62 * 576 * 2


def test_append_writes_where_the_table_says_and_nowhere_else() -> None:
    """Three sequences with 0, 5 and 7 tokens in pages of 4, T = 6 new ones each; the last one's table ends early."""
    rng = np.random.default_rng(0)
    pages, size, T = 7, 4, 6
    page_table_BJ = np.array([[5, 0, 7], [2, 6, 4], [1, 3, 7]])  # Page 7 is none.
    cached_length_B = np.array([0, 5, 7])
    old = {"moe_layers_0": [rng.standard_normal((pages, size, width)).astype(np.float32) for width in (3, 2)]}
    new = {"moe_layers_0": [rng.standard_normal((3, T, width)).astype(np.float32) for width in (3, 2)]}
    other = Latents(jnp.ones((pages, size, 3)), jnp.ones((pages, size, 2)))
    cache = {"dense_layers_0": other, **{name: Latents(*map(jnp.asarray, arrays)) for name, arrays in old.items()}}
    latents = {name: Latents(*map(jnp.asarray, arrays)) for name, arrays in new.items()}
    found = jax.jit(append)(cache, latents, CacheMetadata(jnp.asarray(cached_length_B), jnp.asarray(page_table_BJ)))
    written = 0
    for b in range(3):
        for t in range(T):
            page, position = divmod(cached_length_B[b] + t, size)
            if page < 3 and page_table_BJ[b, page] < pages:
                written += 1
                for pool, fresh in zip(old["moe_layers_0"], new["moe_layers_0"], strict=True):
                    pool[page_table_BJ[b, page], position] = fresh[b, t]
    assert written == 6 + 6 + 1
    for array, expected in zip(found["moe_layers_0"], old["moe_layers_0"], strict=True):
        np.testing.assert_array_equal(array, expected)
    chex.assert_trees_all_equal(found["dense_layers_0"], other)


def test_append_stores_in_the_dtype_of_the_cache() -> None:
    cache = {"moe_layers_0": Latents(*(jnp.zeros((1, 4, 2), jnp.bfloat16),) * 2)}
    new = {"moe_layers_0": Latents(*(jnp.full((1, 1, 2), 1 + 2**-10),) * 2)}
    stored = append(cache, new, CacheMetadata(jnp.zeros(1, jnp.int32), jnp.zeros((1, 1), jnp.int32)))["moe_layers_0"]
    chex.assert_type(list(stored), jnp.bfloat16)
    assert float(stored.c_kv[0, 0, 0]) == 1


def test_on_a_mesh_a_table_names_its_own_devices_pages() -> None:
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    cache = empty_cache(DENSE_ONLY, 8, 4, sharding=NamedSharding(mesh, ROWS))
    names = cached_layers(DENSE_ONLY, drafting=False)
    for latents in cache.values():
        chex.assert_shape([shard.data for shard in latents.c_kv.addressable_shards], (2, 4, DENSE_ONLY.kv_lora_rank))
    widths = DENSE_ONLY.kv_lora_rank, DENSE_ONLY.qk_rope_head_dim
    row_B11 = jnp.arange(1.0, 5)[:, None, None]
    new = {name: Latents(*(jnp.broadcast_to(row_B11, (4, 1, width)) for width in widths)) for name in names}
    places = CacheMetadata(jnp.array([0, 1, 2, 3]), jnp.array([[1], [0], [2], [1]]))  # The third sequence's page is none.
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, ROWS)
        found = jax.jit(append)(cache, jax.device_put(new, rows), jax.device_put(places, rows))
    expected = np.zeros((8, 4))
    expected[1, 0], expected[2, 1], expected[7, 3] = 1, 2, 4
    for latents in found.values():
        np.testing.assert_array_equal(latents.c_kv[..., 0], expected)
        np.testing.assert_array_equal(latents.k_rope[..., -1], expected)
