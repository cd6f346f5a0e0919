"""Arrays that make way for what is made of them, outside of jitted programs."""

from __future__ import annotations

from typing import Any

import jax


def release(old: Any, made: Any) -> None:
    """Deletes `old`, if it is an array on a device, once everything in the tree `made` is there; nothing in it may be `old`."""
    if isinstance(old, jax.Array):
        jax.block_until_ready(made)
        old.delete()
