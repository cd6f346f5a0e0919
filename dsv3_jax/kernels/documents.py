"""Documents packed into one row, and the masks that keep attention and targets within them.

`segment_starts_BT`, int32, gives for each token the position in its row of the first token of its document, and -1 for
padding. A query sees its document up to itself. A padding query sees only itself, so that no softmax row is empty, and no
document depends on padding. A start also identifies the document: no two documents of a row share it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def first_seen(segment_starts_BT: jax.Array, first: jax.Array | int) -> jax.Array:
    """Return the first key position each query sees, [B, T] int32: its document's start; for padding its own, first + t."""
    position_T = (first + jnp.arange(segment_starts_BT.shape[1])).astype(jnp.int32)
    return jnp.where(segment_starts_BT < 0, position_T, segment_starts_BT.astype(jnp.int32))


def has_ahead(segment_starts_BT: jax.Array, distance: int) -> jax.Array:
    """Return a mask [B, T]: True if the token `distance` positions later exists and is of the same document, not padding."""
    within = jnp.arange(segment_starts_BT.shape[1]) < segment_starts_BT.shape[1] - distance
    return within & (segment_starts_BT >= 0) & (jnp.roll(segment_starts_BT, -distance, axis=1) == segment_starts_BT)
