"""Arrays that have a shape and a place, and no content: what they take on one device."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from dsv3_jax.parallel.sharding import EXPERT_FSDP_AXES, FSDP_AXES


def placed(shape: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
    """The shape of an array that lives where `sharding` says."""
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def device_bytes(tree: Any) -> int:
    """Bytes of arrays on one device."""
    return sum(device_values(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_values(array: Any) -> int:
    """Values of an array on one device."""
    return math.prod(array.sharding.shard_shape(array.shape))


def gathered(array: Any) -> jax.ShapeDtypeStruct:
    """A weight as it is multiplied with: whole along the axes that split it for want of room (`whole_weight`)."""
    sharding = array.sharding
    spec = (None if part in (FSDP_AXES, EXPERT_FSDP_AXES) else part for part in sharding.spec)
    return placed(array, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
