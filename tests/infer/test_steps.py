"""Prefill and decoding over the latent cache against the model run over the whole sequence at once."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.infer.cache import Cache, append, empty_cache
from dsv3_jax.infer.sampling import sample
from dsv3_jax.infer.steps import Draw, decode, prefill
from dsv3_jax.model import DeepSeekV3, unstack
from tests.model.tiny import CONFIG as WITH_MTP
from tests.model.tiny import DENSE_ONLY, random_tokens, random_variables
from tests.tolerances import TOLERANCE

CONFIG = dataclasses.replace(WITH_MTP, num_nextn_predict_layers=0)
B, T, CAPACITY = 3, 20, 32
LENGTH_B = np.array([5, 12, 1], np.int32)
GREEDY = Draw(jnp.zeros(B, jnp.uint32), jnp.float32(0), jnp.float32(1))
TOKENS_BT = random_tokens(B, T)


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    return jax.tree.map(jnp.asarray, random_variables(CONFIG))


@pytest.fixture(scope="module")
def whole(variables: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """Logits of the whole sequences, and the latents of every layer."""
    model = DeepSeekV3(CONFIG)

    @jax.jit
    def run(variables: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        features = model.apply(variables, TOKENS_BT, method="features", keep=("latents",))
        logits_BTV = model.apply(variables, features.h_BTD, method="head")
        return logits_BTV, {name: output.latents for name, output in features.outputs.items()}

    logits_BTV, latents = run(variables)
    layers = [("dense_layers", 0), ("moe_layers", 0), ("moe_layers", 1)]
    return np.asarray(logits_BTV), {f"{name}_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], latents[name]) for name, i in layers}


def assert_holds(cache: Cache, latents: dict[str, Any], length_B: np.ndarray) -> None:
    """The cache holds exactly the latents of each sequence's first tokens."""
    assert cache.layers.keys() == latents.keys()
    np.testing.assert_array_equal(cache.length_B, length_B)
    for name, stored in cache.layers.items():
        for found, expected in zip(stored, latents[name], strict=True):
            for b, length in enumerate(length_B):
                np.testing.assert_allclose(found[b, :length], expected[b, :length], **TOLERANCE["float32"], err_msg=name)


def prefilled(variables: dict[str, Any], tokens_BT: np.ndarray, draw: Draw = GREEDY) -> tuple[jax.Array, Cache]:
    model = DeepSeekV3(CONFIG, unrolled=True)
    return prefill(model, unstack(variables), tokens_BT, LENGTH_B, draw, capacity=CAPACITY)


def test_prefill_chooses_from_each_prompts_last_logits_and_stores_its_latents(variables: dict, whole: tuple) -> None:
    logits_BTV, latents = whole
    token_B, cache = prefilled(variables, TOKENS_BT)
    np.testing.assert_array_equal(token_B, logits_BTV[np.arange(B), LENGTH_B - 1].argmax(-1))
    chex.assert_type(token_B, jnp.int32)
    chex.assert_tree_shape_prefix(cache.layers, (B, CAPACITY))
    assert_holds(cache, latents, LENGTH_B)


def test_what_pads_a_prompt_does_not_matter(variables: dict) -> None:
    token_B, cache = prefilled(variables, TOKENS_BT)
    padded = np.where(np.arange(T) < LENGTH_B[:, None], TOKENS_BT, 0)
    other_token_B, other_cache = prefilled(variables, padded)
    np.testing.assert_array_equal(token_B, other_token_B)
    for found, expected in zip(jax.tree.leaves(other_cache.layers), jax.tree.leaves(cache.layers), strict=True):
        for b, length in enumerate(LENGTH_B):
            np.testing.assert_array_equal(found[b, :length], expected[b, :length])


def test_cached_logits_are_the_uncached_ones(variables: dict, whole: tuple) -> None:
    """Token by token behind prompts of three lengths, with NaN wherever the cache is not filled."""
    logits_BTV, latents = whole
    model, separate = DeepSeekV3(CONFIG, unrolled=True), unstack(variables)
    step = jax.jit(functools.partial(model.apply, method="decode"))
    _, cache = prefilled(variables, TOKENS_BT)
    for _ in range(T - int(LENGTH_B.max())):
        at_B = np.asarray(cache.length_B)
        unfilled = np.arange(CAPACITY) >= at_B[:, None]
        poisoned = jax.tree.map(lambda leaf, unfilled=unfilled: jnp.where(unfilled[..., None], jnp.nan, leaf), cache.layers)
        new_logits_BTV, new = step(separate, TOKENS_BT[np.arange(B), at_B][:, None], poisoned, cache.length_B)
        chex.assert_shape(new_logits_BTV, (B, 1, CONFIG.vocab_size))
        np.testing.assert_allclose(new_logits_BTV[:, 0], logits_BTV[np.arange(B), at_B], **TOLERANCE["float32"])
        cache = append(cache, new, jnp.ones(B, jnp.int32))
    assert_holds(cache, latents, LENGTH_B + T - LENGTH_B.max())


def test_several_new_tokens_at_once_are_as_good_as_one_by_one(variables: dict, whole: tuple) -> None:
    logits_BTV, latents = whole
    model, separate = DeepSeekV3(CONFIG, unrolled=True), unstack(variables)
    _, cache = prefilled(variables, TOKENS_BT)
    at_BT = LENGTH_B[:, None] + np.arange(6)
    new_logits_BTV, new = jax.jit(functools.partial(model.apply, method="decode"))(
        separate, np.take_along_axis(TOKENS_BT, at_BT, axis=1), cache.layers, cache.length_B
    )
    expected_BTV = np.take_along_axis(logits_BTV, at_BT[..., None], axis=1)
    np.testing.assert_allclose(new_logits_BTV, expected_BTV, **TOLERANCE["float32"])
    assert_holds(append(cache, new, jnp.full(B, 6)), latents, LENGTH_B + 6)


def test_decode_chooses_from_those_logits_and_gives_its_cache_away(variables: dict, whole: tuple) -> None:
    logits_BTV, latents = whole
    model, separate = DeepSeekV3(CONFIG, unrolled=True), unstack(variables)
    _, cache = prefilled(variables, TOKENS_BT)
    for step in range(4):
        before = cache
        token_B, cache = decode(model, separate, TOKENS_BT[np.arange(B), LENGTH_B + step], cache, GREEDY)
        np.testing.assert_array_equal(token_B, logits_BTV[np.arange(B), LENGTH_B + step].argmax(-1))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.layers))
    assert_holds(cache, latents, LENGTH_B + 4)


@pytest.mark.parametrize("config", [CONFIG, DENSE_ONLY], ids=["moe", "dense"])
def test_programs_for_any_stack_have_the_shapes_they_say(config: ModelConfig) -> None:
    model = DeepSeekV3(config, unrolled=True)
    separate = unstack(random_variables(config))
    shapes = jax.eval_shape(functools.partial(prefill, model, capacity=CAPACITY), separate, TOKENS_BT, LENGTH_B, GREEDY)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes[1], jax.eval_shape(lambda: empty_cache(config, B, CAPACITY)))
    after = jax.eval_shape(functools.partial(decode, model), separate, *shapes, GREEDY)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, shapes)


def test_a_draw_is_told_by_the_sequences_seed_and_the_tokens_place() -> None:
    logits_BV = jnp.asarray(np.random.default_rng(0).standard_normal((6, 200)), jnp.float32)
    draw = Draw(jnp.array([7, 7, 8, 7, 9, 7], jnp.uint32), jnp.float32(1), jnp.float32(1))
    place_B = jnp.array([3, 4, 3, 3, 5, 9])
    keys = jnp.stack([jax.random.fold_in(jax.random.key(int(s)), p) for s, p in zip(draw.seed_B, place_B, strict=True)])
    chosen = np.asarray(draw.choose(logits_BV, place_B))
    np.testing.assert_array_equal(chosen, sample(logits_BV, keys, draw.temperature, draw.top_p))
    same = np.asarray(draw.choose(jnp.tile(logits_BV[:1], (6, 1)), place_B))
    assert same[0] == same[3]
    assert len(set(same.tolist())) > 2
