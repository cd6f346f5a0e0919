"""Where the variables of a model live on a mesh: their logical axes under the sharding rules."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.block_scaled import BlockScaled, is_block_scaled
from dsv3_jax.model.model import init_variables, logical_axes
from dsv3_jax.parallel.rules import named_shardings


def variable_shardings(config: ModelConfig, mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """The sharding of every variable: a tree like `init_variables`' with NamedShardings as leaves.

    Raises:
      ValueError: naming the variable, if a dimension is no multiple of the mesh axes it is split along.
    """
    shapes = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    return named_shardings(logical_axes(config), shapes, mesh)


def place_variables(variables: dict[str, Any], config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """Variables that live elsewhere, moved to where `variable_shardings` says; those in 8 bits too. Raises as it."""

    def place(variable: Any, sharding: NamedSharding) -> Any:
        if not isinstance(variable, BlockScaled):
            return jax.device_put(variable, sharding)
        scale_inv = jax.device_put(variable.scale_inv, scale_sharding(sharding, variable.depth))
        return dataclasses.replace(variable, values=jax.device_put(variable.values, sharding), scale_inv=scale_inv)

    return jax.tree.map(place, variables, variable_shardings(config, mesh), is_leaf=is_block_scaled)


def scale_sharding(sharding: NamedSharding, depth: int) -> NamedSharding:
    """Of the scales of an 8-bit weight with `depth` stack axes: split by experts as the weight is, the rest on every device.

    They are a four-thousandth of its bytes. Blocks need not end where a device's part of the weight does, so what of them a
    device needs is found out where it is needed (`parallel/placement.py`).
    """
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:depth]))
