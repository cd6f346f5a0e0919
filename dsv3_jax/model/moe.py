"""DeepSeekMoE (section 2.1.2 of the report): many small routed experts, chosen per token, and a shared one.

No capacity and no dropping: the tokens' choices are sorted by expert, and the experts work through groups of
whatever size that gives.
"""

from __future__ import annotations

import jax
from flax import linen as nn

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.expert_ffn import choose_backend, expert_ffn
from dsv3_jax.kernels.permute import combine, dispatch, sort_by_expert
from dsv3_jax.model.layers import SwiGLU, normal_init
from dsv3_jax.model.router import Router, Routing


class Experts(nn.Module):
    """The routed experts: E SwiGLUs of F hidden units, their weights stacked."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, chosen_BTK: jax.Array, weight_BTK: jax.Array) -> jax.Array:
        """sum_k weight_k * Expert_{chosen_k}(x), the sum in float32: [B, T, D]."""
        c = self.config
        E, D, F = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        wide, narrow = ("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed")
        w_gate_EDF = self.param("gate_proj", normal_init(c, wide), (E, D, F), c.param_dtype)
        w_up_EDF = self.param("up_proj", normal_init(c, wide), (E, D, F), c.param_dtype)
        w_down_EFD = self.param("down_proj", normal_init(c, narrow), (E, F, D), c.param_dtype)

        x_TD = x_BTD.reshape(-1, D)
        chosen_TK = chosen_BTK.reshape(-1, c.num_experts_per_tok)
        order, inverse, group_sizes_E = sort_by_expert(chosen_TK, E)
        y_RD = expert_ffn(
            dispatch(x_TD, order, inverse),
            w_gate_EDF.astype(c.dtype),
            w_up_EDF.astype(c.dtype),
            w_down_EFD.astype(c.dtype),
            group_sizes_E,
            backend=choose_backend(c.expert_backend),
        )
        return combine(y_RD, weight_BTK.reshape(chosen_TK.shape), order, inverse).reshape(x_BTD.shape)


class MoE(nn.Module):
    """The feed-forward of an MoE block: Shared(x) + sum_k weight_k Expert_k(x)."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        self.gate = Router(config)
        self.experts = Experts(config)
        if config.n_shared_experts:
            self.shared_experts = SwiGLU(config, config.n_shared_experts * config.moe_intermediate_size)

    def __call__(self, x_BTD: jax.Array, counted_BT: jax.Array | None = None) -> tuple[jax.Array, Routing]:
        """Returns the output and where the tokens went; `counted_BT` marks those that enter load and balance loss."""
        routing = self.gate(x_BTD, counted_BT)
        y_BTD = self.experts(x_BTD, routing.chosen_BTK, routing.weight_BTK)
        if self.config.n_shared_experts:
            y_BTD += self.shared_experts(x_BTD)
        return y_BTD, routing
