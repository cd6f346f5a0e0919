"""Floating-point operations of a training token."""

from __future__ import annotations

from typing import NamedTuple

from dsv3_jax.config import ModelConfig


class Flops(NamedTuple):
    """Floating-point operations of one training token; a multiply-add counts as two."""

    causal: float  # Attention to the token itself and those before it: (T + 1) / 2 on average.
    non_causal: float  # Attention to all T tokens, as in a kernel that also computes the masked half.


def flops_per_token(config: ModelConfig, sequence_length: int) -> Flops:
    """Return the model FLOPs of one training token, forward and backward, MTP depths included.

    The backward pass has two products for each one of the forward pass, so a token costs 6 FLOPs per matmul weight, plus
    6 N (H + P + W) S per attention layer for its scores against S keys and the weighted sum of S values:

      attention  a = D Q + Q N (H + P) + D (C + P) + C N (H + W) + N W D        (D N (H + P) without a query latent)
      dense FFN  d = 3 D intermediate_size
      MoE        m = D E + (K + n_shared_experts) 3 D F                         (router, chosen and shared experts)
      layers     dense (a + d) + MoE (a + m), and for each MTP depth 2 D D + a + m
      head       V D for the main model and for each MTP depth

    The embedding is a lookup and costs nothing; norms, softmax, RoPE and SwiGLU's elementwise product are left out. An MTP
    depth counts at every position, though its last k predict nothing. S is (T + 1) / 2 or T, see `Flops`.
    """
    c = config
    D, N, H, P, W = c.hidden_size, c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    C, Q, depths = c.kv_lora_rank, c.q_lora_rank, c.num_nextn_predict_layers
    query = D * N * (H + P) if Q is None else D * Q + Q * N * (H + P)
    attention = query + D * (C + P) + C * N * (H + W) + N * W * D
    dense = 3 * D * c.intermediate_size
    moe = D * c.n_routed_experts + (c.num_experts_per_tok + c.n_shared_experts) * 3 * D * c.moe_intermediate_size

    layers = c.num_hidden_layers + depths
    weights = (
        layers * attention
        + c.first_k_dense_replace * dense
        + (c.num_moe_layers + depths) * moe
        + depths * 2 * D * D
        + (1 + depths) * c.vocab_size * D
    )
    per_key = layers * N * (H + P + W)
    return Flops(6.0 * (weights + per_key * (sequence_length + 1) / 2), 6.0 * (weights + per_key * sequence_length))
