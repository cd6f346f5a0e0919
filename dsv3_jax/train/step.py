"""One optimizer step: gradient of the objective, AdamW, and the update of the router biases.

The biases move against the load of the whole global batch (sections 2.1.2 and 4.2 of the report).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.config.run import StepHyperparams
from dsv3_jax.kernels.attention import choose_attention
from dsv3_jax.kernels.experts import choose_backend
from dsv3_jax.model import training_loss
from dsv3_jax.model.losses import Batch, Losses, depth_weights
from dsv3_jax.model.moe import max_violation, updated_bias
from dsv3_jax.model.sharding import variable_shardings
from dsv3_jax.parallel.all_to_all import choose_exchange
from dsv3_jax.parallel.devices import TPU_OPTIONS
from dsv3_jax.parallel.mesh import current_mesh, current_platform
from dsv3_jax.parallel.sharding import MICRO_BATCHES
from dsv3_jax.train.optimizer import make_optimizer
from dsv3_jax.train.state import TrainState, state_shardings

Metrics = dict[str, jax.Array]


def compile_train_step(config: Config, mesh: Mesh) -> Any:
    """Return `train_step` under `jax.jit`, for a mesh; call (or lower) it under `jax.set_mesh(mesh)`.

    The state is donated, the batch split along the mesh; metrics and loads are replicated.
    """
    state, replicated = state_shardings(config, mesh), NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        functools.partial(train_step, config=config),
        in_shardings=(state, NamedSharding(mesh, MICRO_BATCHES), replicated),
        out_shardings=(state, replicated, replicated),
        donate_argnums=0,
        compiler_options=TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None,
    )


def describe_backends(config: ModelConfig, mesh: Mesh, documents: bool = False) -> str:
    """Return the backends of attention, experts and exchange on the mesh, in words; `documents`: attention keeps them apart."""
    with jax.set_mesh(mesh):
        experts = choose_backend(config.expert_backend, config.dtype, current_platform())
        widths = config.qk_head_dim, config.v_head_dim
        attention = choose_attention(config.attention_backend, config.dtype, widths, current_platform(), documents)
        exchange = choose_exchange(config.expert_exchange, current_platform(), mesh.shape["expert"])
    return f"attention by {attention}, experts by {experts}" + (f", exchange {exchange}" if exchange != "local" else "")


def train_step(
    state: TrainState, batch: Batch, values: StepHyperparams, *, config: Config
) -> tuple[TrainState, Metrics, dict[str, jax.Array]]:
    """Take one step; pure, for `compile_train_step`.

    A loss or gradient that is not finite leaves everything except the step count as it was, on all devices.

    Returns:
      The state after; the step's float32 scalars: `loss` and its parts, `grad_norm` (before clipping), `skipped` (1 if the
      step was, else 0), `exchange_rounds` (the most of any layer), `max_violation`; and the tokens per expert, [L, E] or [E].
    """
    grads, losses = gradients(state, batch, values, config)
    norm = optax.tree.norm(grads)
    updates, optimizer = make_optimizer(config.optimizer).update(grads, state.optimizer, state.params)
    finite = jnp.isfinite(losses.loss) & jnp.isfinite(norm)
    taken = TrainState(
        step=state.step,
        params=optax.apply_updates(state.params, jax.tree.map(lambda update: -values.learning_rate * update, updates)),
        router=updated_biases(state.router, losses.load, values.bias_update_speed),
        optimizer=optimizer,
    )
    after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), taken, state).replace(step=state.step + 1)
    metrics = {
        "loss": losses.loss,
        "main_loss": losses.main_loss,
        "mtp_loss": losses.mtp_loss,
        "balance_loss": losses.balance_loss,
        "grad_norm": norm,
        "skipped": 1 - finite.astype(jnp.float32),
        "exchange_rounds": losses.rounds.astype(jnp.float32),
        "max_violation": jnp.max(jnp.stack([max_violation(load) for load in losses.load.values()] or [jnp.float32(0)])),
    }
    return after, metrics, losses.load


def gradients(state: TrainState, batch: Batch, values: StepHyperparams, config: Config) -> tuple[Any, Losses]:
    """Return the gradient of the objective over the first `values.micro_batches` micro-batches of [A, B, T], and the losses."""
    depths = range(config.model.num_nextn_predict_layers + 1)
    num_micro_batches = batch.tokens_ABT.shape[0]

    def part(batch_BT: Batch, share: Any, totals: Any) -> tuple[Any, Losses]:
        def objective(params: Any) -> tuple[jax.Array, Losses]:
            tokens, targets, weights, starts = batch_BT
            arguments = params, state.router, config.model, tokens, targets, values.mtp_loss_weight, weights, starts
            losses = training_loss(*arguments, aux_loss_alpha=values.aux_loss_alpha, totals=totals, share=share)
            return losses.loss, losses

        return jax.grad(objective, has_aux=True)(state.params)

    if num_micro_batches == 1:
        return part(jax.tree.map(lambda array: array[0], batch), 1.0, None)

    # Totals over the whole step come first: a micro-batch's loss is then its part of the step's mean.
    weigh = jax.vmap(depth_weights, (0, 0, None))
    totals = [weigh(batch.loss_weight_ABT, batch.segment_starts_ABT, depth).sum() for depth in depths]
    share = 1 / values.micro_batches.astype(jnp.float32)

    def add(number: jax.Array, so_far: tuple[Any, Losses]) -> tuple[Any, Losses]:
        grads, losses = part(jax.tree.map(lambda array: array[number], batch), share, totals)
        summed, total = so_far
        summed = jax.tree.map(lambda sum_, grad: sum_ + grad.astype(jnp.float32), summed, grads)
        rounds = jnp.maximum(total.rounds, losses.rounds)
        return summed, jax.tree.map(jnp.add, total, losses)._replace(rounds=rounds)

    shapes = jax.eval_shape(functools.partial(part, share=share, totals=totals), jax.tree.map(lambda array: array[0], batch))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[1])
    start = _shard_like_params(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes[0]), config.model)
    summed, losses = jax.lax.fori_loop(0, values.micro_batches, add, (start, zeros))
    return jax.tree.map(lambda sum_, leaf: sum_.astype(leaf.dtype), summed, shapes[0]), losses


def _shard_like_params(tree: Any, config: ModelConfig) -> Any:
    """Constrain every leaf of a tree like the parameters to its parameter's sharding; without a mesh return it as it is."""
    mesh = current_mesh()
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, variable_shardings(config, mesh)["params"])


def updated_biases(router: dict[str, Any], load: dict[str, jax.Array], speed: float | jax.Array) -> dict[str, Any]:
    """Return the router collection with biases moved by `speed` against `load`, the tokens per expert by stack or MTP depth."""
    return {
        name: jax.tree.map(lambda bias, name=name: updated_bias(bias, load[name], speed), biases)
        for name, biases in router.items()
    }
