"""Shardings of the model's variables: their logical axes under the sharding rules."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.quantized import QuantizedArray, is_quantized
from dsv3_jax.model.mla import ABSORBED_AXES, absorbed
from dsv3_jax.model.model import abstract_variables, logical_axes
from dsv3_jax.model.transformer import STACKS, stack_sizes
from dsv3_jax.parallel.devices import release
from dsv3_jax.parallel.sharding import RULES, ShardingRules, named_shardings


def variable_shardings(config: ModelConfig, mesh: Mesh | AbstractMesh, rules: ShardingRules = RULES) -> dict[str, Any]:
    """Return the tree of `init_variables` with NamedShardings as leaves.

    Raises ValueError, naming the variable, if a dimension is no multiple of the mesh axes it is split along.
    """
    return named_shardings(logical_axes(config), abstract_variables(config), mesh, rules)


def place_variables(
    variables: dict[str, Any], config: ModelConfig, mesh: Mesh, rules: ShardingRules = RULES, *, donate: bool = False
) -> dict[str, Any]:
    """Return the variables, some of them possibly in 8 bits, sharded as `variable_shardings` says, whose errors it raises.

    With `donate` every given array is deleted once it is moved; none may be used afterwards.
    """

    def move(array: jax.Array, sharding: NamedSharding) -> jax.Array:
        # An array that is already in place is returned as it is: it shares its memory with the given one.
        if isinstance(array, jax.Array) and array.sharding.is_equivalent_to(sharding, array.ndim):
            return array
        moved = jax.device_put(array, sharding)
        if donate:
            release(array, moved)
        return moved

    def place(variable: Any, sharding: NamedSharding) -> Any:
        if not isinstance(variable, QuantizedArray):
            return move(variable, sharding)
        scale_inv = move(variable.scale_inv, scale_sharding(sharding, variable.depth))
        return dataclasses.replace(variable, values=move(variable.values, sharding), scale_inv=scale_inv)

    return jax.tree.map(place, variables, variable_shardings(config, mesh, rules), is_leaf=is_quantized)


def scale_sharding(sharding: NamedSharding, depth: int) -> NamedSharding:
    """Return the sharding of the scales of an 8-bit weight with `depth` stack axes: split by experts only, as the weight.

    Their blocks may cross the edges of a device's part of the weight, so `shard_map_spec` splits these 1/4000 of its bytes.
    """
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:depth]))


def unrolled_axes(config: ModelConfig) -> dict[str, Any]:
    """Return the logical axes of the variables of an unrolled model, including those that `with_absorbed_weights` adds."""

    def unrolled(collection: dict[str, Any]) -> dict[str, Any]:
        out = {name: tree for name, tree in collection.items() if name not in STACKS}
        for name, size in stack_sizes(config).items():
            if name in collection:
                layer = jax.tree.map(lambda axes: axes[1:], collection[name], is_leaf=lambda leaf: isinstance(leaf, tuple))
                out |= {f"{name}_{i}": layer for i in range(size)}
        return out

    axes = {collection: unrolled(tree) for collection, tree in logical_axes(config).items()}
    return axes | {"absorbed": absorbed(axes["params"], lambda kernel: ABSORBED_AXES)}
