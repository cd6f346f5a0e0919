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
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.parallel.mesh import AXES, BATCH_AXES

FSDP_AXES = "fsdp", "expert", "context"
"""The axes along which dense parameters are split; each layer's are gathered when it runs."""
EXPERT_FSDP_AXES = "fsdp", "context"
"""The same for the weights of routed experts, whose experts the `expert` axis already splits."""

TOKENS = PartitionSpec(BATCH_AXES, "context")
"""[B, T, ...]: the leading axes of every activation."""

MICRO_BATCHES = PartitionSpec(None, *TOKENS)
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
