"""One number per array, by which a checkpoint that is read is told to be the one that was saved.

What lies on a disk is compressed, and neither Orbax nor the formats below it (OCDBT, zarr, zstd) notice every byte that has
changed. So each array gets a sum, modulo 2^32, of a hash of every element's bits and place. A sum does not depend on the order
it is taken in, so the number is the same on any mesh and for any number of processes; the devices compute it from the parts
they hold, in one pass and without a copy. One element that changes always changes it; anything else goes unseen once in 2^32.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.checkpoint.paths import by_path


def checksums(tree: Any) -> dict[str, int]:
    """The checksum of every array of `tree`, by its path; every process of a run has to call this, and gets all of them.

    Raises:
      ValueError: naming the array, if its dtype has elements of more than 32 bits.
    """
    arrays = by_path(tree)
    for path, array in arrays.items():
        if array.dtype.itemsize > 4:
            raise ValueError(f"{path} is {array.dtype.name}; a checkpoint holds arrays of 32 bits an element at most")
    # Moments share the shapes of their parameters: a program for each kind of array is compiled far sooner than one for all.
    # Each is waited for: on a CPU, programs that do not depend on each other, in flight together, can take all threads and
    # wait for each other's sums for ever.
    return {path: int(_checksum(array)) for path, array in arrays.items()}


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        bits = array.astype(jnp.uint32)
    else:
        unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    # An odd factor for each axis, in place of strides, which would wrap around in arrays of more than 2^32 elements.
    factors = [(0x9E3779B9 * (axis + 1) ^ 0x85EBCA6B) % 2**32 | 1 for axis in range(array.ndim)]
    places = [
        jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(factor) for axis, factor in enumerate(factors)
    ]
    return jnp.sum(_mix(bits ^ functools.reduce(operator.add, places, jnp.uint32(0))), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: one to one, and each bit of `x` changes half of the bits of the result."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
