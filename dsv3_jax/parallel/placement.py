"""Inside a program: where activations live, and how a layer works with weights that are split over the mesh.

A split weight is gathered along one mesh axis after the other. Along several at once the TPU compiler gathers by an
all-reduce of zeros, at twice the traffic, wherever they span all dimensions of the torus.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsv3_jax.kernels.varying import varying_axes, varying_over
from dsv3_jax.parallel.mesh import current_mesh
from dsv3_jax.parallel.rules import EXPERT_FSDP_AXES, FSDP_AXES, TOKENS, current_rules


def place_tokens(x: jax.Array) -> jax.Array:
    """An activation [B, T, ...], its tokens split over the token axes and its other dimensions whole."""
    return x if current_mesh() is None else jax.lax.with_sharding_constraint(x, TOKENS)


def project(x: jax.Array, kernel: jax.Array, names: tuple[str, ...], *, num_in: int = 1, **how: Any) -> jax.Array:
    """Contracts the last `num_in` axes of x with the first `num_in` of a dense kernel, in x's dtype.

    On a mesh every device has its own tokens; the kernel is gathered along the fsdp axes in x's dtype, its gradient leaves
    by reduce-scatter, and what `tensor` splits stays split, or is summed if it is contracted.

    Args:
      x: [B, T, ...] (on one device any array).
      kernel: split as its logical axes say.
      names: its logical axes.
      num_in: how many of them are contracted.
      **how: for `jax.lax.dot_general`.
    """
    if current_mesh() is None:
        return _contract(x, kernel, num_in, how)
    split = [_along_tensor(name) for name in names]

    def on_device(x: jax.Array, kernel: jax.Array) -> jax.Array:
        y = _contract(x, whole_weight(varying_over(kernel, varying_axes(x)), names, x.dtype), num_in, how)
        return jax.lax.psum(y, "tensor") if "tensor" in split[:num_in] else y

    specs = PartitionSpec(*TOKENS, *split[:num_in]), current_rules().spec(names)
    return jax.shard_map(on_device, in_specs=specs, out_specs=PartitionSpec(*TOKENS, *split[num_in:]))(x, kernel)


def _contract(x: jax.Array, kernel: jax.Array, num_in: int, how: dict[str, Any]) -> jax.Array:
    axes = tuple(range(x.ndim - num_in, x.ndim)), tuple(range(num_in))
    return jax.lax.dot_general(x, kernel.astype(x.dtype), (axes, ((), ())), **how)


def _along_tensor(name: str) -> str | None:
    return "tensor" if "tensor" in getattr(current_rules(), name) else None


def whole_weight(part: jax.Array, names: tuple[str, ...], dtype: Any) -> jax.Array:
    """Inside `jax.shard_map`: a weight cast to `dtype` and made whole along the fsdp axes. Its transpose sums and scatters."""
    part = _rounded(part, dtype)
    for dimension, axes in _fsdp_splits(names):
        for axis in reversed(axes):  # The first of them is the outermost.
            part = jax.lax.all_gather(part, axis, axis=dimension, tiled=True)
    return part


def _rounded(part: jax.Array, dtype: Any) -> jax.Array:
    """`part` in `dtype`. The TPU compiler would move a plain cast ahead of the loop over layers, and keep a copy of all."""
    to, of = jnp.finfo(dtype), jnp.finfo(part.dtype)
    if to.nmant < of.nmant:
        part = jax.lax.reduce_precision(part, to.nexp, to.nmant)
    return part.astype(dtype)


def scattered_sum(array: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Inside `jax.shard_map`: this device's part of the sum, over the fsdp axes, of everybody's gradient of a whole weight."""
    for dimension, axes in _fsdp_splits(names):
        for axis in axes:
            array = jax.lax.psum_scatter(array, axis, scatter_dimension=dimension, tiled=True)
    return array


def _fsdp_splits(names: tuple[str, ...]) -> list[tuple[int, tuple[str, ...]]]:
    """The dimensions of a weight that are split for want of room; that experts are split is no such thing."""
    splits = {FSDP_AXES, EXPERT_FSDP_AXES}
    return [(dimension, axes) for dimension, name in enumerate(names) if (axes := getattr(current_rules(), name)) in splits]
