"""Documents packed in one row, and attention that stays within them.

Who belongs to whom is said by `starts_BT`, int32: for each token the position in its row of the first token of its document,
and -1 for padding. A query sees its document up to itself; one of padding sees itself alone, so that no row of the softmax is
empty, and nothing that padding gives or is given reaches a document. A start also names the document: no two in a row share it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def first_seen(starts_BT: jax.Array, first: jax.Array | int) -> jax.Array:
    """The position of the first key that each query sees, [B, T] int32; `first` is that of the first query."""
    place = (first + jnp.arange(starts_BT.shape[1])).astype(jnp.int32)
    return jnp.where(starts_BT < 0, place, starts_BT.astype(jnp.int32))


def has_ahead(starts_BT: jax.Array, distance: int) -> jax.Array:
    """Which tokens have another one of their document `distance` further on: bool [B, T]. Padding has none at any distance."""
    within = jnp.arange(starts_BT.shape[1]) < starts_BT.shape[1] - distance
    return within & (starts_BT >= 0) & (jnp.roll(starts_BT, -distance, axis=1) == starts_BT)
