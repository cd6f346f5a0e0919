"""Where the variables of a model live on a mesh: their logical axes under the sharding rules."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.mla import ABSORBED_AXES, absorbed
from dsv3_jax.model.model import init_variables, logical_axes
from dsv3_jax.model.stack import STACKS, stack_sizes
from dsv3_jax.parallel.rules import RULES, ShardingRules, named_shardings


def variable_shardings(config: ModelConfig, mesh: Mesh | AbstractMesh, rules: ShardingRules = RULES) -> dict[str, Any]:
    """The sharding of every variable: a tree like `init_variables`' with NamedShardings as leaves.

    Raises:
      ValueError: naming the variable, if a dimension is no multiple of the mesh axes it is split along.
    """
    shapes = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    return named_shardings(logical_axes(config), shapes, mesh, rules)


def unrolled_axes(config: ModelConfig) -> dict[str, Any]:
    """The logical axes of the variables of an unrolled model, with those that `with_absorbed_weights` adds."""

    def unrolled(collection: dict[str, Any]) -> dict[str, Any]:
        out = {name: tree for name, tree in collection.items() if name not in STACKS}
        for name, size in stack_sizes(config).items():
            if name in collection:
                layer = jax.tree.map(lambda axes: axes[1:], collection[name], is_leaf=lambda leaf: isinstance(leaf, tuple))
                out |= {f"{name}_{i}": layer for i in range(size)}
        return out

    axes = {collection: unrolled(tree) for collection, tree in logical_axes(config).items()}
    return axes | {"absorbed": absorbed(axes["params"], lambda kernel: ABSORBED_AXES)}
