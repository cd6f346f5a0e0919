"""Sampling against numpy: greedy, temperature and its limits, the nucleus as a set, and the distribution of draws."""

from __future__ import annotations

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.infer.sampling import SamplingParams, nucleus, sample

V = 50


def logits(rows: int, scale: float = 2.0, seed: int = 0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal((rows, V))).astype(np.float32)


def keys(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def draw(logits_BV: np.ndarray, temperature: float, top_p: float = 1.0, seed: int = 0) -> np.ndarray:
    key_B = keys(len(logits_BV), seed)
    return np.asarray(jax.jit(sample)(jnp.asarray(logits_BV), key_B, jnp.float32(temperature), jnp.float32(top_p)))


def softmax(logits_BV: np.ndarray) -> np.ndarray:
    p_BV = np.exp(logits_BV.astype(np.float64) - logits_BV.max(-1, keepdims=True))
    return p_BV / p_BV.sum(-1, keepdims=True)


def smallest_set(p_V: np.ndarray, top_p: float) -> set[int]:
    """The most likely tokens, one after another, until they have `top_p`."""
    chosen: set[int] = set()
    mass = 0.0
    for token in np.argsort(-p_V, kind="stable"):
        if mass >= top_p:
            break
        chosen.add(int(token))
        mass += p_V[token]
    return chosen


def test_temperature_0_takes_the_most_likely_and_the_first_of_equals() -> None:
    logits_BV = logits(64)
    logits_BV[0, [3, 7]] = 100.0
    chosen = draw(logits_BV, 0.0, top_p=0.5)
    np.testing.assert_array_equal(chosen, logits_BV.argmax(-1))
    assert chosen[0] == 3
    assert chosen.dtype == np.int32


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-37])
def test_a_temperature_near_0_is_greedy(temperature: float) -> None:
    logits_BV = logits(64, scale=20.0)
    best_two = np.sort(logits_BV, axis=-1)[:, -2:]
    assert (best_two[:, 1] - best_two[:, 0]).min() > 0.05
    np.testing.assert_array_equal(draw(logits_BV, temperature), logits_BV.argmax(-1))


@pytest.mark.parametrize("temperature", [1e6, math.inf])
def test_a_high_temperature_forgets_the_logits(temperature: float) -> None:
    drawn = draw(np.repeat(logits(1), 50_000, axis=0), temperature)
    counts = np.bincount(drawn, minlength=V)
    assert abs(counts - 1000).max() < 6 * math.sqrt(1000)


@pytest.mark.parametrize("top_p", [1e-9, 0.05, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_the_nucleus_is_the_smallest_set(top_p: float, scale: float) -> None:
    logits_BV = logits(40, scale)
    p_BV = softmax(logits_BV)
    cumulated = np.cumsum(-np.sort(-p_BV, axis=-1), axis=-1)
    clear = np.abs(cumulated - top_p).min(-1) > 1e-6  # where float32 cannot fall to the other side
    assert clear.mean() > 0.9
    kept = np.asarray(jax.jit(nucleus)(logits_BV, jnp.float32(top_p)))
    chex.assert_shape(kept, (40, V))
    for b in np.flatnonzero(clear):
        assert set(np.flatnonzero(kept[b])) == smallest_set(p_BV[b], top_p)
    assert kept[np.arange(40), logits_BV.argmax(-1)].all()
    assert (kept.sum(-1) == 1).all() or top_p > 1e-9


def test_a_nucleus_that_is_reached_exactly_ends_there() -> None:
    kept = nucleus(jnp.zeros((1, 8)), jnp.float32(0.5))
    assert int(kept.sum()) == 4
    np.testing.assert_array_equal(nucleus(jnp.log(jnp.array([[0.25, 0.5, 0.25]])), jnp.float32(0.5)), [[False, True, False]])


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0])
def test_top_p_1_keeps_every_token_of_a_large_vocabulary(scale: float) -> None:
    logits_BV = (scale * np.random.default_rng(0).standard_normal((2, 129_280))).astype(np.float32)
    assert np.asarray(jax.jit(nucleus)(logits_BV, jnp.float32(1.0))).all()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.7), (1.7, 0.8)])
def test_draws_are_distributed_as_they_should_be(temperature: float, top_p: float) -> None:
    """Pearson's chi-square over 20,000 draws: its mean is the degrees of freedom, its deviation sqrt(2 df)."""
    count, logits_V = 20_000, logits(1)[0, :8]
    p_V = softmax(logits_V / temperature)
    kept = np.isin(np.arange(8), list(smallest_set(p_V, top_p)))
    p_V = np.where(kept, p_V, 0) / p_V[kept].sum()
    counts = np.bincount(draw(np.tile(logits_V, (count, 1)), temperature, top_p), minlength=8)
    assert counts[~kept].sum() == 0
    statistic = np.sum((counts - count * p_V)[kept] ** 2 / (count * p_V)[kept])
    degrees = kept.sum() - 1
    assert degrees >= 2
    assert statistic < degrees + 6 * math.sqrt(2 * degrees)


def test_a_sequence_is_drawn_by_its_own_key() -> None:
    logits_BV, key_B = logits(16), keys(16)
    together = sample(jnp.asarray(logits_BV), key_B, jnp.float32(1.0), jnp.float32(0.9))
    alone = [sample(jnp.asarray(logits_BV[b : b + 1]), key_B[b : b + 1], jnp.float32(1), jnp.float32(0.9)) for b in range(16)]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    assert np.any(together != draw(logits_BV, 1.0, 0.9, seed=1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5; use an integer"),
        ({"seed": -1}, "seed is -1; it must be an integer in 0..4294967295"),
        ({"seed": 2**32}, "seed is 4294967296; it must be an integer in 0..4294967295"),
        ({"temperature": -0.1}, "temperature is -0.1; it cannot be negative"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0; it must lie in"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": math.nan}, "top_p is nan"),
    ],
)
def test_params_that_make_no_sense_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SamplingParams(), **fields)
