"""Causal attention against softmax attention spelled out in float64, and the memory it promises."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.attention import causal_attention
from tests.intermediates import intermediate_shapes
from tests.kernels.reference_attention import SCALE, draw, naive, naive_gradients
from tests.tolerances import TOLERANCE

LENGTHS = 1, 7, 64, 127, 128, 129, 300


def value_and_gradients(q: np.ndarray, k: np.ndarray, v: np.ndarray, do: np.ndarray, chunk: int) -> tuple[jax.Array, tuple]:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return causal_attention(q, k, v, scale=SCALE, chunk=chunk)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> tuple[jax.Array, tuple]:
        o, pullback = jax.vjp(attend, q, k, v)
        return o, pullback(do)

    return jax.jit(both)(q, k, v, do)


CASES = [
    *((length, 64, 4, "float32") for length in LENGTHS),
    *((length, 128, 1, "float32") for length in LENGTHS),
    (129, 512, 2, "float32"),
    (7, 3, 2, "float32"),
    *((length, 64, 4, "bfloat16") for length in (7, 129, 300)),
    *((length, 128, 1, "bfloat16") for length in (1, 127, 300)),
]


@pytest.mark.parametrize(("length", "chunk", "kv_heads", "dtype"), CASES)
def test_causal_attention_is_softmax_attention(length: int, chunk: int, kv_heads: int, dtype: str) -> None:
    q, k, v, do = draw(length, kv_heads, dtype)
    o, gradients = value_and_gradients(q, k, v, do, chunk)
    chex.assert_trees_all_equal_shapes_and_dtypes((o, gradients), (do, (q, k, v)))

    exact = [a.astype(np.float64) for a in (q, k, v, do)]
    expected = naive(*exact[:3])[0], naive_gradients(*exact)
    found = jax.tree.map(lambda a: np.asarray(a, np.float64), (o, gradients))
    # Sums over up to 300 queries are of the size of their largest element, not of one.
    unit = jax.tree.map(lambda a: max(1.0, np.abs(a).max()), expected)
    chex.assert_trees_all_close(*(jax.tree.map(np.divide, tree, unit) for tree in (found, expected)), **TOLERANCE[dtype])


@pytest.mark.parametrize("rising", [True, False])
def test_large_logits_neither_overflow_nor_lose_the_row(rising: bool) -> None:
    """The running maximum rises from tile to tile, or is reached in the first one."""
    q, k, v, do = draw(24, 4)
    k = 30 + k * np.linspace(1, 40, 24, dtype=np.float32)[:: 1 if rising else -1, None, None]
    o, gradients = value_and_gradients(q, k, v, do, 8)
    exact = [a.astype(np.float64) for a in (q, k, v, do)]
    chex.assert_tree_all_finite((o, gradients))
    chex.assert_trees_all_close(np.asarray(o, np.float64), naive(*exact[:3])[0], rtol=1e-4, atol=5e-4)
    for found, expected in zip(gradients, naive_gradients(*exact), strict=True):
        chex.assert_trees_all_close(np.asarray(found, np.float64), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_the_matrix_is_never_built() -> None:
    """Neither forward nor backward makes an array with two axes as long as the sequence."""
    length, chunk = 300, 64

    def loss(attend, q, k, v):
        return jnp.sum(jnp.square(attend(q, k, v)))

    def two_long_axes(attend) -> set[tuple[int, ...]]:
        shapes = intermediate_shapes(jax.value_and_grad(lambda *qkv: loss(attend, *qkv), (0, 1, 2)), *draw(length, 2)[:3])
        assert any(max(shape, default=0) >= length for shape in shapes)
        return {shape for shape in shapes if sum(axis >= length for axis in shape) >= 2}

    def plain(q, k, v):
        return jax.nn.dot_product_attention(q, k, jnp.pad(v, ((0, 0),) * 3 + ((0, 1),)), is_causal=True)

    assert two_long_axes(lambda q, k, v: causal_attention(q, k, v, scale=SCALE, chunk=chunk)) == set()
    assert two_long_axes(plain), "the search does not find the matrix where there is one"


@pytest.mark.parametrize(("parts", "chunk"), [(2, 4), (3, 5), (4, 64), (2, 7)])
def test_queries_of_a_part_of_the_sequence(parts: int, chunk: int) -> None:
    """Each part of the queries against all keys, from its own place on: values and gradients of the whole, put together."""
    rng = np.random.default_rng(3)
    length = parts * 6
    q, k, v, do = (rng.normal(size=(2, length, heads, 8)).astype(np.float32) for heads in (4, 2, 2, 4))

    whole = functools.partial(causal_attention, scale=0.3, chunk=chunk)

    def in_parts(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        starts = range(0, length, 6)
        return jnp.concatenate([whole(q[:, first : first + 6], k, v, first=first) for first in starts], axis=1)

    found, wanted = (jax.vjp(attend, q, k, v) for attend in (in_parts, whole))
    chex.assert_trees_all_close((found[0], found[1](do)), (wanted[0], wanted[1](do)), **TOLERANCE["float32"])
