"""Sharding of arrays: rules from logical axis names to mesh axes, and layers over split weights.

Parameters name their logical axes where they are created (`nn.with_logical_partitioning`). Flax silently leaves a name without
a rule unsharded and drops a mesh axis that occurs twice; `ShardingRules.spec` raises an error that names the parameter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.kernels.quantized import QuantizedArray
from dsv3_jax.kernels.vma import varying_axes, varying_over
from dsv3_jax.parallel.mesh import AXES, BATCH_AXES, current_mesh

FSDP_AXES = "fsdp", "expert", "context"
"""Mesh axes along which dense parameters are split; a layer's parameters are gathered when it runs."""
EXPERT_FSDP_AXES = "fsdp", "context"
"""The same for the weights of routed experts, which the `expert` axis already splits by expert."""

TOKEN_SPEC = PartitionSpec(BATCH_AXES, "context")
"""PartitionSpec of activations [B, T, ...]: B over `BATCH_AXES`, T over `context`."""
MICRO_BATCHES = PartitionSpec(None, *TOKEN_SPEC)
"""PartitionSpec of a step's micro-batches [A, B, T], each split as `TOKEN_SPEC`."""


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Mesh axes that each logical axis is split along; () for none."""

    # Fully sharded dense weights: the width of the residual stream, and the width of a latent that is read.
    embed: tuple[str, ...] = FSDP_AXES
    latent: tuple[str, ...] = FSDP_AXES
    mtp_in: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ("tensor",)
    heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    experts: tuple[str, ...] = ("expert",)
    expert_embed: tuple[str, ...] = EXPERT_FSDP_AXES
    expert_mlp: tuple[str, ...] = ("tensor",)
    # Small, or in an array that another axis splits.
    layers: tuple[str, ...] = ()
    norm: tuple[str, ...] = ()
    router: tuple[str, ...] = ()
    latent_out: tuple[str, ...] = ()
    head_dim: tuple[str, ...] = ()

    def spec(self, names: tuple[str, ...], where: str = "an array") -> PartitionSpec:
        """Return the PartitionSpec of an array with these logical axes, one for each dimension.

        Raises:
          ValueError: naming the array (`where`), for a name without a rule, an unknown mesh axis or one that is used twice.
        """
        parts: list[tuple[str, ...]] = []
        for name in names:
            axes = getattr(self, name, None)
            if axes is None:
                known = ", ".join(field.name for field in dataclasses.fields(self))
                raise ValueError(f"{where} {names} has the logical axis {name!r}, which has no rule; use one of {known}")
            for axis in axes:
                if axis not in AXES:
                    raise ValueError(
                        f"{where} {names}: the rule {name} -> {axes} names {axis!r}, which is no mesh axis; use {AXES}"
                    )
                if any(axis in part for part in parts) or axes.count(axis) > 1:
                    raise ValueError(
                        f"{where} {names} would be split along mesh axis {axis!r} twice; change the rule of {name!r}"
                    )
            parts.append(axes)
        return PartitionSpec(*(part if len(part) > 1 else part[0] if part else None for part in parts))


RULES = ShardingRules()
"""Rules of training, where a whole batch uses each gathered weight, and of checkpoints."""

SERVING = dataclasses.replace(RULES, embed=EXPERT_FSDP_AXES, latent=EXPERT_FSDP_AXES)
"""Rules of generation. A decoding step would gather more bytes than it reads, so dense weights are whole along `expert`."""

use_rules = jax.make_user_context(RULES)
"""Context that sets the rules: `with use_rules(SERVING): ...`. As with `jax.set_mesh`, other rules retrace a program."""


def current_rules() -> ShardingRules:
    """Return the rules of the current context."""
    return use_rules.value


def check_divides(shape: tuple[int, ...], spec: PartitionSpec, sizes: Mapping[str, int], where: str) -> None:
    """Raise ValueError, naming `where`, unless every dimension is a multiple of the mesh axes it is split along."""
    for i, (size, part) in enumerate(zip(shape, spec, strict=True)):
        axes = () if part is None else (part,) if isinstance(part, str) else part
        parts = math.prod(sizes[axis] for axis in axes)
        if size % parts:
            split = " * ".join(f"{axis} ({sizes[axis]})" for axis in axes)
            raise ValueError(
                f"{where} {list(shape)}: dimension {i} ({size}) is no multiple of {split} = {parts}; make these mesh axes "
                "smaller, for instance by moving a factor to mesh.data"
            )


def named_shardings(axes: Any, shapes: Any, mesh: Mesh | AbstractMesh, rules: ShardingRules = RULES) -> Any:
    """Return the NamedSharding of every array of a tree.

    Args:
      axes: tree with tuples of logical names as leaves.
      shapes: tree of the same structure, of arrays or their shapes.
      mesh, rules: a mesh from `make_mesh`, and its rules.

    Raises:
      ValueError: naming the array, as `ShardingRules.spec` and `check_divides`.
    """
    if tuple(mesh.axis_names) != AXES:
        raise ValueError(
            f"the mesh has axes {mesh.axis_names}; make it with dsv3_jax.parallel.mesh.make_mesh: its axes are {AXES}"
        )

    def sharding(path: tuple, leaf: Any, names: tuple[str, ...]) -> NamedSharding:
        where = "/".join(str(getattr(key, "key", key)) for key in path)
        spec = rules.spec(names, where)
        check_divides(leaf.shape, spec, mesh.shape, where)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, shapes, axes)


# ----------------------------------------------------------------------------------------------------------------------
# Inside a program: the sharding of activations, and products with weights that are split over the mesh.


Weight = jax.Array | QuantizedArray


def place_tokens(x: jax.Array) -> jax.Array:
    """Constrain an activation [B, T, ...] to `TOKEN_SPEC`: tokens split, features whole. Without a mesh return it as it is."""
    return x if current_mesh() is None else jax.lax.with_sharding_constraint(x, TOKEN_SPEC)


def project(x: jax.Array, kernel: Weight, names: tuple[str, ...], *, num_in: int = 1, **options: Any) -> jax.Array:
    """Contract the last `num_in` axes of x with the first `num_in` axes of a dense kernel, in x's dtype.

    On a mesh every device keeps its own tokens. The kernel is gathered along the fsdp axes in x's dtype (or in its 8 bits), and
    its gradient leaves by reduce-scatter. Axes split along `tensor` stay split; if one is contracted, the results are summed.

    Args:
      x: [B, T, ...] (without a mesh any array).
      kernel, names: a weight, split as its logical axes say, and these axes.
      num_in: number of contracted axes.
      **options: of `jax.lax.dot_general`.
    """
    if current_mesh() is None:
        return _contract(x, kernel, num_in, options)
    split = ["tensor" if "tensor" in getattr(current_rules(), name) else None for name in names]

    def on_device(x: jax.Array, kernel: Weight) -> jax.Array:
        whole = all_gather_weight(varying_over(kernel, varying_axes(x)), names, x.dtype)
        y = _contract(x, whole, num_in, options)
        return jax.lax.psum(y, "tensor") if "tensor" in split[:num_in] else y

    kernel, kernel_spec = shard_map_spec(kernel, names)
    specs = PartitionSpec(*TOKEN_SPEC, *split[:num_in]), kernel_spec
    return jax.shard_map(on_device, in_specs=specs, out_specs=PartitionSpec(*TOKEN_SPEC, *split[num_in:]))(x, kernel)


def _contract(x: jax.Array, kernel: Weight, num_in: int, options: dict[str, Any]) -> jax.Array:
    axes = tuple(range(x.ndim - num_in, x.ndim)), tuple(range(num_in))
    return jax.lax.dot_general(x, kernel.astype(x.dtype), (axes, ((), ())), **options)


def shard_map_spec(weight: Weight, names: tuple[str, ...]) -> tuple[Weight, Any]:
    """Return a weight to pass into a `jax.shard_map` region, and its spec there; only one in 8 bits changes.

    The scales of a weight in 8 bits are split as its values. Where a device's part ends within a block, all blocks are first
    divided into smaller ones, with the same scales, that end where the part does.
    """
    rules, mesh = current_rules(), current_mesh()
    if not isinstance(weight, QuantizedArray):
        return weight, rules.spec(names)
    assert mesh is not None
    scale_names = _scale_names(weight, names)
    blocks = []
    for block, size, name in zip(weight.block, weight.matrix_shape, scale_names[-2:], strict=True):
        parts = math.prod(mesh.shape[axis] for axis in getattr(rules, name))
        # The largest size that divides both a block and a part; an undivided matrix may end within a block.
        blocks.append(block if parts == 1 else math.gcd(block, size // parts))
    weight = weight.with_blocks((blocks[0], blocks[1]))
    specs: Any = {"values": rules.spec(names), "scale_inv": rules.spec(scale_names)}
    return weight, dataclasses.replace(weight, **specs)


def _scale_names(weight: QuantizedArray, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the logical axes of the scales of a weight in 8 bits: the stack's, and the first input and output axis."""
    first_out = weight.depth + weight.num_in
    more, rules = names[weight.depth + 1 : first_out] + names[first_out + 1 :], current_rules()
    assert not any(getattr(rules, name) for name in more), f"{names}: only the first input and output axis can be split"
    return *names[: weight.depth + 1], names[first_out]


def all_gather_weight(part: Weight, names: tuple[str, ...], dtype: Any) -> Any:
    """Inside `jax.shard_map`: cast a weight to `dtype` and gather it along the fsdp axes; its transpose reduce-scatters.

    A weight in 8 bits is gathered, and returned, in 8 bits.
    """
    if isinstance(part, QuantizedArray):
        scale_inv = _gathered(part.scale_inv, _scale_names(part, names))
        return dataclasses.replace(part, values=_gathered(part.values, names), scale_inv=scale_inv)
    return _gathered(_rounded(part, dtype), names)


def _gathered(part: jax.Array, names: tuple[str, ...]) -> jax.Array:
    for dimension, axes in _fsdp_splits(names):
        for axis in reversed(axes):  # The first axis is the outermost.
            part = jax.lax.all_gather(part, axis, axis=dimension, tiled=True)
    return part


def _rounded(part: jax.Array, dtype: Any) -> jax.Array:
    # The TPU compiler would move a plain cast out of the loop over layers, and store a second copy of all of them.
    to, of = jnp.finfo(dtype), jnp.finfo(part.dtype)
    if to.nmant < of.nmant:
        part = jax.lax.reduce_precision(part, to.nexp, to.nmant)
    return part.astype(dtype)


def reduce_scatter_grad(gradient: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Inside `jax.shard_map`: sum the devices' gradients of a gathered weight over the fsdp axes, return this device's part."""
    for dimension, axes in _fsdp_splits(names):
        for axis in axes:
            gradient = jax.lax.psum_scatter(gradient, axis, scatter_dimension=dimension, tiled=True)
    return gradient


def _fsdp_splits(names: tuple[str, ...]) -> list[tuple[int, tuple[str, ...]]]:
    """Return (dimension, mesh axes) for each dimension that is split along `FSDP_AXES` or `EXPERT_FSDP_AXES`, and no other."""
    splits = [(dimension, getattr(current_rules(), name)) for dimension, name in enumerate(names)]
    return [(dimension, axes) for dimension, axes in splits if axes in (FSDP_AXES, EXPERT_FSDP_AXES)]
