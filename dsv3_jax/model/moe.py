"""DeepSeekMoE (section 2.1.2 of the report): many small routed experts, chosen per token, and a shared one.

No capacity and no dropping: the tokens' choices are sorted by expert, and the experts work through groups of
whatever size that gives.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.experts import choose_backend, combine, dispatch, expert_ffn, sort_by_expert
from dsv3_jax.kernels.quantized import in_dtype
from dsv3_jax.model.layers import SwiGLU, normal_init
from dsv3_jax.model.router import Router, Routing
from dsv3_jax.parallel.all_to_all import WEIGHT_AXES, ExpertWeights, routed_experts_on_mesh
from dsv3_jax.parallel.mesh import current_mesh, current_platform
from dsv3_jax.parallel.redundancy import Copies


class Experts(nn.Module):
    """The routed experts: E SwiGLUs of F hidden units, their weights stacked.

    With variables that `place_experts` made, the stack holds P >= E slots with their copies, and the choices become slots.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, chosen_BTK: jax.Array, weight_BTK: jax.Array) -> tuple[jax.Array, jax.Array]:
        """sum_k weight_k * Expert_{chosen_k}(x), the sum in float32: [B, T, D]; and the rounds of exchange it took."""
        c = self.config
        E, D, F = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        copies: Copies | None = self.get_variable("placement", "copies")
        if copies is not None:
            E, chosen_BTK = copies.expert_P.shape[0], copies.slots(chosen_BTK)
        shapes = (E, D, F), (E, D, F), (E, F, D)
        gate, up, down = (
            self.param(f"{name}_proj", normal_init(c, axes), shape, c.param_dtype)
            for name, axes, shape in zip(("gate", "up", "down"), WEIGHT_AXES, shapes, strict=True)
        )
        weights = gate, up, down
        backend = choose_backend(c.expert_backend, c.dtype, current_platform())
        if current_mesh() is not None:
            return routed_experts_on_mesh(x_BTD, chosen_BTK, weight_BTK, weights, c, backend)
        y_TD = routed_experts(x_BTD.reshape(-1, D), chosen_BTK, weight_BTK, weights, c, backend)
        return y_TD.reshape(x_BTD.shape), jnp.int32(1)


def routed_experts(
    x_TD: jax.Array, chosen_BTK: jax.Array, weight_BTK: jax.Array, weights: ExpertWeights, config: ModelConfig, backend: str
) -> jax.Array:
    """sum_k weight_k * Expert_{chosen_k}(x) on one device: [T, D]."""
    chosen_TK, weight_TK = (array.reshape(-1, config.num_experts_per_tok) for array in (chosen_BTK, weight_BTK))
    order, inverse, group_sizes_E = sort_by_expert(chosen_TK, weights[0].shape[0])
    rows_RD = dispatch(x_TD, order, inverse)
    y_RD = expert_ffn(rows_RD, *in_dtype(weights, config.dtype), group_sizes_E, backend=backend)
    return combine(y_RD, weight_TK, order, inverse)


class MoE(nn.Module):
    """The feed-forward of an MoE block: Shared(x) + sum_k weight_k Expert_k(x)."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        self.gate = Router(config)
        self.experts = Experts(config)
        if config.n_shared_experts:
            self.shared_experts = SwiGLU(config, config.n_shared_experts * config.moe_intermediate_size)

    def __call__(self, x_BTD: jax.Array, counted_BT: jax.Array | None = None) -> tuple[jax.Array, Routing, jax.Array]:
        """Returns the output, where the tokens went, and the rounds it took to bring them there.

        Args:
          x_BTD: the normalised residual stream.
          counted_BT: tokens that enter load and balance loss; None counts all.
        """
        routing = self.gate(x_BTD, counted_BT)
        y_BTD, rounds = self.experts(x_BTD, routing.chosen_BTK, routing.weight_BTK)
        if self.config.n_shared_experts:
            y_BTD += self.shared_experts(x_BTD)
        return y_BTD, routing, rounds
