"""The training objective (sections 2.1.2 and 2.2 of the report): CE + lambda * mean_k CE_k + alpha * balance loss.

The cross entropy walks the sequence in chunks and, when differentiated, makes its gradients in the same pass: the
[B, T, V] logits never exist, and no chunk of them is computed twice.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.model import DeepSeekV3


class Losses(NamedTuple):
    """The loss and its parts, float32 scalars in nats a token, and the loads that move the router biases."""

    loss: jax.Array
    """What is differentiated."""
    main_loss: jax.Array
    """Next-token cross entropy."""
    mtp_loss: jax.Array
    """Mean over MTP depths of their cross entropies, without lambda."""
    balance_loss: jax.Array
    """Sequence-wise balance loss summed over MoE layers, without alpha."""
    load: dict[str, jax.Array]
    """Tokens per expert of the whole batch, as in `ModelOutput.load`."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(h_BTD: jax.Array, head_DV: jax.Array, target_BT: jax.Array, weight_BT: jax.Array, chunk: int) -> jax.Array:
    """sum over tokens of weight * -log softmax(h head)[target], a float32 scalar.

    Args:
      h_BTD: normalised states, in the computation dtype.
      head_DV: the output head; products run in h's dtype and accumulate in float32.
      target_BT: token ids.
      weight_BT: float32 weight of each token; not differentiated.
      chunk: positions of every sequence per step.
    """

    head = head_DV.astype(h_BTD.dtype)

    def step(total: jax.Array, part: tuple) -> tuple[jax.Array, None]:
        h, target, weight = part
        return total + _chunk_loss(h, target, weight, head)[0], None

    return jax.lax.scan(step, jnp.float32(0), _chunks(h_BTD, target_BT, weight_BT, chunk))[0]


def _chunks(h_BTD: jax.Array, target_BT: jax.Array, weight_BT: jax.Array, chunk: int) -> tuple:
    """Cuts the sequence axis into a leading axis of chunks, padded with tokens of weight zero."""
    T = h_BTD.shape[1]
    size = min(chunk, T)

    def cut(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, ((0, 0), (0, -T % size)) + ((0, 0),) * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(array.shape[0], -1, size, *array.shape[2:]), 1, 0)

    return cut(h_BTD), cut(target_BT), cut(weight_BT)


def _chunk_loss(h_BTD: jax.Array, target_BT: jax.Array, weight_BT: jax.Array, head_DV: jax.Array) -> tuple:
    logits_BTV = jnp.einsum("BTD,DV->BTV", h_BTD, head_DV, preferred_element_type=jnp.float32)
    log_sum_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    picked_BT = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
    return jnp.sum(weight_BT * (log_sum_BT - picked_BT)), logits_BTV, log_sum_BT


def _cross_entropy_forward(h_BTD, head_DV, target_BT, weight_BT, chunk):  # type: ignore[no-untyped-def]
    head = head_DV.astype(h_BTD.dtype)
    vocabulary = jnp.arange(head.shape[1])

    def step(carry: tuple, part: tuple) -> tuple[tuple, jax.Array]:
        total, dhead_DV = carry
        h, target, weight = part
        loss, logits_BTV, log_sum_BT = _chunk_loss(h, target, weight, head)
        hit_BTV = target[..., None] == vocabulary
        dlogits_BTV = ((jnp.exp(logits_BTV - log_sum_BT[..., None]) - hit_BTV) * weight[..., None]).astype(h.dtype)
        dh = jnp.einsum("BTV,DV->BTD", dlogits_BTV, head)
        dhead_DV += jnp.einsum("BTD,BTV->DV", h, dlogits_BTV, preferred_element_type=jnp.float32)
        return (total + loss, dhead_DV), dh

    start = jnp.float32(0), jnp.zeros(head.shape, jnp.float32)
    (total, dhead_DV), dh = jax.lax.scan(step, start, _chunks(h_BTD, target_BT, weight_BT, chunk))
    B, T, D = h_BTD.shape
    dh_BTD = jnp.moveaxis(dh, 0, 1).reshape(B, -1, D)[:, :T]
    return total, (dh_BTD, dhead_DV, jnp.zeros((), head_DV.dtype))


def _cross_entropy_backward(chunk: int, residuals: tuple, dloss: jax.Array) -> tuple:
    dh_BTD, dhead_DV, head_like = residuals
    return (dh_BTD * dloss).astype(dh_BTD.dtype), (dhead_DV * dloss).astype(head_like.dtype), None, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def training_loss(
    params: Any, router: Any, config: ModelConfig, tokens_BT: jax.Array, target_BT: jax.Array, mtp_loss_weight: float
) -> Losses:
    """The objective over one batch, every term averaged over its own tokens.

    Args:
      params, router: the model's two collections.
      config: the architecture.
      tokens_BT: inputs.
      target_BT: the tokens one further on.
      mtp_loss_weight: lambda.
    """
    features = DeepSeekV3(config).apply({"params": params, "router": router}, tokens_BT, mtp=True, method="features")
    head_DV = params["lm_head"]["kernel"]
    T = tokens_BT.shape[1]

    def mean_loss(h_BTD: jax.Array, ahead: int) -> jax.Array:
        # Depth k's row i predicts the token at i + k + 1, which is target i + k; the last k rows have none.
        valid_BT = jnp.broadcast_to(jnp.arange(T) < T - ahead, target_BT.shape).astype(jnp.float32)
        shifted_BT = jnp.roll(target_BT, -ahead, axis=1)
        return cross_entropy(h_BTD, head_DV, shifted_BT, valid_BT, config.loss_chunk) / valid_BT.sum()

    main_loss = mean_loss(features.h_BTD, 0)
    depths = [mean_loss(h_BTD, k) for k, h_BTD in enumerate(features.mtp_h_BTD, 1)]
    mtp_loss = sum(depths, jnp.float32(0)) / max(len(depths), 1)
    balance_loss = features.balance_loss
    loss = main_loss + mtp_loss_weight * mtp_loss + config.aux_loss_alpha * balance_loss
    return Losses(loss, main_loss, mtp_loss, balance_loss, features.load)
