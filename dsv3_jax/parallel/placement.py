"""Inside a program: where activations live, and how a split parameter is made whole for its layer.

Both are the identity without a mesh (see `mesh.current_mesh`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.sharding import PartitionSpec

from dsv3_jax.parallel.mesh import current_mesh
from dsv3_jax.parallel.rules import FSDP_AXES, RULES, TOKENS


def place(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """`x`, constrained to `spec`."""
    return x if current_mesh() is None else jax.lax.with_sharding_constraint(x, spec)


def place_tokens(x: jax.Array) -> jax.Array:
    """An activation [B, T, ...], its tokens split over the token axes and its other dimensions whole."""
    return place(x, TOKENS)


def gathered(weight: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """A dense weight, whole along the fsdp axes: cast it to the computation dtype first, which is what then travels.

    Its gradient leaves by reduce-scatter, in the dtype of the weight given.

    Args:
      weight: split as its logical axes say.
      names: its logical axes.
    """
    if current_mesh() is None:
        return weight
    whole = PartitionSpec(*(tuple(axis for axis in getattr(RULES, name) if axis not in FSDP_AXES) or None for name in names))
    return _gathered(weight, RULES.spec(names), whole)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(weight: jax.Array, split: PartitionSpec, whole: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(weight, whole)


def _gathered_forward(weight: jax.Array, split: PartitionSpec, whole: PartitionSpec) -> tuple[jax.Array, None]:
    return _gathered(weight, split, whole), None


def _gathered_backward(split: PartitionSpec, whole: PartitionSpec, residual: Any, gradient: jax.Array) -> tuple[jax.Array]:
    # Asking for the parts only, so that no device ever holds the sum of the whole.
    return (jax.lax.with_sharding_constraint(gradient, split),)


_gathered.defvjp(_gathered_forward, _gathered_backward)
