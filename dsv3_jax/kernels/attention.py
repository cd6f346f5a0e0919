"""Causal attention over a whole sequence, tile by tile with the online softmax.

`causal_attention` walks square tiles of the T x S matrix, forward and backward, so the matrix itself is never built: memory
grows with T, not with T^2.

Axes beyond the project's legend: M key-value heads (N, or 1 when all heads share the latent), X query/key width,
U the query heads that share a key-value head, A and Z the queries and keys of one tile.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.backend import Backends
from dsv3_jax.kernels.documents import first_seen
from dsv3_jax.kernels.gpu import attention, hopper
from dsv3_jax.kernels.tpu import splash
from dsv3_jax.kernels.vma import varying_alike, zeros_beside

_OPTIONS = Backends(
    "attention_backend",
    auto={"cpu": "chunked", "gpu": "pallas_gpu", "tpu": "splash"},
    anywhere=("chunked",),
    only_on={"splash": "tpu", "pallas_gpu": "gpu"},
)
_ACROSS_DOCUMENTS = "attends across the documents of a row, and cannot keep them apart"


def choose_attention(
    name: str, dtype: Any, widths: tuple[int, int], platform: str | None = None, documents: bool = False
) -> str:
    """Return the backend of `attend` that `name` stands for; "auto" depends on the platform and all other arguments.

    Args as `experts.choose_backend`'s, whose errors this raises, too, and
      widths: (width of queries and keys, width of values).
      documents: True if the documents of a row have to be kept apart.
    """
    across = _ACROSS_DOCUMENTS if documents else None
    reasons = {"pallas_gpu": lambda: across or hopper.unsupported_reason(dtype) or attention.unsupported_reason(*widths)}
    return _OPTIONS.resolve_backend(name, platform, reasons)


def attend(
    q_BTNX: jax.Array,
    k_BSMX: jax.Array,
    v_BSMW: jax.Array,
    *,
    scale: float,
    chunk: int,
    first: jax.Array | int = 0,
    segment_starts_BT: jax.Array | None = None,
    backend: str,
) -> jax.Array:
    """Compute `causal_attention` by a backend that `choose_attention` returned; only "chunked" uses `chunk`.

    Raises:
      ValueError: if `segment_starts_BT` is given to "pallas_gpu"; and for inputs that the backend does not take.
    """
    if backend == "splash":
        return splash.splash_attention(q_BTNX, k_BSMX, v_BSMW, scale=scale, first=first, segment_starts_BT=segment_starts_BT)
    if backend == "pallas_gpu":
        if segment_starts_BT is not None:
            raise ValueError(f"attention by 'pallas_gpu' {_ACROSS_DOCUMENTS}; use model.attention_backend chunked")
        return attention.attention_hopper(q_BTNX, k_BSMX, v_BSMW, scale=scale, first=first)
    assert backend == "chunked", backend
    return causal_attention(q_BTNX, k_BSMX, v_BSMW, scale=scale, chunk=chunk, first=first, segment_starts_BT=segment_starts_BT)


# ----------------------------------------------------------------------------------------------------------------------
# The online softmax: logits come a block at a time, and never exist whole


MASKED = -1e30
"""The logit of a masked key; finite, so that a fully masked row stays free of NaN."""


class OnlineSoftmax(NamedTuple):
    """State of a softmax over the blocks of keys so far, float32; rows [..., A] are one for each query of each head."""

    top: jax.Array
    """The greatest logit, [..., A]."""
    total: jax.Array
    """The sum of exp(logit - top), [..., A]."""
    mixed: jax.Array
    """The sum of exp(logit - top) * value, [..., A, W]."""

    @classmethod
    def empty(cls, like: jax.Array, rows: tuple[int, ...], width: int) -> OnlineSoftmax:
        """Return the state before the first block: top MASKED, total and mixed 0; it varies over the mesh axes of `like`."""
        return cls(
            zeros_beside(like, rows, jnp.float32, fill=MASKED),
            zeros_beside(like, rows, jnp.float32),
            zeros_beside(like, (*rows, width), jnp.float32),
        )

    def fold(self, logits: jax.Array, values: jax.Array, product: str) -> OnlineSoftmax:
        """Return the state after one more block: logits [..., A, Z], MASKED for keys not seen, and the values of its Z keys.

        `product` is the einsum of the exponentials, in the values' dtype, and the values, such as "BTNZ,BZC->BTNC".
        """
        top = jnp.maximum(self.top, logits.max(-1))
        p = jnp.exp(logits - top[..., None])
        shrink = jnp.exp(self.top - top)
        more = jnp.einsum(product, p.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return OnlineSoftmax(top, self.total * shrink + p.sum(-1), self.mixed * shrink[..., None] + more)


# ----------------------------------------------------------------------------------------------------------------------
# The chunked backend


def causal_attention(
    q_BTNX: jax.Array,
    k_BSMX: jax.Array,
    v_BSMW: jax.Array,
    *,
    scale: float,
    chunk: int,
    first: jax.Array | int = 0,
    segment_starts_BT: jax.Array | None = None,
) -> jax.Array:
    """Compute softmax(q k^T * scale, over positions up to the query's own) v.

    Args:
      q_BTNX: queries of N heads.
      k_BSMX: keys of M heads; M divides N, and query head n reads key-value head n * M // N.
      v_BSMW: values of the same M heads.
      scale: factor on the logits.
      chunk: queries and keys per tile.
      first: position of the first query among the keys; not 0 where other devices hold the queries before it.
      segment_starts_BT: positions among the keys where the queries' documents begin (documents.py); earlier keys are masked.
        None lets all queries see all earlier keys.

    Returns:
      [B, T, N, W] in v's dtype; logits and softmax are float32.
    """
    B, T, N, X = q_BTNX.shape
    M, W = v_BSMW.shape[2:]
    tile = min(chunk, T)
    q, k, v = (_padded(a, tile) for a in (q_BTNX, k_BSMX, v_BSMW))
    if segment_starts_BT is not None:
        # Padded queries see what the last one does, so that each has a key in the tiles that are walked.
        segment_starts_BT = jnp.pad(first_seen(segment_starts_BT, first), ((0, 0), (0, -T % tile)), mode="edge")
    q_BMUTX = q.reshape(B, -1, M, N // M, X).transpose(0, 2, 3, 1, 4)
    inputs = varying_alike(q_BMUTX, k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.asarray(first, jnp.int32), segment_starts_BT)
    o_BMUTW = _attend(inputs, scale, tile)
    return o_BMUTW.transpose(0, 3, 1, 2, 4).reshape(B, -1, N, W)[:, :T]


def _padded(array_BTNX: jax.Array, tile: int) -> jax.Array:
    missing = -array_BTNX.shape[1] % tile
    return jnp.pad(array_BTNX, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else array_BTNX


_Inputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]
"""q [B, M, U, T, X], k [B, M, S, X], v [B, M, S, W], position of the first query, first key seen [B, T] or None."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attend(inputs: _Inputs, scale: float, tile: int) -> jax.Array:
    return _attend_forward(inputs, scale, tile)[0]


def _seen(first: jax.Array, segment_starts_BT: jax.Array | None, i: jax.Array, j: jax.Array, tile: int) -> jax.Array:
    """Return the mask of keys that queries see, for query tile i and key tile j: bool [A, Z], with documents [B, A, Z]."""
    offset = jnp.arange(tile)
    seen_AZ = (first + i * tile + offset)[:, None] >= j * tile + offset
    if segment_starts_BT is None:
        return seen_AZ
    return seen_AZ & (_take(segment_starts_BT, i, tile, 1)[..., None] <= j * tile + offset)


def _earliest(segment_starts_BT: jax.Array, tile: int) -> jax.Array:
    """Return for each tile of queries the smallest position of a key that one of them sees, over all rows of the batch."""
    return segment_starts_BT.reshape(segment_starts_BT.shape[0], -1, tile).min((0, 2))


def _take(array: jax.Array, index: jax.Array, tile: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, index * tile, tile, axis)


def _attend_forward(inputs: _Inputs, scale: float, tile: int) -> tuple[jax.Array, tuple]:
    q_BMUTX, k_BMSX, v_BMSW, first, segment_starts_BT = inputs
    B, M, U, T, _ = q_BMUTX.shape
    S, W = v_BMSW.shape[2:]

    def query_tile(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        q_i = _take(q_BMUTX, i, tile, 3)

        def key_tile(j: jax.Array, running: OnlineSoftmax) -> OnlineSoftmax:
            logits = jnp.einsum("BMUAX,BMZX->BMUAZ", q_i, _take(k_BMSX, j, tile, 2), preferred_element_type=jnp.float32)
            seen = _seen(first, segment_starts_BT, i, j, tile)
            logits = jnp.where(seen if segment_starts_BT is None else seen[:, None, None], logits * scale, MASKED)
            return running.fold(logits, _take(v_BMSW, j, tile, 2), "BMUAZ,BMZW->BMUAW")

        start = OnlineSoftmax.empty(q_BMUTX, (B, M, U, tile), W)
        # From the first key of a document; up to the tile of the last query's own key.
        begin = 0 if segment_starts_BT is None else _earliest(segment_starts_BT, tile)[i] // tile
        end = jnp.minimum((first + (i + 1) * tile - 1) // tile + 1, S // tile)
        top, total, mixed = jax.lax.fori_loop(begin, end, key_tile, start)
        return (mixed / total[..., None]).astype(v_BMSW.dtype), top + jnp.log(total)

    o, lse = jax.lax.map(query_tile, jnp.arange(T // tile))
    o_BMUTW = jnp.moveaxis(o, 0, 3).reshape(B, M, U, T, W)
    lse_BMUT = jnp.moveaxis(lse, 0, 3).reshape(B, M, U, T)
    return o_BMUTW, (inputs, o_BMUTW, lse_BMUT)


def _attend_backward(scale: float, tile: int, residuals: tuple, do_BMUTW: jax.Array) -> tuple:
    (q_BMUTX, k_BMSX, v_BMSW, first, segment_starts_BT), o_BMUTW, lse_BMUT = residuals
    num_tiles = q_BMUTX.shape[3] // tile
    delta_BMUT = jnp.sum(do_BMUTW.astype(jnp.float32) * o_BMUTW.astype(jnp.float32), axis=-1)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def key_tile(dq_BMUTX: jax.Array, j: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        k_j, v_j = _take(k_BMSX, j, tile, 2), _take(v_BMSW, j, tile, 2)

        # Keys come first here: of the three gradients, only dq is then a product with a transposed left side.
        def query_tile(i: jax.Array, carry: tuple) -> tuple:
            dq, dk_j, dv_j = carry
            q_i, do_i = _take(q_BMUTX, i, tile, 3), _take(do_BMUTW, i, tile, 3)
            lse_i, delta_i = _take(lse_BMUT, i, tile, 3), _take(delta_BMUT, i, tile, 3)
            logits_BMZUA = einsum("BMZX,BMUAX->BMZUA", k_j, q_i) * scale
            seen = _seen(first, segment_starts_BT, i, j, tile)
            seen = seen.T[:, None] if segment_starts_BT is None else seen.swapaxes(1, 2)[:, None, :, None]
            p_BMZUA = jnp.exp(jnp.where(seen, logits_BMZUA, MASKED) - lse_i[:, :, None])
            dp_BMZUA = einsum("BMZW,BMUAW->BMZUA", v_j, do_i)
            ds_BMZUA = (p_BMZUA * (dp_BMZUA - delta_i[:, :, None]) * scale).astype(q_i.dtype)
            dv_j += einsum("BMZUA,BMUAW->BMZW", p_BMZUA.astype(do_i.dtype), do_i)
            dk_j += einsum("BMZUA,BMUAX->BMZX", ds_BMZUA, q_i)
            dq_i = _take(dq, i, tile, 3) + einsum("BMZUA,BMZX->BMUAX", ds_BMZUA, k_j)
            return jax.lax.dynamic_update_slice_in_dim(dq, dq_i, i * tile, 3), dk_j, dv_j

        start = dq_BMUTX, zeros_beside(k_j, k_j.shape, jnp.float32), zeros_beside(v_j, v_j.shape, jnp.float32)
        # From the tile of the first query that sees the first key; up to the last with a document that begins by then.
        begin, end = jnp.maximum(j * tile - first, 0) // tile, num_tiles
        if segment_starts_BT is not None:
            sees = _earliest(segment_starts_BT, tile) < (j + 1) * tile
            end = jnp.max(jnp.where(sees, jnp.arange(1, num_tiles + 1), 0))
        dq_BMUTX, dk_j, dv_j = jax.lax.fori_loop(begin, end, query_tile, start)
        return dq_BMUTX, (dk_j.astype(k_j.dtype), dv_j.astype(v_j.dtype))

    start = zeros_beside(q_BMUTX, q_BMUTX.shape, jnp.float32)
    dq_BMUTX, (dk, dv) = jax.lax.scan(key_tile, start, jnp.arange(k_BMSX.shape[2] // tile))
    dk_BMSX = jnp.moveaxis(dk, 0, 2).reshape(k_BMSX.shape)
    dv_BMSW = jnp.moveaxis(dv, 0, 2).reshape(v_BMSW.shape)
    return ((dq_BMUTX.astype(q_BMUTX.dtype), dk_BMSX, dv_BMSW, None, None),)


_attend.defvjp(_attend_forward, _attend_backward)
