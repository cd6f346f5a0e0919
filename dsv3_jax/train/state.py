"""Everything a training run carries from one step to the next."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import Config
from dsv3_jax.kernels.quantized import check_trainable
from dsv3_jax.model import init_variables
from dsv3_jax.model.sharding import variable_shardings
from dsv3_jax.train.optimizer import make_optimizer


@struct.dataclass
class TrainState:
    """The state of a run after `step` optimizer steps."""

    step: jax.Array
    """Steps taken, int32."""
    params: Any
    """What the gradient trains."""
    router: Any
    """The expert biases, float32, moved by the load and never by the optimizer."""
    optimizer: Any
    """Adam's moments and counts."""

    @property
    def variables(self) -> dict[str, Any]:
        """What the model is applied with."""
        return {"params": self.params, "router": self.router}


def init_state(config: Config) -> TrainState:
    """A fresh state from `train.seed`; run it under `jax.jit` (or `jax.eval_shape`)."""
    variables = init_variables(config.model, jax.random.key(config.train.seed))
    return state_of(config, variables)


def state_shardings(config: Config, mesh: Mesh | AbstractMesh) -> Any:
    """Where each array of the state lives, as a TrainState of shardings.

    Moments live beside their parameters, what is no parameter on every device.

    Raises:
      ValueError: naming the variable, if a dimension is no multiple of the mesh axes it is split along.
    """
    variables = variable_shardings(config.model, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(lambda: init_state(config))
    optimizer = optax.tree.map_params(
        make_optimizer(config.optimizer),
        lambda _, sharding: sharding,
        shapes.optimizer,
        variables["params"],
        transform_non_params=lambda _: everywhere,
    )
    step: Any = everywhere
    return TrainState(step, **variables, optimizer=optimizer)


def state_of(config: Config, variables: dict[str, Any]) -> TrainState:
    """A state at step 0 around given variables.

    Raises:
      ValueError: if they hold weights in FP8, which have no gradient.
    """
    check_trainable(variables["params"])
    optimizer = make_optimizer(config.optimizer).init(variables["params"])
    return TrainState(jnp.zeros([], jnp.int32), variables["params"], variables["router"], optimizer)
