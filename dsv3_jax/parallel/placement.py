"""Inside a program: where activations live, and how a split parameter is made whole for its layer.

A width of 7,168 over 512 devices is 14 rows for each, and the TPU's tiles have 8 or 16: left to itself the compiler gathers
such parts by an all-reduce of zeros, at twice the traffic. So parts are gathered along an axis of their own and joined
after, and scattered the same way.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsv3_jax.parallel.mesh import current_mesh
from dsv3_jax.parallel.rules import FSDP_AXES, RULES, TOKENS


def place_tokens(x: jax.Array) -> jax.Array:
    """An activation [B, T, ...], its tokens split over the token axes and its other dimensions whole."""
    return x if current_mesh() is None else jax.lax.with_sharding_constraint(x, TOKENS)


def gathered(weight: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """A dense weight, whole along the fsdp axes: cast it to the computation dtype first, which is what then travels.

    Its gradient leaves by reduce-scatter, in the dtype of the weight given.

    Args:
      weight: split as its logical axes say.
      names: its logical axes.
    """
    mesh = current_mesh()
    if mesh is None or math.prod(mesh.shape[axis] for axis in FSDP_AXES) == 1:
        return weight
    return _gathered(weight, names)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(weight: jax.Array, names: tuple[str, ...]) -> jax.Array:
    split = [getattr(RULES, name) == FSDP_AXES for name in names]
    whole = PartitionSpec(*(None if part else RULES.spec((name,))[0] for part, name in zip(split, names, strict=True)))
    join = functools.partial(gather_parts, axes=FSDP_AXES, dimension=split.index(True))
    # Unchecked, since JAX does not see that what has been gathered is the same everywhere.
    return jax.shard_map(join, in_specs=RULES.spec(names), out_specs=whole, check_vma=False)(weight)


def _gathered_forward(weight: jax.Array, names: tuple[str, ...]) -> tuple[jax.Array, None]:
    return _gathered(weight, names), None


def _gathered_backward(names: tuple[str, ...], residual: Any, gradient: jax.Array) -> tuple[jax.Array]:
    # Asking for the parts only, so that no device ever holds the sum of the whole.
    return (jax.lax.with_sharding_constraint(gradient, RULES.spec(names)),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def gather_parts(part: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """Inside `jax.shard_map`: the array whose `dimension` is split along `axes`, from this device's part of it."""
    parts = jnp.moveaxis(jax.lax.all_gather(part, axes), 0, dimension)
    return parts.reshape(*part.shape[:dimension], -1, *part.shape[dimension + 1 :])


def scatter_sums(array: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """Inside `jax.shard_map`: this device's part, along `dimension`, of the sum of everybody's `array`."""
    num_parts = jax.lax.axis_size(axes)
    parts = array.reshape(*array.shape[:dimension], num_parts, -1, *array.shape[dimension + 1 :])
    return jax.lax.psum_scatter(jnp.moveaxis(parts, dimension, 0), axes, scatter_dimension=0)
