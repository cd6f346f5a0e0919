"""What a training step takes at least: its arithmetic, memory traffic and link traffic, each at the chip's peak.

A bound, not a forecast: nothing reaches its peak, and what does not overlap adds up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.model import RematPolicy
from dsv3_jax.plan.collectives import Collective


class Flops(NamedTuple):
    """Floating-point operations of one training token, a multiply-add being two."""

    causal: float
    """Attention to the tokens up to and including its own: (T + 1) / 2 on average."""
    non_causal: float
    """Attention to all T tokens, as a kernel does that computes the masked half too."""


def flops_per_token(config: ModelConfig, sequence_length: int) -> Flops:
    """Model FLOPs of one training token, forward and backward, MTP depths included.

    The backward multiplies twice for each product of the forward, so a token costs 6 FLOPs a parameter that it is
    multiplied with, plus 6 N (H + P + W) S an attention layer for its scores against S keys and its sum of S values:

      attention  a = D Q + Q N (H + P) + D (C + P) + C N (H + W) + N W D        (D N (H + P) without a query latent)
      dense FFN  d = 3 D intermediate_size
      MoE        m = D E + (K + n_shared_experts) 3 D F                         (router, chosen and shared experts)
      layers     dense (a + d) + MoE (a + m), and for each MTP depth 2 D D + a + m
      head       V D for the main model and for each MTP depth

    The embedding is looked up, not multiplied; norms, softmax, rotation and SwiGLU's product are left out. An MTP depth
    counts with every position, though the last k of them predict nothing.

    Args:
      config: the model.
      sequence_length: T, tokens in a sequence.

    Returns:
      The two ways to count attention: S = (T + 1) / 2 and S = T.
    """
    c = config
    D, N, H, P, W = c.hidden_size, c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    C, Q, depths = c.kv_lora_rank, c.q_lora_rank, c.num_nextn_predict_layers
    query = D * N * (H + P) if Q is None else D * Q + Q * N * (H + P)
    attention = query + D * (C + P) + C * N * (H + W) + N * W * D
    dense = 3 * D * c.intermediate_size
    moe = D * c.n_routed_experts + (c.num_experts_per_tok + c.n_shared_experts) * 3 * D * c.moe_intermediate_size

    layers = c.num_hidden_layers + depths
    multiplied = (
        layers * attention
        + c.first_k_dense_replace * dense
        + (c.num_moe_layers + depths) * moe
        + depths * 2 * D * D
        + (1 + depths) * c.vocab_size * D
    )
    per_key = layers * N * (H + P + W)
    return Flops(
        causal=6.0 * (multiplied + per_key * (sequence_length + 1) / 2),
        non_causal=6.0 * (multiplied + per_key * sequence_length),
    )


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one device as JAX counts devices."""

    bf16_flops: float
    """Dense bfloat16 FLOP/s."""
    hbm_bytes: float
    """HBM bytes/s."""
    hbm_gib: float
    """HBM that a program can use, GiB (2^30 bytes)."""
    ici_bytes: float
    """Bytes/s out of the device over ICI, all its links together, one way."""
    dcn_bytes: float
    """Bytes/s out of the device over the data-center network, one way: its share of the host's cards."""
    devices_per_chip: int = 1
    """2 where every core of a chip is a device of its own."""


# FLOP/s, HBM, ICI and network: the system architecture pages of the Cloud TPU documentation (docs.cloud.google.com/tpu/docs:
# v5p, v5e, v6e, tpu7x). They state ICI in both directions together (v5p 1200 GB/s a chip, v5e 400, v6e 800, tpu7x
# 1200): one way is half of that, and what older pages give as v5p 4800 and v5e 1600 Gbit/s. The network is stated a chip
# (v5p 50 Gbit/s, v6e and tpu7x 100), for v5e a host of 8 chips (200). HBM of v5e is the 819 GB/s of the older page; the
# newer one says 800 GiB/s. A chip of tpu7x is two devices. Usable HBM is what the TPU compiler (libtpu 0.0.42) names when
# it refuses a program.
CHIPS: dict[str, Chip] = {
    "v5p": Chip(459e12, 2765e9, 95.74, 600e9, 6.25e9),
    "v5e": Chip(197e12, 819e9, 15.75, 200e9, 3.125e9),
    "v6e": Chip(918e12, 1638e9, 31.25, 400e9, 12.5e9),
    "tpu7x": Chip(2307e12 / 2, 7380e9 / 2, 94.75, 600e9 / 2, 12.5e9 / 2, devices_per_chip=2),
}

# Arithmetic of a step over that of its model. Recomputing a block adds a forward to a forward and a backward of twice
# that; "save_latents" spares some projections of MLA only, and is charged as the full policy is.
RECOMPUTED: dict[RematPolicy, float] = {"none": 1.0, "save_latents": 4 / 3, "full": 4 / 3}


class Roofline(NamedTuple):
    """Least seconds of a training step, by what limits it."""

    compute_seconds: float
    hbm_seconds: float
    link_seconds: float
    step_seconds: float
    """The largest of the three."""


def roofline(
    *,
    flops_per_token: float,
    tokens_per_device: float,
    remat: RematPolicy,
    hbm_bytes: float,
    collectives: Iterable[Collective],
    chip: Chip,
    dcn_axis: str | None = None,
) -> Roofline:
    """Seconds of a step in which everything runs at its peak and overlaps entirely.

      compute  flops_per_token * tokens_per_device * (4/3 if recomputing, else 1) / bf16_flops
      hbm      hbm_bytes / chip's HBM bytes/s
      link     the larger of ICI bytes / chip's ICI bytes/s and DCN bytes / chip's DCN bytes/s
      step     the largest of the three

    The links are counted as if all of a device's ran busy at once; a collective along one axis of a torus uses some of
    them only, so real ones take longer. A collective whose axes include `dcn_axis` is charged to DCN, any other to ICI.

    Args:
      flops_per_token: model FLOPs, forward and backward (either figure of the function of that name).
      tokens_per_device: tokens of a step over devices.
      remat: what the backward recomputes.
      hbm_bytes: bytes that a device reads and writes in a step.
      collectives: what a device sends in a step.
      chip: the device, from CHIPS or your own figures.
      dcn_axis: the mesh axis that runs between slices; None within one slice.
    """
    sent = {True: 0, False: 0}
    for one in collectives:
        sent[dcn_axis in one.axis.split("+")] += one.bytes
    compute = flops_per_token * tokens_per_device * RECOMPUTED[remat] / chip.bf16_flops
    hbm = hbm_bytes / chip.hbm_bytes
    link = max(sent[False] / chip.ici_bytes, sent[True] / chip.dcn_bytes)
    return Roofline(compute, hbm, link, max(compute, hbm, link))
