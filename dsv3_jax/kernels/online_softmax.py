"""The online softmax: a mixture of values whose logits come a block at a time, and never exist whole."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.vma import zeros_beside

MASKED = -1e30
"""The logit of what is not seen; finite, so that a fully masked row stays free of NaN."""


class Running(NamedTuple):
    """What the blocks so far have given, in float32. Of the rows [..., A], one for each query of each head:"""

    top: jax.Array
    """The greatest logit, [..., A]."""
    total: jax.Array
    """The sum of exp(logit - top), [..., A]."""
    mixed: jax.Array
    """The sum of exp(logit - top) * value, [..., A, W]."""

    @classmethod
    def of_nothing(cls, like: jax.Array, rows: tuple[int, ...], width: int) -> Running:
        """Before the first block; varies over mesh axes as `like` does."""
        return cls(
            zeros_beside(like, rows, jnp.float32, fill=MASKED),
            zeros_beside(like, rows, jnp.float32),
            zeros_beside(like, (*rows, width), jnp.float32),
        )

    def fold(self, logits: jax.Array, values: jax.Array, product: str) -> Running:
        """Adds a block.

        Args:
          logits: [..., A, Z] float32, MASKED where a key is not seen.
          values: of the block's Z keys.
          product: the einsum of exponentials, which are in the values' dtype, and values: "BTNZ,BZC->BTNC", say.
        """
        top = jnp.maximum(self.top, logits.max(-1))
        p = jnp.exp(logits - top[..., None])
        shrink = jnp.exp(self.top - top)
        more = jnp.einsum(product, p.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return Running(top, self.total * shrink + p.sum(-1), self.mixed * shrink[..., None] + more)


# ----------------------------------------------------------------------------------------------------------------------
# Documents packed in one row, and attention that stays within them.


def first_seen(segment_starts_BT: jax.Array, first: jax.Array | int) -> jax.Array:
    """The position of the first key that each query sees, [B, T] int32; `first` is that of the first query."""
    place = (first + jnp.arange(segment_starts_BT.shape[1])).astype(jnp.int32)
    return jnp.where(segment_starts_BT < 0, place, segment_starts_BT.astype(jnp.int32))


def has_ahead(segment_starts_BT: jax.Array, distance: int) -> jax.Array:
    """Which tokens have another one of their document `distance` further on: bool [B, T]. Padding has none at any distance."""
    within = jnp.arange(segment_starts_BT.shape[1]) < segment_starts_BT.shape[1] - distance
    return within & (segment_starts_BT >= 0) & (jnp.roll(segment_starts_BT, -distance, axis=1) == segment_starts_BT)
