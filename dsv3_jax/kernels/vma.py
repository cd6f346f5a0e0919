"""Varying manual axes in `jax.shard_map`: a custom gradient's or a loop's arrays must vary over the same mesh axes.

JAX tracks over which axes a value differs between devices. A custom gradient cannot know that a weight is replicated
where the rows are not; casting it to varying first lets JAX sum the weight's gradient over those axes. A loop's carry has
to vary from the start over all axes that its body makes it vary over.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


def varying_axes(tree: Any) -> frozenset[str]:
    """Return the mesh axes over which at least one array of `tree` varies; the empty set outside `jax.shard_map`."""
    return frozenset().union(*(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(tree)))


def varying_over(tree: Tree, axes: frozenset[str]) -> Tree:
    """Return the tree with every array cast to vary over `axes` in addition to its own axes; values are unchanged."""

    def vary(leaf: jax.Array) -> jax.Array:
        missing = axes - jax.typeof(leaf).mat.varying
        return jax.lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf

    return jax.tree.map(vary, tree)


def varying_alike(*trees: Any) -> Any:
    """Return the trees as a tuple, every array cast to vary over the union of the mesh axes of all of them."""
    return varying_over(trees, varying_axes(trees))


def zeros_beside(like: jax.Array, shape: tuple[int, ...], dtype: Any, fill: float = 0.0) -> jax.Array:
    """Return an array filled with `fill` that varies over the mesh axes of `like`, such as the initial carry of a loop."""
    return varying_over(jnp.full(shape, fill, dtype), varying_axes(like))


def shape_beside(like: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Return the `ShapeDtypeStruct` of a Pallas kernel's output that varies over the same mesh axes as `like`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).mat)
