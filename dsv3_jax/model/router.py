"""The gate of DeepSeekMoE (section 2.1.2 of the report): which experts a token visits, and how much of each.

Scores are sigmoids in float32. A bias per expert joins the score for the *choice* only; it is moved by
`updated_bias` after each step, against the load, and never by a gradient. Groups of experts are scored by their two
best members, so that a token stays within `topk_group` groups (and, laid out along the mesh, within as many hosts).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import normal_init
from dsv3_jax.parallel.sharding import project

KERNEL_AXES = "embed", "router"


class Routing(NamedTuple):
    """Where the tokens go."""

    chosen_BTK: jax.Array
    """Expert ids, int32, best first."""
    weight_BTK: jax.Array
    """Their float32 weights in the sum of expert outputs."""
    load_E: jax.Array
    """How many (counted) tokens chose each expert, float32."""
    balance_loss: jax.Array
    """The sequence-wise balance loss without its factor alpha: a float32 scalar."""


class Router(nn.Module):
    """Sigmoid gate with biased, group-limited top-k choice."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, counted_BT: jax.Array | None = None) -> Routing:
        """Routes every token; those outside `counted_BT` (bool) are routed too, but enter no statistic."""
        config = self.config
        E = config.n_routed_experts
        shape = config.hidden_size, E
        kernel_DE = self.param("kernel", normal_init(config, KERNEL_AXES), shape, config.param_dtype)
        bias = self.variable("router", "e_score_correction_bias", _zero_bias, E)
        # HIGHEST: on TPU a float32 product is otherwise rounded to bfloat16, and the choice flips.
        logits_BTE = project(x_BTD.astype(jnp.float32), kernel_DE, KERNEL_AXES, precision=jax.lax.Precision.HIGHEST)
        score_BTE = nn.sigmoid(logits_BTE)
        chosen_BTK = choose_experts(score_BTE + bias.value, config)
        if counted_BT is None:
            counted_BT = jnp.ones(chosen_BTK.shape[:2], bool)
        return Routing(
            chosen_BTK,
            expert_weights(score_BTE, chosen_BTK, config),
            expert_load(chosen_BTK, counted_BT, E),
            sequence_balance_loss(score_BTE, counted_BT, config.num_experts_per_tok),
        )


def _zero_bias(num_experts: int) -> nn.LogicallyPartitioned:
    return nn.with_logical_partitioning(jnp.zeros, ("router",))((num_experts,), jnp.float32)


def choose_experts(biased_BTE: jax.Array, config: ModelConfig) -> jax.Array:
    """The K best experts of the best `topk_group` groups: [B, T, K] int32, best first."""
    G, E = config.n_group, config.n_routed_experts
    if G > 1:
        grouped_BTGe = biased_BTE.reshape(*biased_BTE.shape[:-1], G, E // G)
        group_score_BTG = jax.lax.top_k(grouped_BTGe, 2)[0].sum(-1)
        kept = jax.lax.top_k(group_score_BTG, config.topk_group)[1]
        kept_BTG = jnp.any(kept[..., None] == jnp.arange(G), axis=-2)
        # -inf and not 0: biases make scores negative, and a masked expert must lose to those too.
        biased_BTE = jnp.where(kept_BTG[..., None], grouped_BTGe, -jnp.inf).reshape(biased_BTE.shape)
    return jax.lax.top_k(biased_BTE, config.num_experts_per_tok)[1]


def expert_weights(score_BTE: jax.Array, chosen_BTK: jax.Array, config: ModelConfig) -> jax.Array:
    """The unbiased scores of the chosen experts, normalised if the config says so, and scaled: [B, T, K] float32."""
    one_hot_BTKE = chosen_BTK[..., None] == jnp.arange(score_BTE.shape[-1])
    weight_BTK = jnp.sum(jnp.where(one_hot_BTKE, score_BTE[..., None, :], 0.0), axis=-1)
    if config.norm_topk_prob:
        weight_BTK /= weight_BTK.sum(-1, keepdims=True) + 1e-20
    return weight_BTK * config.routed_scaling_factor


def expert_load(chosen_BTK: jax.Array, counted_BT: jax.Array, num_experts: int) -> jax.Array:
    """Counted tokens that chose each expert: [E] float32, exact up to 2^24 tokens an expert."""
    hits_BTKE = (chosen_BTK[..., None] == jnp.arange(num_experts)) & counted_BT[..., None, None]
    return jnp.sum(hits_BTKE, axis=(0, 1, 2), dtype=jnp.float32)


def sequence_balance_loss(score_BTE: jax.Array, counted_BT: jax.Array, num_chosen: int) -> jax.Array:
    """Mean over sequences of sum_i f_i P_i (eqs. 17-20), which is 1 for scores without preference.

    f_i counts the tokens whose top K *unbiased, ungrouped* scores include expert i, as printed in the report.
    """
    E = score_BTE.shape[-1]
    counted_BT1 = counted_BT[..., None].astype(jnp.float32)
    num_tokens_B1 = jnp.maximum(counted_BT1.sum(1), 1.0)
    top_BTK = jax.lax.top_k(score_BTE, num_chosen)[1]
    in_top_BTE = jnp.any(top_BTK[..., None] == jnp.arange(E), axis=-2) * counted_BT1
    fraction_BE = jax.lax.stop_gradient(in_top_BTE.sum(1)) * E / (num_chosen * num_tokens_B1)
    share_BTE = score_BTE / score_BTE.sum(-1, keepdims=True)
    share_BE = (share_BTE * counted_BT1).sum(1) / num_tokens_B1
    return jnp.mean(jnp.sum(fraction_BE * share_BE, axis=-1))


def updated_bias(bias_E: jax.Array, load_E: jax.Array, speed: float | jax.Array) -> jax.Array:
    """The bias rule: overloaded experts go down by `speed`, underloaded ones up, those at the mean stay.

    Args:
      bias_E: biases, float32; leading axes (layers) are carried along.
      load_E: tokens that chose each expert, summed over the *whole* global batch.
      speed: gamma.
    """
    return bias_E - speed * jnp.sign(load_E - load_E.mean(-1, keepdims=True))


def max_violation(load_E: jax.Array) -> jax.Array:
    """How far the busiest expert exceeds the mean, max_i load_i / mean - 1; over leading axes, the largest."""
    return jnp.max(load_E.max(-1) / jnp.maximum(load_E.mean(-1), 1.0) - 1.0)
