"""Multi-head latent attention: three ways to compute it, one oracle."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.mla import MLA, Latents
from dsv3_jax.model.rope import rotation
from tests import reference_model
from tests.model.tiny import CONFIG, assert_gradient, oracle_tensors, published, random_variables
from tests.tolerances import TOLERANCE

CONFIGS = {"q_lora": CONFIG, "no_q_lora": dataclasses.replace(CONFIG, q_lora_rank=None, rope_scaling=None)}
LENGTH = 19
"""More than two tiles of attention."""


def layer_of(config: ModelConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The first block's attention weights, as our tree and under their published names."""
    variables = random_variables(config)
    attention = jax.tree.map(lambda leaf_L: leaf_L[0], variables["params"]["dense_layers"]["self_attn"])
    return attention, reference_model.layer_tensors(oracle_tensors(config, variables), 0)


def inputs(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, LENGTH, CONFIG.hidden_size)).astype(np.float32)


def whole(config: ModelConfig, params: Any, x_BTD: np.ndarray, absorbed: bool = False) -> tuple[jax.Array, Latents]:
    turns = rotation(config, jnp.arange(x_BTD.shape[1])[None])
    return jax.jit(MLA(config, absorbed).apply)({"params": params}, x_BTD, turns)


def in_pieces(config: ModelConfig, params: Any, x_BTD: np.ndarray, pieces: list[int]) -> np.ndarray:
    """Every piece on the latents of those before it, in a cache whose other rows are NaN."""
    attend, start, outputs = jax.jit(MLA(config).apply), 0, []
    B = len(x_BTD)
    cache = Latents(*(np.full((B, LENGTH + 3, width), np.nan, np.float32) for width in (config.kv_lora_rank, config.qk_rope_head_dim)))
    for size in pieces:
        turns = rotation(config, jnp.arange(start, start + size)[None])
        o_BTD, new = attend({"params": params}, x_BTD[:, start : start + size], turns, cache, np.full(B, start))
        for rows, fresh in zip(cache, new, strict=True):
            rows[:, start : start + size] = fresh
        outputs.append(np.asarray(o_BTD))
        start += size
    return np.concatenate(outputs, axis=1)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("absorbed", [False, True], ids=["materialised", "absorbed"])
def test_values_and_gradients(name: str, absorbed: bool) -> None:
    """Both forms over a whole sequence, and every parameter's gradient through them."""
    config = CONFIGS[name]
    params, tensors = layer_of(config)
    x_BTD, dy_BTD = inputs(), inputs(1)
    found_BTD, latents = whole(config, params, x_BTD, absorbed)
    chex.assert_trees_all_close(
        np.float64(found_BTD), reference_model.attention(published(config), tensors, np.float64(x_BTD)), **TOLERANCE["float32"]
    )
    chex.assert_shape(latents.c_kv, (2, LENGTH, config.kv_lora_rank))
    chex.assert_shape(latents.k_rope, (2, LENGTH, config.qk_rope_head_dim))

    def loss(at: tuple[Any, jax.Array]) -> jax.Array:
        return jnp.sum(dy_BTD * whole(config, *at, absorbed)[0])

    def oracle(at: tuple[Any, np.ndarray]) -> float:
        stack = jax.tree.map(lambda leaf: leaf[None], at[0])
        named = oracle_tensors(config, {"params": {"dense_layers": {"self_attn": stack}}})
        layer = reference_model.layer_tensors(named, 0)
        return float(np.sum(dy_BTD * reference_model.attention(published(config), layer, at[1])))

    assert_gradient(jax.jit(jax.grad(loss))((params, x_BTD)), oracle, (params, x_BTD))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [1, 7, 3, 8], [LENGTH]], ids=["tokens", "pieces", "whole"])
def test_cached_is_uncached(name: str, pieces: list[int]) -> None:
    config = CONFIGS[name]
    params, tensors = layer_of(config)
    x_BTD = inputs()
    found_BTD = in_pieces(config, params, x_BTD, pieces)
    expected_BTD = reference_model.attention(published(config), tensors, np.float64(x_BTD))
    chex.assert_trees_all_close(np.float64(found_BTD), expected_BTD, **TOLERANCE["float32"])


def test_latents_are_normalised_keys_are_not() -> None:
    """The cache holds norm(c_kv) and the rotated k_r, which passes no norm."""
    params, tensors = layer_of(CONFIG)
    x_BTD, C = inputs(), CONFIG.kv_lora_rank
    _, latents = whole(CONFIG, params, x_BTD)
    joint_BTX = np.float64(x_BTD) @ tensors["self_attn.kv_a_proj_with_mqa.weight"].T
    c_kv_BTC = reference_model.rms_norm(joint_BTX[..., :C], tensors["self_attn.kv_a_layernorm.weight"], 1e-6)
    k_rope_BTP = reference_model.rotate(joint_BTX[:, :, None, C:], reference_model.rotary_angles(published(CONFIG), LENGTH))[:, :, 0]
    chex.assert_trees_all_close(jax.tree.map(np.float64, latents), Latents(c_kv_BTC, k_rope_BTP), **TOLERANCE["float32"])


def test_latent_norms_keep_their_own_epsilon() -> None:
    """1e-6 whatever rms_norm_eps says, as in the reference."""
    params, _ = layer_of(CONFIG)
    x_BTD = inputs()
    other = dataclasses.replace(CONFIG, rms_norm_eps=0.5)
    chex.assert_trees_all_equal(whole(CONFIG, params, x_BTD), whole(other, params, x_BTD))


def test_bfloat16() -> None:
    """The three forms in bfloat16 lie as near the exact result as bfloat16 allows."""
    config = CONFIG.with_dtype("bfloat16")
    params, _ = layer_of(CONFIG)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    x_BTD = np.asarray(jnp.asarray(inputs(), jnp.bfloat16))
    exact = jax.tree.map(np.float32, (params, x_BTD))
    expected_BTD = np.float64(whole(CONFIG, *exact)[0])
    for absorbed in (False, True):
        found_BTD, latents = whole(config, params, x_BTD, absorbed)
        chex.assert_type([found_BTD, *latents], jnp.bfloat16)
        error = np.linalg.norm(np.float64(found_BTD) - expected_BTD) / np.linalg.norm(expected_BTD)
        assert error < TOLERANCE["bfloat16"]["rtol"]
