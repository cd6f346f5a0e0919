"""Causal attention against softmax attention spelled out in float64, and the memory it promises."""

from __future__ import annotations

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.attention import causal_attention
from tests.intermediates import intermediate_shapes
from tests.kernels.reference_attention import SCALE, assert_is_attention, draw, expected_of, in_parts, value_and_gradients

LENGTHS = 1, 7, 64, 127, 128, 129, 300


@functools.cache
def in_chunks(chunk: int) -> Callable[..., jax.Array]:
    return functools.partial(causal_attention, scale=SCALE, chunk=chunk)


OFTEN = [
    (1, 128, 1, "float32"),
    (7, 3, 2, "float32"),
    (128, 64, 4, "float32"),
    (129, 512, 2, "float32"),
    (300, 128, 1, "float32"),
    (127, 128, 1, "bfloat16"),
    (129, 64, 4, "bfloat16"),
]
NIGHTLY = [
    *((length, 64, 4, "float32") for length in LENGTHS if length != 128),
    *((length, 128, 1, "float32") for length in LENGTHS if length not in (1, 300)),
    *((length, 64, 4, "bfloat16") for length in (7, 300)),
    *((length, 128, 1, "bfloat16") for length in (1, 300)),
]


@pytest.mark.parametrize(
    ("length", "chunk", "kv_heads", "dtype"), [*OFTEN, *(pytest.param(*case, marks=pytest.mark.nightly) for case in NIGHTLY)]
)
def test_causal_attention_is_softmax_attention(length: int, chunk: int, kv_heads: int, dtype: str) -> None:
    arrays = draw(length, kv_heads, dtype)
    assert_is_attention(value_and_gradients(in_chunks(chunk), arrays), expected_of(arrays), arrays, dtype)


def test_large_logits_neither_overflow_nor_lose_the_row() -> None:
    """The running maximum rises from tile to tile in one sequence, and is reached in the first one in the other."""
    q, k, v, do = draw(24, 4)
    rising_T = np.linspace(1, 40, 24, dtype=np.float32)
    k = 30 + k * np.stack([rising_T, rising_T[::-1]])[..., None, None]
    o, gradients = value_and_gradients(in_chunks(8), [q, k, v, do])
    chex.assert_tree_all_finite((o, gradients))
    for b in range(2):
        o_expected, expected = expected_of([array[b : b + 1] for array in (q, k, v, do)])
        chex.assert_trees_all_close(np.asarray(o[b : b + 1], np.float64), o_expected, rtol=1e-4, atol=5e-4)
        for one, other in zip(gradients, expected, strict=True):
            close = {"rtol": 1e-4, "atol": 1e-4 * np.abs(other).max()}
            chex.assert_trees_all_close(np.asarray(one[b : b + 1], np.float64), other, **close)


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


@pytest.mark.parametrize(
    ("parts", "chunk"), [(3, 5), (4, 64), *(pytest.param(2, chunk, marks=pytest.mark.nightly) for chunk in (4, 7))]
)
def test_queries_of_a_part_of_the_sequence(parts: int, chunk: int) -> None:
    """Values and gradients of the whole, put together."""
    arrays = draw(parts * 6, 2)
    found = value_and_gradients(functools.partial(in_parts, in_chunks(chunk), parts), arrays)
    assert_is_attention(found, expected_of(arrays), arrays, "float32")
