"""DeepSeekMoE (section 2.1.2 of the report): many small routed experts, a few of them per token, and a shared expert.

No capacity and no dropped tokens: the tokens' choices are sorted by expert, and the experts process groups of any size.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.experts import choose_backend, combine, dispatch, expert_ffn, sort_by_expert
from dsv3_jax.kernels.quantized import in_dtype
from dsv3_jax.model.layers import SwiGLU, normal_init
from dsv3_jax.parallel.all_to_all import WEIGHT_AXES, ExpertWeights, routed_experts_on_mesh
from dsv3_jax.parallel.mesh import current_mesh, current_platform
from dsv3_jax.parallel.replicas import Replicas
from dsv3_jax.parallel.sharding import project


class MoE(nn.Module):
    """The feed-forward of an MoE block: Shared(x) + sum_k weight_k Expert_k(x) (eq. 12)."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        self.gate = Router(config)
        self.experts = Experts(config)
        if config.n_shared_experts:
            self.shared_experts = SwiGLU(config, config.n_shared_experts * config.moe_intermediate_size)

    def __call__(self, x_BTD: jax.Array, token_mask_BT: jax.Array | None = None) -> tuple[jax.Array, Routing, jax.Array]:
        """Return the output, the routing, and the number of exchange rounds; `token_mask_BT` as in `Router`."""
        routing = self.gate(x_BTD, token_mask_BT)
        y_BTD, rounds = self.experts(x_BTD, routing.chosen_BTK, routing.weight_BTK)
        if self.config.n_shared_experts:
            y_BTD += self.shared_experts(x_BTD)
        return y_BTD, routing, rounds


class Experts(nn.Module):
    """The routed experts: E SwiGLUs of F hidden units, their weights stacked.

    With variables from `place_experts` the stack holds P >= E slots with copies of the experts, and choices become slots.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, chosen_BTK: jax.Array, weight_BTK: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return sum_k weight_k * Expert_{chosen_k}(x), summed in float32, [B, T, D], and the number of exchange rounds."""
        c = self.config
        E, D, F = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        replicas: Replicas | None = self.get_variable("placement", "copies")
        if replicas is not None:
            E, chosen_BTK = replicas.expert_P.shape[0], replicas.slots(chosen_BTK)
        shapes = (E, D, F), (E, D, F), (E, F, D)
        gate, up, down = (
            self.param(f"{name}_proj", normal_init(c, axes), shape, c.param_dtype)
            for name, axes, shape in zip(("gate", "up", "down"), WEIGHT_AXES, shapes, strict=True)
        )
        backend = choose_backend(c.expert_backend, c.dtype, current_platform())
        if current_mesh() is not None:
            return routed_experts_on_mesh(x_BTD, chosen_BTK, weight_BTK, (gate, up, down), c, backend)
        y_TD = routed_experts(x_BTD.reshape(-1, D), chosen_BTK, weight_BTK, (gate, up, down), c, backend)
        return y_TD.reshape(x_BTD.shape), jnp.int32(1)


def routed_experts(
    x_TD: jax.Array, chosen_BTK: jax.Array, weight_BTK: jax.Array, weights: ExpertWeights, config: ModelConfig, backend: str
) -> jax.Array:
    """Return sum_k weight_k * Expert_{chosen_k}(x) on one device: [T, D]."""
    chosen_TK, weight_TK = (array.reshape(-1, config.num_experts_per_tok) for array in (chosen_BTK, weight_BTK))
    order, inverse, group_sizes_E = sort_by_expert(chosen_TK, weights[0].shape[0])
    rows_RD = dispatch(x_TD, order, inverse)
    y_RD = expert_ffn(rows_RD, *in_dtype(weights, config.dtype), group_sizes_E, backend=backend)
    return combine(y_RD, weight_TK, order, inverse)


# ----------------------------------------------------------------------------------------------------------------------
# The router: the experts of each token and their weights (eqs. 13-16), the balance loss, and the bias update.


KERNEL_AXES = "embed", "router"


class Routing(NamedTuple):
    """Experts of each token and their weights, the load of each expert, and the balance loss."""

    chosen_BTK: jax.Array  # Expert ids, int32, best first.
    weight_BTK: jax.Array  # Their weights in the sum of expert outputs, float32.
    load_E: jax.Array  # Number of (unmasked) tokens per expert, float32.
    balance_loss: jax.Array  # Sequence-wise balance loss without its factor alpha: a float32 scalar.


class Router(nn.Module):
    """Sigmoid gate: the top K experts by score + bias, within the best groups; the weights are from scores without bias."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, token_mask_BT: jax.Array | None = None) -> Routing:
        """Route every token; those outside `token_mask_BT` (bool; None for all) do not count in load and balance loss."""
        config = self.config
        E = config.n_routed_experts
        kernel_DE = self.param("kernel", normal_init(config, KERNEL_AXES), (config.hidden_size, E), config.param_dtype)
        zeros = nn.with_logical_partitioning(jnp.zeros, ("router",))
        bias = self.variable("router", "e_score_correction_bias", zeros, (E,), jnp.float32)
        # HIGHEST: by default a TPU rounds a float32 product to bfloat16, and other experts win.
        logits_BTE = project(x_BTD.astype(jnp.float32), kernel_DE, KERNEL_AXES, precision=jax.lax.Precision.HIGHEST)
        score_BTE = nn.sigmoid(logits_BTE)
        chosen_BTK = choose_experts(score_BTE + bias.value, config)
        if token_mask_BT is None:
            token_mask_BT = jnp.ones(chosen_BTK.shape[:2], bool)
        return Routing(
            chosen_BTK,
            expert_weights(score_BTE, chosen_BTK, config),
            expert_load(chosen_BTK, token_mask_BT, E),
            sequence_balance_loss(score_BTE, token_mask_BT, config.num_experts_per_tok),
        )


def choose_experts(biased_BTE: jax.Array, config: ModelConfig) -> jax.Array:
    """Return the K best experts of the best `topk_group` groups (by the sum of their two best): [B, T, K] int32, best first."""
    G, E = config.n_group, config.n_routed_experts
    if G > 1:
        grouped_BTGe = biased_BTE.reshape(*biased_BTE.shape[:-1], G, E // G)
        group_score_BTG = jax.lax.top_k(grouped_BTGe, 2)[0].sum(-1)
        kept = jax.lax.top_k(group_score_BTG, config.topk_group)[1]
        kept_BTG = jnp.any(kept[..., None] == jnp.arange(G), axis=-2)
        # -inf and not 0: a biased score can be negative, and must still beat a masked one.
        biased_BTE = jnp.where(kept_BTG[..., None], grouped_BTGe, -jnp.inf).reshape(biased_BTE.shape)
    return jax.lax.top_k(biased_BTE, config.num_experts_per_tok)[1]


def expert_weights(score_BTE: jax.Array, chosen_BTK: jax.Array, config: ModelConfig) -> jax.Array:
    """Return the chosen experts' unbiased scores, normalised under `norm_topk_prob`, and scaled: [B, T, K] float32."""
    one_hot_BTKE = chosen_BTK[..., None] == jnp.arange(score_BTE.shape[-1])
    weight_BTK = jnp.sum(jnp.where(one_hot_BTKE, score_BTE[..., None, :], 0.0), axis=-1)
    if config.norm_topk_prob:
        weight_BTK /= weight_BTK.sum(-1, keepdims=True) + 1e-20
    return weight_BTK * config.routed_scaling_factor


def expert_load(chosen_BTK: jax.Array, token_mask_BT: jax.Array, num_experts: int) -> jax.Array:
    """Return the number of unmasked tokens per expert: [E] float32, exact up to 2^24."""
    hits_BTKE = (chosen_BTK[..., None] == jnp.arange(num_experts)) & token_mask_BT[..., None, None]
    return jnp.sum(hits_BTKE, axis=(0, 1, 2), dtype=jnp.float32)


def sequence_balance_loss(score_BTE: jax.Array, token_mask_BT: jax.Array, num_chosen: int) -> jax.Array:
    """Return the mean over sequences of sum_i f_i P_i over unmasked tokens (eqs. 17-20), without alpha; 1 for uniform scores.

    As in the report, f_i counts tokens with expert i among the K largest *unbiased, ungrouped* scores.
    """
    E = score_BTE.shape[-1]
    token_mask_BT1 = token_mask_BT[..., None].astype(jnp.float32)
    num_tokens_B1 = jnp.maximum(token_mask_BT1.sum(1), 1.0)
    top_BTK = jax.lax.top_k(score_BTE, num_chosen)[1]
    in_top_BTE = jnp.any(top_BTK[..., None] == jnp.arange(E), axis=-2) * token_mask_BT1
    fraction_BE = jax.lax.stop_gradient(in_top_BTE.sum(1)) * E / (num_chosen * num_tokens_B1)
    share_BTE = score_BTE / score_BTE.sum(-1, keepdims=True)
    share_BE = (share_BTE * token_mask_BT1).sum(1) / num_tokens_B1
    return jnp.mean(jnp.sum(fraction_BE * share_BE, axis=-1))


def updated_bias(bias_E: jax.Array, load_E: jax.Array, speed: float | jax.Array) -> jax.Array:
    """Return the biases after a step: less by `speed` (gamma) for overloaded experts, more by `speed` for underloaded ones.

    `load_E` sums over the *whole* global batch; leading axes (layers) are independent.
    """
    return bias_E - speed * jnp.sign(load_E - load_E.mean(-1, keepdims=True))


def max_violation(load_E: jax.Array) -> jax.Array:
    """Return max_i load_i / mean - 1, the excess of the most loaded expert; the largest one over leading axes."""
    return jnp.max(load_E.max(-1) / jnp.maximum(load_E.mean(-1), 1.0) - 1.0)
