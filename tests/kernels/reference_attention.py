"""Causal softmax attention and its gradients spelled out in NumPy: what every implementation is held to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from tests.tolerances import TOLERANCE

SCALE = 0.37
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def naive(
    q_BTNX: np.ndarray, k_BSMX: np.ndarray, v_BSMW: np.ndarray, scale: float = SCALE, seen_BTS: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Output and the matrix of probabilities [B, N, T, S]; keys and values repeated for the heads that share them.

    Every query sees the keys up to its own place, or those of `seen_BTS`.
    """
    T, N, M = *q_BTNX.shape[1:3], k_BSMX.shape[2]
    k_BSNX, v_BSNW = (np.repeat(a, N // M, axis=2) for a in (k_BSMX, v_BSMW))
    logits_BNTS = scale * np.einsum("BTNX,BSNX->BNTS", q_BTNX, k_BSNX)
    seen = np.tri(T, dtype=bool) if seen_BTS is None else seen_BTS[:, None]
    logits_BNTS = np.where(seen, logits_BNTS, -np.inf)
    p_BNTS = np.exp(logits_BNTS - logits_BNTS.max(-1, keepdims=True))
    p_BNTS /= p_BNTS.sum(-1, keepdims=True)
    return np.einsum("BNTS,BSNW->BTNW", p_BNTS, v_BSNW), p_BNTS


def naive_gradients(
    q_BTNX: np.ndarray,
    k_BSMX: np.ndarray,
    v_BSMW: np.ndarray,
    do_BTNW: np.ndarray,
    scale: float = SCALE,
    seen_BTS: np.ndarray | None = None,
) -> tuple[np.ndarray, ...]:
    """The chain rule by hand; heads that share a key or value add up."""
    B, T, N, X = q_BTNX.shape
    M, W = v_BSMW.shape[2:]
    p_BNTS = naive(q_BTNX, k_BSMX, v_BSMW, scale, seen_BTS)[1]
    dp_BNTS = np.einsum("BTNW,BSNW->BNTS", do_BTNW, np.repeat(v_BSMW, N // M, axis=2))
    ds_BNTS = scale * p_BNTS * (dp_BNTS - np.sum(p_BNTS * dp_BNTS, axis=-1, keepdims=True))
    dq_BTNX = np.einsum("BNTS,BSNX->BTNX", ds_BNTS, np.repeat(k_BSMX, N // M, axis=2))
    dk_BSNX = np.einsum("BNTS,BTNX->BSNX", ds_BNTS, q_BTNX)
    dv_BSNW = np.einsum("BNTS,BTNW->BSNW", p_BNTS, do_BTNW)
    return dq_BTNX, dk_BSNX.reshape(B, T, M, -1, X).sum(3), dv_BSNW.reshape(B, T, M, -1, W).sum(3)


def expected_of(arrays: list[np.ndarray], scale: float = SCALE, seen_BTS: np.ndarray | None = None) -> tuple[Any, Any]:
    """Output and gradients in float64 of q, k, v and output gradient."""
    exact = [a.astype(np.float64) for a in arrays]
    return naive(*exact[:3], scale, seen_BTS)[0], naive_gradients(*exact, scale, seen_BTS)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(
    attend: Callable[..., jax.Array], arrays: list[jax.Array], segment_starts_BT: Any = None
) -> tuple[Any, Any]:
    """Of `attend(q, k, v, [segment_starts_BT=])`, at q, k, v and output gradient; compiled once for each shape."""
    documents = {} if segment_starts_BT is None else {"segment_starts_BT": segment_starts_BT}
    o, pullback = jax.vjp(functools.partial(attend, **documents), *arrays[:3])
    return o, pullback(arrays[3])


def assert_is_attention(found: tuple[Any, Any], expected: tuple[Any, Any], arrays: list[np.ndarray], dtype: str) -> None:
    """Output and gradients in the shapes and dtypes of the arrays that they belong to, and within the tolerance."""
    q, k, v, do = arrays
    chex.assert_trees_all_equal_shapes_and_dtypes(found, (do, (q, k, v)))
    found = jax.tree.map(lambda a: np.asarray(a, np.float64), found)
    # Sums over many queries are of the size of their largest element, not of one.
    unit = jax.tree.map(lambda a: max(1.0, np.abs(a).max()), expected)
    chex.assert_trees_all_close(*(jax.tree.map(np.divide, tree, unit) for tree in (found, expected)), **TOLERANCE[dtype])


def in_parts(
    part_of: Callable[..., jax.Array], parts: int, q: jax.Array, k: jax.Array, v: jax.Array, segment_starts_BT: Any = None
) -> jax.Array:
    """Each part of the queries against all keys, its place known only while it runs."""

    def split(array: jax.Array) -> jax.Array:
        return array.reshape(array.shape[0], parts, -1, *array.shape[2:]).swapaxes(0, 1)

    def one(part: tuple[jax.Array, jax.Array, Any]) -> jax.Array:
        q, first, segment_starts_BT = part
        return part_of(q, k, v, first=first, segment_starts_BT=segment_starts_BT)

    firsts = jnp.arange(parts) * (q.shape[1] // parts)
    o = jax.lax.map(one, (split(q), firsts, None if segment_starts_BT is None else split(segment_starts_BT)))
    return o.swapaxes(0, 1).reshape(*q.shape[:3], -1)


def draw(
    length: int,
    kv_heads: int,
    dtype: str = "float32",
    *,
    batch: int = 2,
    heads: int = 4,
    widths: tuple[int, int] = (6, 5),
    seed: int = 0,
) -> list[np.ndarray]:
    """Random q, k, v and output gradient, rounded to the dtype; `widths` are those of the keys and of the values."""
    rng = np.random.default_rng(seed)
    X, W = widths
    shapes = [(batch, length, heads, X), (batch, length, kv_heads, X), (batch, length, kv_heads, W), (batch, length, heads, W)]
    return [rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes]


def pack(rows: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents in rows, by their lengths; a negative length is so much padding, and what is left of a row is padding, too.

    Returns:
      segment_starts_BT: where the document of each token begins, -1 for padding: int32.
      seen_BTS: what each token sees, which is every token of its document up to itself; padding sees itself.
    """
    segment_starts_BT = np.full((len(rows), length), -1, np.int32)
    seen_BTS = np.tile(np.eye(length, dtype=bool), (len(rows), 1, 1))
    for b, sizes in enumerate(rows):
        begin = 0
        for size in sizes:
            end = begin + abs(size)
            if size > 0:
                segment_starts_BT[b, begin:end] = begin
                seen_BTS[b, begin:end, begin:end] = np.tri(size, dtype=bool)
            begin = end
        assert begin <= length, "the documents do not fit"
    return segment_starts_BT, seen_BTS
