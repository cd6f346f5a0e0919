"""AdamW of the report (section 4.2): clipping by global norm, decoupled decay, both moments in bfloat16 (`moment_dtype`).

optax can store only the first moment in another dtype, hence `scale_by_adam` here.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsv3_jax.config import OptimizerConfig


def scale_by_adam(beta1: float, beta2: float, epsilon: float, moment_dtype: str) -> optax.GradientTransformation:
    """Return Adam's rescaling, computed in float32, with both moments stored in `moment_dtype`."""

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = optax.tree.zeros_like(params, dtype=moment_dtype)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        count = state.count + 1
        correction1 = 1 - beta1 ** count.astype(jnp.float32)
        correction2 = 1 - beta2 ** count.astype(jnp.float32)

        def moment(old: jax.Array, new: jax.Array, decay: float) -> jax.Array:
            return decay * old.astype(jnp.float32) + (1 - decay) * new

        mu = jax.tree.map(lambda m, g: moment(m, g.astype(jnp.float32), beta1), state.mu, grads)
        nu = jax.tree.map(lambda v, g: moment(v, jnp.square(g.astype(jnp.float32)), beta2), state.nu, grads)
        updates = jax.tree.map(lambda m, v: (m / correction1) / (jnp.sqrt(v / correction2) + epsilon), mu, nu)
        stored = (jax.tree.map(lambda x: x.astype(moment_dtype), tree) for tree in (mu, nu))
        return updates, optax.ScaleByAdamState(count, *stored)

    return optax.GradientTransformation(init, update)


def decayed(params: Any) -> Any:
    """Return the mask of weight decay, a tree of bools: False for norm scales (leaves named "scale"), else True."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return the chain of clipping, Adam and weight decay, from gradients to the update that a learning rate of 1 subtracts."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        scale_by_adam(config.beta1, config.beta2, config.epsilon, config.moment_dtype),
        optax.add_decayed_weights(config.weight_decay, decayed),
    )
