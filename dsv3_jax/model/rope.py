"""Rotary position embedding on interleaved pairs, with YaRN (arXiv 2309.00071; section 4.3 of the report).

As in the checkpoints, a pair is (2j, 2j + 1), so that no weight is permuted. Angles are float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig


class RopeAngles(NamedTuple):
    """cos and sin of every position's angles, [B or 1, T, P/2] float32, scaled by YaRN's `magnitude`."""

    cos: jax.Array
    sin: jax.Array


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Return the radians per position of each rotary pair, [P/2] float32, interpolated by YaRN under `rope_scaling`."""
    dim, base, scaling = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    pairs = np.arange(dim // 2, dtype=np.float64)
    plain = base ** (-2 * pairs / dim)
    if scaling is None:
        return plain.astype(np.float32)

    def pair_with(rotations: float) -> float:
        """Return the (fractional) pair that makes this many rotations over the original context."""
        turns = scaling.original_max_position_embeddings / (2 * math.pi * rotations)
        return dim * math.log(turns) / (2 * math.log(base))

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high: float = min(math.ceil(pair_with(scaling.beta_slow)), dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((pairs - low) / (high - low), 0.0, 1.0)
    return (plain * (1 - ramp) + plain / scaling.factor * ramp).astype(np.float32)


def magnitude(config: ModelConfig) -> float:
    """Return the factor on cos and sin: m(mscale) / m(mscale_all_dim), m(1) if one is unset (m: eq. 22), 1 without YaRN."""
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0
    if scaling.mscale and scaling.mscale_all_dim:
        return scaling.attention_scale(scaling.mscale) / scaling.attention_scale(scaling.mscale_all_dim)
    return scaling.attention_scale(1.0)


def rope_angles(config: ModelConfig, positions_BT: jax.Array) -> RopeAngles:
    """Return cos and sin of every position's angles, times `magnitude`: float32 [B, T, P/2], for all layers."""
    angles = positions_BT[..., None].astype(jnp.float32) * inverse_frequencies(config)
    factor = magnitude(config)
    return RopeAngles(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def apply_rope(x: jax.Array, angles: RopeAngles) -> jax.Array:
    """Rotate the pairs (a, b) of the last axis of x, [B, T, P] or [B, T, N, P]: (a cos - b sin, b cos + a sin)."""
    cos, sin = (part[..., None, :] if x.ndim == 4 else part for part in angles)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape).astype(x.dtype)
