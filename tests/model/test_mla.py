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
from dsv3_jax.model.mla import MLA, CacheMetadata, Latents
from dsv3_jax.model.rope import rope_angles
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
    turns = rope_angles(config, jnp.arange(x_BTD.shape[1])[None])
    return jax.jit(MLA(config, absorbed).apply)({"params": params}, x_BTD, turns)


def in_pieces(config: ModelConfig, params: Any, x_BTD: np.ndarray, pieces: list[int]) -> np.ndarray:
    """Every piece on the latents of those before it, in a cache whose other rows are NaN."""
    attend, start, outputs = jax.jit(MLA(config).apply), 0, []
    B = len(x_BTD)
    cache = Latents(
        *(np.full((B, LENGTH + 3, width), np.nan, np.float32) for width in (config.kv_lora_rank, config.qk_rope_head_dim))
    )
    for size in pieces:
        turns = rope_angles(config, jnp.arange(start, start + size)[None])
        o_BTD, new = attend({"params": params}, x_BTD[:, start : start + size], turns, cache, CacheMetadata(np.full(B, start)))
        for rows, fresh in zip(cache, new, strict=True):
            rows[:, start : start + size] = fresh
        outputs.append(np.asarray(o_BTD))
        start += size
    return np.concatenate(outputs, axis=1)


@pytest.mark.parametrize(
    ("name", "absorbed"),
    [
        ("q_lora", False),
        ("no_q_lora", True),
        pytest.param("q_lora", True, marks=pytest.mark.nightly),
        pytest.param("no_q_lora", False, marks=pytest.mark.nightly),
    ],
)
def test_values_and_gradients(name: str, absorbed: bool) -> None:
    """Both forms over a whole sequence, what they leave for the cache, and every parameter's gradient.

    The norms of the latents have their own epsilon, 1e-6, not the config's; the rotary key passes no norm.
    """
    config = CONFIGS[name]
    params, tensors = layer_of(config)
    x_BTD, dy_BTD = inputs(), inputs(1)

    def loss(at: tuple[Any, jax.Array]) -> tuple[jax.Array, Any]:
        y_BTD, latents = whole(config, *at, absorbed)
        return jnp.sum(dy_BTD * y_BTD), (y_BTD, latents)

    def oracle(at: tuple[Any, np.ndarray]) -> float:
        stack = jax.tree.map(lambda leaf: leaf[None], at[0])
        named = oracle_tensors(config, {"params": {"dense_layers": {"self_attn": stack}}})
        layer = reference_model.layer_tensors(named, 0)
        return float(np.sum(dy_BTD * reference_model.attention(published(config), layer, at[1])))

    gradient, found = jax.jit(jax.grad(loss, has_aux=True))((params, x_BTD))
    expected_BTD = reference_model.attention(published(config), tensors, np.float64(x_BTD))
    expected = expected_BTD, oracle_latents(config, tensors, x_BTD)
    chex.assert_trees_all_equal_shapes(found, expected)
    chex.assert_trees_all_close(jax.tree.map(np.float64, found), expected, **TOLERANCE["float32"])
    assert_gradient(gradient, oracle, (params, x_BTD))


def oracle_latents(config: ModelConfig, tensors: dict[str, np.ndarray], x_BTD: np.ndarray) -> Latents:
    """norm(c_kv), and the rotated k_r."""
    joint_BTX = np.float64(x_BTD) @ tensors["self_attn.kv_a_proj_with_mqa.weight"].T
    c_kv_BTC, k_rope_BTP = np.split(joint_BTX, [config.kv_lora_rank], axis=-1)
    angles = reference_model.rotary_angles(published(config), LENGTH)
    return Latents(
        reference_model.rms_norm(c_kv_BTC, tensors["self_attn.kv_a_layernorm.weight"], 1e-6),
        reference_model.apply_rope(k_rope_BTP[:, :, None], angles)[:, :, 0],
    )


@pytest.mark.parametrize(("name", "pieces"), [("q_lora", [8, 8, 1, 1, 1]), ("no_q_lora", [1] * LENGTH)])
def test_cached_is_uncached(name: str, pieces: list[int]) -> None:
    """In pieces, token by token, and the one after the other."""
    config = CONFIGS[name]
    params, tensors = layer_of(config)
    x_BTD = inputs()
    found_BTD = in_pieces(config, params, x_BTD, pieces)
    expected_BTD = reference_model.attention(published(config), tensors, np.float64(x_BTD))
    chex.assert_trees_all_close(np.float64(found_BTD), expected_BTD, **TOLERANCE["float32"])


@pytest.mark.parametrize("absorbed", [False, True], ids=["materialised", "absorbed"])
def test_bfloat16(absorbed: bool) -> None:
    """As near the exact result of the rounded inputs as a few bfloat16 roundings allow."""
    params, _ = layer_of(CONFIG)
    params, x_BTD = jax.tree.map(lambda leaf: np.asarray(jnp.asarray(leaf, jnp.bfloat16)), (params, inputs()))
    found_BTD, latents = whole(CONFIG.with_dtype("bfloat16"), params, x_BTD, absorbed)
    chex.assert_type([found_BTD, *latents], jnp.bfloat16)
    stack = jax.tree.map(lambda leaf: leaf[None], params)
    tensors = reference_model.layer_tensors(oracle_tensors(CONFIG, {"params": {"dense_layers": {"self_attn": stack}}}), 0)
    expected_BTD = reference_model.attention(published(CONFIG), tensors, np.float64(x_BTD))
    assert np.linalg.norm(np.float64(found_BTD) - expected_BTD) < TOLERANCE["bfloat16"]["rtol"] * np.linalg.norm(expected_BTD)
