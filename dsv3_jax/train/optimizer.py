"""AdamW as the report trains with it (section 4.2): clipping by global norm, decoupled decay, moments in bfloat16.

optax stores the first moment in a dtype of choice, but not the second: `scale_by_adam` here does both.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsv3_jax.config import OptimizerConfig


def scale_by_adam(beta1: float, beta2: float, epsilon: float, moment_dtype: str) -> optax.GradientTransformation:
    """Adam's rescaling, computed in float32, with both moments stored in `moment_dtype`."""

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = optax.tree.zeros_like(params, dtype=moment_dtype)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        del params
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
    """Which parameters decay: every matrix, and no norm scale. A tree of bools like `params`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optimizer of a run: takes gradients of the parameters, gives what a learning rate of 1 would subtract from them."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        scale_by_adam(config.beta1, config.beta2, config.epsilon, config.moment_dtype),
        optax.add_decayed_weights(config.weight_decay, decayed),
    )
