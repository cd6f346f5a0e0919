"""One optimizer step, and the loss of held-out batches: the two functions a run compiles.

The step follows sections 2.1.2 and 4.2 of the report: gradient of the whole objective, AdamW, and then the router
biases, moved against the load of the whole global batch.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.kernels.attention import choose_attention
from dsv3_jax.kernels.expert_ffn import choose_backend
from dsv3_jax.model import DeepSeekV3, training_loss
from dsv3_jax.model.losses import cross_entropy
from dsv3_jax.model.router import max_violation, updated_bias
from dsv3_jax.parallel.compilation import TPU_OPTIONS
from dsv3_jax.parallel.exchange import choose_exchange
from dsv3_jax.parallel.mesh import current_platform
from dsv3_jax.parallel.rules import TOKENS
from dsv3_jax.train.optimizer import learning_rate_schedule, make_optimizer
from dsv3_jax.train.state import TrainState, state_shardings

Metrics = dict[str, jax.Array]


def compile_train_step(config: Config, mesh: Mesh) -> Any:
    """`train_step` as a run compiles it for a mesh; call (or lower) it under `jax.set_mesh(mesh)`.

    It takes the state, whose memory it reuses, and a batch split along the mesh, and returns the state after and the
    metrics, which are the same on every device.
    """
    state, batch, everywhere = state_shardings(config, mesh), NamedSharding(mesh, TOKENS), NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        functools.partial(train_step, config=config),
        in_shardings=(state, batch, batch),
        out_shardings=(state, everywhere),
        donate_argnums=0,
        compiler_options=TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None,
    )


def describe_backends(config: ModelConfig, mesh: Mesh) -> str:
    """What the model's programs will compute with on the mesh, for the line printed at start."""
    with jax.set_mesh(mesh):
        experts = choose_backend(config.expert_backend, config.dtype, current_platform())
        widths = config.qk_head_dim, config.v_head_dim
        attention = choose_attention(config.attention_backend, config.dtype, widths, current_platform())
        exchange = choose_exchange(config.expert_exchange, current_platform(), mesh.shape["expert"])
    return f"attention by {attention}, experts by {experts}" + (f", exchange {exchange}" if exchange != "local" else "")


def train_step(state: TrainState, tokens_BT: jax.Array, target_BT: jax.Array, *, config: Config) -> tuple[TrainState, Metrics]:
    """Takes one step; pure, for `compile_train_step`.

    Args:
      state: the state before.
      tokens_BT: the batch's input tokens.
      target_BT: the tokens one further on.
      config: the run.

    Returns:
      The state after, and the step's float32 scalars: `loss` and its parts, `grad_norm` (before clipping),
      `learning_rate`, `exchange_rounds` (the most of any layer), `max_violation`.
    """

    def objective(params: Any) -> tuple[jax.Array, Any]:
        losses = training_loss(params, state.router, config.model, tokens_BT, target_BT, config.train.mtp_loss_weight)
        return losses.loss, losses

    grads, losses = jax.grad(objective, has_aux=True)(state.params)
    updates, optimizer = make_optimizer(config).update(grads, state.optimizer, state.params)
    metrics = {
        "loss": losses.loss,
        "main_loss": losses.main_loss,
        "mtp_loss": losses.mtp_loss,
        "balance_loss": losses.balance_loss,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": jnp.asarray(learning_rate_schedule(config.optimizer, config.train.steps)(state.step), jnp.float32),
        "exchange_rounds": losses.rounds.astype(jnp.float32),
        "max_violation": jnp.max(jnp.stack([max_violation(load) for load in losses.load.values()] or [jnp.float32(0)])),
    }
    after = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        router=moved_biases(state.router, losses.load, config.train.bias_update_speed),
        optimizer=optimizer,
    )
    return after, metrics


def moved_biases(router: dict[str, Any], load: dict[str, jax.Array], speed: float) -> dict[str, Any]:
    """The router collection after the bias rule; `load` holds, per stack or MTP depth, its one bias array's loads."""
    return {
        name: jax.tree.map(lambda bias, name=name: updated_bias(bias, load[name], speed), biases)
        for name, biases in router.items()
    }


def heldout_loss(
    variables: dict[str, Any], tokens_BT: jax.Array, target_BT: jax.Array, weight_BT: jax.Array, *, config: ModelConfig
) -> jax.Array:
    """Weighted sum over tokens of the next-token cross entropy, in nats: a float32 scalar, for `jax.jit`."""
    features = DeepSeekV3(config).apply(variables, tokens_BT, method="features")
    head_DV = variables["params"]["lm_head"]["kernel"]
    return cross_entropy(features.h_BTD, head_DV, target_BT, weight_BT, config.loss_chunk)
