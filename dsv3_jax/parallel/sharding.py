"""Where every array lives: logical axis names to mesh axes, and nothing left to chance.

Parameters name their logical axes where they are created (`nn.with_logical_partitioning`). Flax leaves a name without a
rule unsharded and drops a mesh axis that comes twice, both in silence; `spec` raises instead, naming the parameter.
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
"""The axes along which dense parameters are split; each layer's are gathered when it runs."""
EXPERT_FSDP_AXES = "fsdp", "context"
"""The same for the weights of routed experts, whose experts the `expert` axis already splits."""

TOKEN_SPEC = PartitionSpec(BATCH_AXES, "context")
"""[B, T, ...]: the leading axes of every activation."""

MICRO_BATCHES = PartitionSpec(None, *TOKEN_SPEC)
"""[A, B, T]: the micro-batches of a step, each split as the next."""


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """The mesh axes that each logical axis is split along; () for none."""

    # What a dense weight is split along: the residual stream's width, or the latent that it takes in.
    embed: tuple[str, ...] = FSDP_AXES
    latent: tuple[str, ...] = FSDP_AXES
    mtp_in: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ("tensor",)
    heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    experts: tuple[str, ...] = ("expert",)
    expert_embed: tuple[str, ...] = EXPERT_FSDP_AXES
    expert_mlp: tuple[str, ...] = ("tensor",)
    # Small, or a part of something that is split already.
    layers: tuple[str, ...] = ()
    norm: tuple[str, ...] = ()
    router: tuple[str, ...] = ()
    latent_out: tuple[str, ...] = ()
    head_dim: tuple[str, ...] = ()

    def spec(self, names: tuple[str, ...], where: str = "an array") -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes.

        Args:
          names: one logical name for each dimension.
          where: what the array is called in errors.

        Raises:
          ValueError: naming `where`, on a name without a rule, a rule with an unknown mesh axis, or a mesh axis used twice.
        """
        parts: list[tuple[str, ...]] = []
        for name in names:
            axes = getattr(self, name, None)
            if axes is None:
                known = ", ".join(field.name for field in dataclasses.fields(self))
                raise ValueError(f"{where} {names} has the logical axis {name!r}, which has no rule; known: {known}")
            for axis in axes:
                if axis not in AXES:
                    raise ValueError(
                        f"{where} {names}: the rule {name} -> {axes} has no such mesh axis {axis!r}; there are {AXES}"
                    )
                if any(axis in part for part in parts) or axes.count(axis) > 1:
                    raise ValueError(
                        f"{where} {names} would be split along mesh axis {axis!r} twice; change the rule of {name!r}"
                    )
            parts.append(axes)
        return PartitionSpec(*(part if len(part) > 1 else part[0] if part else None for part in parts))


RULES = ShardingRules()
"""Those of training, where a gathered weight is used by a whole batch, and of checkpoints."""

SERVING = dataclasses.replace(RULES, embed=EXPERT_FSDP_AXES, latent=EXPERT_FSDP_AXES)
"""Those of generation: a step of a few tokens would move more weights than it reads, so dense ones are whole along `expert`."""

use_rules = jax.make_user_context(RULES)
"""`with use_rules(SERVING): ...` as `jax.set_mesh` sets the mesh; a program is traced anew under other rules."""


def current_rules() -> ShardingRules:
    """The rules of the program at hand."""
    return use_rules.value


def check_divides(shape: tuple[int, ...], spec: PartitionSpec, sizes: Mapping[str, int], where: str) -> None:
    """Raises ValueError, naming `where`, if a dimension is not a multiple of the mesh axes it is split along."""
    for i, (size, part) in enumerate(zip(shape, spec, strict=True)):
        axes = () if part is None else (part,) if isinstance(part, str) else part
        places = math.prod(sizes[axis] for axis in axes)
        if size % places:
            split = " * ".join(f"{axis} ({sizes[axis]})" for axis in axes)
            raise ValueError(
                f"{where} {list(shape)}: dimension {i} ({size}) is no multiple of {split} = {places}; make these mesh axes "
                "smaller, for instance by moving a factor to mesh.data"
            )


def named_shardings(axes: Any, shapes: Any, mesh: Mesh | AbstractMesh, rules: ShardingRules = RULES) -> Any:
    """The sharding of every array of a tree.

    Args:
      axes: tree with tuples of logical names as leaves.
      shapes: tree of the same structure, of arrays or their shapes.
      mesh: the mesh.
      rules: logical to mesh axes.

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
# Inside a program: where activations live, and how a layer works with weights that are split over the mesh.


Weight = jax.Array | QuantizedArray


def place_tokens(x: jax.Array) -> jax.Array:
    """An activation [B, T, ...], its tokens split over the token axes and its other dimensions whole."""
    return x if current_mesh() is None else jax.lax.with_sharding_constraint(x, TOKEN_SPEC)


def project(x: jax.Array, kernel: Weight, names: tuple[str, ...], *, num_in: int = 1, **how: Any) -> jax.Array:
    """Contracts the last `num_in` axes of x with the first `num_in` of a dense kernel, in x's dtype.

    On a mesh every device has its own tokens; the kernel is gathered along the fsdp axes in x's dtype (or in its 8 bits), its
    gradient leaves by reduce-scatter, and what `tensor` splits stays split, or is summed if it is contracted.

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

    def on_device(x: jax.Array, kernel: Weight) -> jax.Array:
        y = _contract(x, all_gather_weight(varying_over(kernel, varying_axes(x)), names, x.dtype), num_in, how)
        return jax.lax.psum(y, "tensor") if "tensor" in split[:num_in] else y

    kernel, kernel_spec = shard_map_spec(kernel, names)
    specs = PartitionSpec(*TOKEN_SPEC, *split[:num_in]), kernel_spec
    return jax.shard_map(on_device, in_specs=specs, out_specs=PartitionSpec(*TOKEN_SPEC, *split[num_in:]))(x, kernel)


def _contract(x: jax.Array, kernel: Weight, num_in: int, how: dict[str, Any]) -> jax.Array:
    axes = tuple(range(x.ndim - num_in, x.ndim)), tuple(range(num_in))
    return jax.lax.dot_general(x, kernel.astype(x.dtype), (axes, ((), ())), **how)


def _along_tensor(name: str) -> str | None:
    return "tensor" if "tensor" in getattr(current_rules(), name) else None


def shard_map_spec(weight: Weight, names: tuple[str, ...]) -> tuple[Weight, Any]:
    """A weight as it enters a region of `jax.shard_map`, and the specs that split it there as its logical axes say.

    Scales of a weight in 8 bits are split as its values are. Where an edge cuts blocks, they are divided first, into blocks of
    the same scale that end at the edge.
    """
    if not isinstance(weight, QuantizedArray):
        return weight, current_rules().spec(names)
    scale_names = _scale_names(weight, names)
    by_axis = zip(weight.block, weight.matrix_shape, scale_names[-2:], strict=True)
    rows, columns = (_ending_at_edges(block, size, _num_parts(name)) for block, size, name in by_axis)
    weight = weight.with_blocks((rows, columns))
    rules = current_rules()
    specs: Any = {"values": rules.spec(names), "scale_inv": rules.spec(scale_names)}
    return weight, dataclasses.replace(weight, **specs)


def _scale_names(weight: QuantizedArray, names: tuple[str, ...]) -> tuple[str, ...]:
    """The logical axes of its scales: those of the stack, and the first of the inputs and of the outputs."""
    first_out = weight.depth + weight.num_in
    more, rules = names[weight.depth + 1 : first_out] + names[first_out + 1 :], current_rules()
    assert not any(getattr(rules, name) for name in more), f"{names}: only the first input and output axis can be split"
    return *names[: weight.depth + 1], names[first_out]


def _ending_at_edges(block: int, size: int, parts: int) -> int:
    """The largest block that divides `block` and each of `parts` equal parts of `size`; one part may end within a block."""
    return block if parts == 1 else math.gcd(block, size // parts)


def _num_parts(name: str) -> int:
    mesh = current_mesh()
    assert mesh is not None
    return math.prod(mesh.shape[axis] for axis in getattr(current_rules(), name))


def all_gather_weight(part: Weight, names: tuple[str, ...], dtype: Any) -> Any:
    """Inside `jax.shard_map`: a weight cast to `dtype` and made whole along the fsdp axes. Its transpose sums and scatters.

    One in 8 bits travels and stays in them.
    """
    if isinstance(part, QuantizedArray):
        scale_inv = _gathered(part.scale_inv, _scale_names(part, names))
        return dataclasses.replace(part, values=_gathered(part.values, names), scale_inv=scale_inv)
    return _gathered(_rounded(part, dtype), names)


def _gathered(part: jax.Array, names: tuple[str, ...]) -> jax.Array:
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


def reduce_scatter_grad(array: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Inside `jax.shard_map`: this device's part of the sum, over the fsdp axes, of everybody's gradient of a whole weight."""
    for dimension, axes in _fsdp_splits(names):
        for axis in axes:
            array = jax.lax.psum_scatter(array, axis, scatter_dimension=dimension, tiled=True)
    return array


def _fsdp_splits(names: tuple[str, ...]) -> list[tuple[int, tuple[str, ...]]]:
    """The dimensions of a weight that are split for want of room; that experts are split is no such thing."""
    splits = {FSDP_AXES, EXPERT_FSDP_AXES}
    return [(dimension, axes) for dimension, name in enumerate(names) if (axes := getattr(current_rules(), name)) in splits]
