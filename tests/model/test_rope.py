"""Rotary embedding on interleaved pairs, by hand, and YaRN's published numbers."""

from __future__ import annotations

import dataclasses
import math

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.model.rope import RopeAngles, apply_rope, inverse_frequencies, magnitude, rope_angles
from tests import reference_model
from tests.model.tiny import CONFIG, published
from tests.tolerances import TOLERANCE

PLAIN = dataclasses.replace(CONFIG, rope_scaling=None, qk_rope_head_dim=8)
PUBLISHED = ModelConfig(rope_scaling=RopeScaling(), max_position_embeddings=163840)
"""P 64, theta 10000, factor 40 over 4096 tokens."""


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- The rotation ----------------------------------------------------------------------------------------------------


def test_neighbouring_pairs_turn() -> None:
    """(a, b) -> (a cos - b sin, b cos + a sin): by 90 degrees (1, 2) is (-2, 1), by 180 degrees (3, 4) is (-3, -4)."""
    quarter_then_half = RopeAngles(jnp.array([[[0.0, -1.0]]]), jnp.array([[[1.0, 0.0]]]))
    x_BTP = jnp.array([[[1.0, 2.0, 3.0, 4.0]]])
    chex.assert_trees_all_equal(apply_rope(x_BTP, quarter_then_half), jnp.array([[[-2.0, 1.0, -3.0, -4.0]]]))
    with_heads_BTNP = jnp.stack([x_BTP, -x_BTP], axis=2)
    turned_BTNP = apply_rope(with_heads_BTNP, quarter_then_half)
    chex.assert_trees_all_equal(turned_BTNP, jnp.array([[[[-2.0, 1.0, -3.0, -4.0], [2.0, -1.0, 3.0, 4.0]]]]))


def test_pairs_are_complex_numbers_times_a_phase() -> None:
    """Pair j at position p turns by p * theta^(-2j/P); every sequence has its own positions, all heads the same."""
    positions_BT = np.array([[0, 1, 2], [5, 40, 7]])
    x_BTNP = normal(2, 3, 4, 8)
    found = apply_rope(x_BTNP, rope_angles(PLAIN, positions_BT))
    phase_BTj = np.exp(1j * positions_BT[..., None] * 10000.0 ** (-np.arange(4) / 4))
    turned = np.float64(x_BTNP).view(np.complex128) * phase_BTj[:, :, None]
    chex.assert_trees_all_close(np.float64(found), turned.view(np.float64), **TOLERANCE["float32"])
    chex.assert_trees_all_equal(np.asarray(found)[0, 0], x_BTNP[0, 0])


def test_halves_are_not_paired() -> None:
    """Rotate-half, which pairs (j, j + P/2), gives something else on the same weights."""
    x_BTP, turns = normal(1, 3, 8), rope_angles(PLAIN, jnp.arange(3)[None])
    a, b = np.split(x_BTP, 2, axis=-1)
    cos, sin = (np.asarray(part) for part in turns)
    halves = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    assert np.abs(np.asarray(apply_rope(x_BTP, turns)) - halves)[:, 1:].max() > 0.5


def test_products_depend_on_the_distance_alone() -> None:
    q_P, k_P = normal(8), normal(8, seed=1)

    def at(x_P: np.ndarray, position: int) -> np.ndarray:
        return np.float64(apply_rope(x_P[None, None], rope_angles(PLAIN, jnp.array([[position]]))))[0, 0]

    for distance in (0, 1, 17):
        products = [at(q_P, position + distance) @ at(k_P, position) for position in (0, 1, 30, 500)]
        chex.assert_trees_all_close(np.array(products), np.full(4, products[0]), rtol=0, atol=2e-4)
    assert abs(at(q_P, 17) @ at(k_P, 0) - at(q_P, 0) @ at(k_P, 0)) > 0.1


def test_angles_are_float32_in_a_bfloat16_model() -> None:
    """At position 4095 a bfloat16 angle would be off by a whole turn; what is rotated keeps its dtype."""
    config = PLAIN.with_dtype("bfloat16")
    turns = rope_angles(config, jnp.array([[4095]]))
    chex.assert_type([turns.cos, turns.sin], jnp.float32)
    expected = np.cos(4095 * 10000.0 ** (-np.arange(4) / 4))
    chex.assert_trees_all_close(np.float64(turns.cos[0, 0]), expected, rtol=0, atol=1e-3)
    assert apply_rope(jnp.ones((1, 1, 8), jnp.bfloat16), turns).dtype == jnp.bfloat16


# --- YaRN ------------------------------------------------------------------------------------------------------------


def test_published_ramp_runs_from_pair_10_to_pair_23() -> None:
    """Pairs up to 10 are left alone, those from 23 on slowed by the factor 40, linearly between."""
    plain = 10000.0 ** (-np.arange(32) / 32)
    slowed = plain / np.float64(inverse_frequencies(PUBLISHED))
    chex.assert_trees_all_close(slowed[:11], np.ones(11), rtol=1e-6)
    chex.assert_trees_all_close(slowed[23:], np.full(9, 40.0), rtol=1e-6)
    share = np.arange(1, 13) / 13
    chex.assert_trees_all_close(slowed[11:23], 1 / (1 - share + share / 40), rtol=1e-6)


def test_published_temperature_and_amplitude() -> None:
    assert RopeScaling().attention_scale(1.0) ** 2 == pytest.approx(1.873854, abs=5e-7)
    assert PUBLISHED.softmax_scale == pytest.approx(0.135234, abs=5e-7)
    assert magnitude(PUBLISHED) == 1.0


FACTOR_8 = 0.1 * math.log(8)


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim", "expected"),
    [
        (1.0, 1.0, 1.0),
        (0.7, 1.2, (0.7 * FACTOR_8 + 1) / (1.2 * FACTOR_8 + 1)),
        (1.2, 0.7, (1.2 * FACTOR_8 + 1) / (0.7 * FACTOR_8 + 1)),
        (None, 1.2, FACTOR_8 + 1),
        (0.7, None, FACTOR_8 + 1),
        (0.7, 0.0, FACTOR_8 + 1),
        (None, None, FACTOR_8 + 1),
    ],
)
def test_amplitude(mscale: float | None, mscale_all_dim: float | None, expected: float) -> None:
    """m(mscale) / m(mscale_all_dim), and m(1) where either is missing; it scales both cos and sin."""
    scaling = RopeScaling(factor=8.0, mscale=mscale, mscale_all_dim=mscale_all_dim)
    config = dataclasses.replace(PLAIN, rope_scaling=scaling)
    assert magnitude(config) == pytest.approx(expected, rel=1e-12)
    turns = rope_angles(config, jnp.arange(5)[None])
    chex.assert_trees_all_close(jnp.hypot(*turns), jnp.full((1, 5, 4), expected), rtol=1e-6)


def test_without_yarn_the_amplitude_is_one() -> None:
    assert magnitude(PLAIN) == 1.0
    chex.assert_trees_all_close(inverse_frequencies(PLAIN), np.float32([1, 0.1, 0.01, 0.001]), rtol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"factor": 1.0},
        {"beta_fast": 4.0, "beta_slow": 4.0},
        {"beta_fast": 1e6, "beta_slow": 1e-6},
        {"original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.2},
    ],
)
def test_rotation_against_the_oracle(changes: dict[str, float]) -> None:
    """Ramps of no width and ramps past either end among them; static, so beyond the original context too."""
    config = dataclasses.replace(PUBLISHED, rope_scaling=RopeScaling(**changes))
    turns = rope_angles(config, jnp.arange(200)[None])
    expected_TP = reference_model.rotary_angles(published(config), 200)
    found = np.float64(turns.cos[0]) + 1j * np.float64(turns.sin[0])
    chex.assert_trees_all_close(found, expected_TP, rtol=0, atol=5e-5)
