"""Where the variables of a model live on a mesh: their logical axes under the sharding rules."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.model import init_variables, logical_axes
from dsv3_jax.parallel.rules import named_shardings


def variable_shardings(config: ModelConfig, mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """The sharding of every variable: a tree like `init_variables`' with NamedShardings as leaves.

    Raises:
      ValueError: naming the variable, if a dimension is no multiple of the mesh axes it is split along.
    """
    shapes = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    return named_shardings(logical_axes(config), shapes, mesh)
