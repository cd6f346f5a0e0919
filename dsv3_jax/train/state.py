"""The state of a training run: its arrays, their shapes and their shardings."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import Config
from dsv3_jax.kernels.quantized import check_trainable
from dsv3_jax.model import abstract_variables, init_variables
from dsv3_jax.model.sharding import variable_shardings
from dsv3_jax.train.optimizer import make_optimizer


@struct.dataclass
class TrainState:
    """The state of a run after `step` optimizer steps."""

    step: jax.Array
    """Number of steps done, skipped ones included, int32 scalar."""
    params: Any
    """Parameters, trained by the gradient."""
    router: Any
    """Expert biases, float32: moved by the load, never by the optimizer."""
    optimizer: Any
    """Adam's moments and counts."""

    @property
    def variables(self) -> dict[str, Any]:
        """Variables of the model: its collections `params` and `router`."""
        return {"params": self.params, "router": self.router}


def init_state(config: Config) -> TrainState:
    """Return a state at step 0 with random parameters, from `train.seed`; run it under `jax.jit`."""
    return state_of(config, init_variables(config.model, jax.random.key(config.train.seed)))


def state_of(config: Config, variables: dict[str, Any]) -> TrainState:
    """Return a state at step 0 with the given variables and zero moments.

    Raises:
      ValueError: if they hold weights in FP8, which have no gradient.
    """
    check_trainable(variables["params"])
    optimizer = make_optimizer(config.optimizer).init(variables["params"])
    return TrainState(jnp.zeros([], jnp.int32), variables["params"], variables["router"], optimizer)


def abstract_state(config: Config) -> TrainState:
    """Return the shapes and dtypes of a state, as `jax.ShapeDtypeStruct`s."""
    return jax.eval_shape(functools.partial(state_of, config), abstract_variables(config.model))


def state_shardings(config: Config, mesh: Mesh | AbstractMesh) -> Any:
    """Return a TrainState of shardings: variables by their rules, moments like their parameters, counts replicated.

    Raises:
      ValueError: naming the variable, if a dimension is no multiple of the mesh axes it is split along.
    """
    variables = variable_shardings(config.model, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    optimizer = optax.tree.map_params(
        make_optimizer(config.optimizer),
        lambda _, sharding: sharding,
        abstract_state(config).optimizer,
        variables["params"],
        transform_non_params=lambda _: replicated,
    )
    step: Any = replicated
    return TrainState(step, **variables, optimizer=optimizer)
