"""The training objective (sections 2.1.2 and 2.2 of the report): CE + lambda * mean_k CE_k + alpha * balance loss.

The cross entropy walks the sequence in chunks and, when differentiated, computes its gradients in the same pass: logits
[B, T, V] never exist, and no chunk of them is computed twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.vma import varying_alike, zeros_beside
from dsv3_jax.model.model import HEAD_AXES, DeepSeekV3
from dsv3_jax.model.mtp import rows_of_depth
from dsv3_jax.parallel.mesh import AXES, current_mesh
from dsv3_jax.parallel.sharding import TOKEN_SPEC, all_gather_weight, current_rules, reduce_scatter_grad


class ValidationBatch(NamedTuple):
    """Windows of held-out tokens, the target of each (the token after it), and a mask of the targets that are scored."""

    tokens_BT: np.ndarray  # int32.
    targets_BT: np.ndarray  # int32.
    loss_weight_BT: np.ndarray  # float32; 1 for a target that is text, 0 for a document separator, a prompt or padding.
    segment_starts_BT: np.ndarray | None = None
    """int32; position where each token's document starts in its window, -1 for padding; None if attention crosses documents."""


class Batch(NamedTuple):
    """The rows of one step, in numpy or jax: A micro-batches of B rows, of which a smaller step fills only the first."""

    tokens_ABT: Any  # int32.
    targets_ABT: Any  # int32; the token after each.
    loss_weight_ABT: Any  # float32; weight of each target in the loss.
    segment_starts_ABT: Any
    """int32; position where each token's document starts in its row, -1 for padding; None if attention crosses documents."""

    @classmethod
    def of(cls, tokens_BT: np.ndarray, targets_BT: np.ndarray) -> Batch:
        """Return one micro-batch with weight 1 for every target, and attention across documents."""
        return cls(tokens_BT[None], targets_BT[None], np.ones(targets_BT.shape, np.float32)[None], None)


class Losses(NamedTuple):
    """The loss and its terms, float32 scalars; the loads that update the router biases, and the number of exchange rounds."""

    loss: jax.Array  # The objective, to be differentiated.
    main_loss: jax.Array  # Next-token cross entropy, in nats per token.
    mtp_loss: jax.Array  # Mean cross entropy of the MTP depths, without lambda.
    balance_loss: jax.Array  # Sequence-wise balance loss summed over MoE layers, without alpha.
    load: dict[str, jax.Array]  # Tokens per expert of the whole batch, as in `ModelOutput.load`.
    rounds: jax.Array  # Largest number of exchange rounds of any layer.


def cross_entropy(h_BTD: jax.Array, head_DV: jax.Array, target_BT: jax.Array, weight_BT: jax.Array, chunk: int) -> jax.Array:
    """Return the sum over tokens of weight * -log softmax(h head)[target], a float32 scalar.

    Products run in the dtype of the normalised states h and accumulate in float32, over `chunk` positions of every sequence
    at a time. The weights, float32, are not differentiated. On a mesh every device walks its own tokens; the vocabulary stays
    split along `tensor`, and the head is gathered along the fsdp axes.
    """
    if current_mesh() is None:
        return _summed_loss(h_BTD, head_DV, target_BT, weight_BT, chunk, False)

    def on_device(*arrays: jax.Array) -> jax.Array:
        return _sum_over_devices(_summed_loss(*varying_alike(*arrays), chunk, True))

    return _over_mesh(on_device, PartitionSpec())(h_BTD, head_DV, target_BT, weight_BT)


def cross_entropy_and_greedy(
    h_BTD: jax.Array, head_DV: jax.Array, target_BT: jax.Array, weight_BT: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Return `cross_entropy` without a gradient, and the most likely tokens [B, T] int32; the lowest id of equal logits."""
    if current_mesh() is None:
        return _loss_and_greedy((h_BTD, head_DV, target_BT, weight_BT), chunk, False)

    def on_device(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss, greedy_BT = _loss_and_greedy(varying_alike(*arrays), chunk, True)
        # A `tensor` group agrees on the tokens; the maximum makes that known to JAX.
        return _sum_over_devices(loss), jax.lax.pmax(greedy_BT, "tensor")

    return _over_mesh(on_device, (PartitionSpec(), TOKEN_SPEC))(h_BTD, head_DV, target_BT, weight_BT)


def _over_mesh(on_device: Callable[..., Any], out_specs: Any) -> Callable[..., Any]:
    specs = TOKEN_SPEC, current_rules().spec(HEAD_AXES), TOKEN_SPEC, TOKEN_SPEC
    return jax.shard_map(on_device, in_specs=specs, out_specs=out_specs)


def _sum_over_devices(loss: jax.Array) -> jax.Array:
    # Every device of a `tensor` group has the whole loss of the group's tokens, so each adds a share of it.
    return jax.lax.psum(loss / jax.lax.axis_size("tensor"), AXES)


class _Head(NamedTuple):
    """Kernel of the output head: all columns, or inside shard_map those of this device, with the id of the first."""

    kernel_DV: jax.Array
    first: jax.Array | int  # Token id of the first column.
    on_mesh: bool

    @classmethod
    def of(cls, head_DV: jax.Array, dtype: Any, on_mesh: bool) -> _Head:
        if not on_mesh:
            return cls(head_DV.astype(dtype), 0, False)
        return cls(all_gather_weight(head_DV, HEAD_AXES, dtype), jax.lax.axis_index("tensor") * head_DV.shape[1], True)

    def is_target_BTV(self, target_BT: jax.Array) -> jax.Array:
        """Return a mask [B, T, V]: True in the column of this head that is the token's target."""
        return (target_BT - self.first)[..., None] == jnp.arange(self.kernel_DV.shape[1])

    def reduce(self, collective: Callable[..., jax.Array], partial: jax.Array) -> jax.Array:
        """Reduce `partial` along `tensor` by `jax.lax.psum`, `pmax` or `pmin`; without a mesh return it unchanged."""
        return varying_alike(collective(partial, "tensor"), partial)[0] if self.on_mesh else partial

    def greedy(self, logits_BTV: jax.Array) -> jax.Array:
        """Return the token with the largest logit in the whole vocabulary, the lowest id of equal ones: [B, T] int32."""
        token_BT = jnp.argmax(logits_BTV, -1).astype(jnp.int32) + self.first
        if not self.on_mesh:
            return token_BT
        top_BT, no_token = logits_BTV.max(-1), jnp.iinfo(jnp.int32).max
        return self.reduce(jax.lax.pmin, jnp.where(top_BT == self.reduce(jax.lax.pmax, top_BT), token_BT, no_token))


def _into_chunks(h_BTD: jax.Array, target_BT: jax.Array, weight_BT: jax.Array, chunk: int) -> tuple:
    """Return the arrays, cut along the sequence and zero-padded, as [chunks, B, min(chunk, T), ...]."""
    T = h_BTD.shape[1]
    size = min(chunk, T)

    def cut(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, ((0, 0), (0, -T % size)) + ((0, 0),) * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(array.shape[0], -1, size, *array.shape[2:]), 1, 0)

    return cut(h_BTD), cut(target_BT), cut(weight_BT)


def _from_chunks(chunks: jax.Array, length: int) -> jax.Array:
    """Return chunks [chunks, B, size, ...] joined to [B, length, ...], without the padding: inverse of `_into_chunks`."""
    by_sequence = jnp.moveaxis(chunks, 0, 1)
    return by_sequence.reshape(by_sequence.shape[0], -1, *chunks.shape[3:])[:, :length]


def _chunk_loss(head: _Head, h_BTD: jax.Array, target_BT: jax.Array, weight_BT: jax.Array) -> tuple:
    """Return a chunk's weighted sum of losses (NaN for an unknown target), logits [B, T, V] of `head`, log-sum-exp [B, T]."""
    logits_BTV = jnp.einsum("BTD,DV->BTV", h_BTD, head.kernel_DV, preferred_element_type=jnp.float32)
    top_BT = head.reduce(jax.lax.pmax, logits_BTV.max(-1))
    log_sum_BT = top_BT + jnp.log(head.reduce(jax.lax.psum, jnp.exp(logits_BTV - top_BT[..., None]).sum(-1)))
    is_target_BTV = head.is_target_BTV(target_BT)
    picked_BT = head.reduce(jax.lax.psum, jnp.sum(logits_BTV, axis=-1, where=is_target_BTV))
    # A target outside the vocabulary has no logit: its loss is NaN, not that of a logit of 0.
    num_targets_BT = head.reduce(jax.lax.psum, jnp.sum(is_target_BTV, axis=-1, dtype=jnp.int32))
    picked_BT = jnp.where(num_targets_BT == 1, picked_BT, jnp.nan)
    return jnp.sum(weight_BT * (log_sum_BT - picked_BT)), logits_BTV, log_sum_BT


def _loss_and_greedy(arrays: tuple, chunk: int, on_mesh: bool, greedy: bool = True) -> tuple[jax.Array, Any]:
    """Return the summed loss, and the most likely tokens or, without `greedy`, None; `arrays`: those of `cross_entropy`."""
    h_BTD, head_DV, target_BT, weight_BT = arrays
    head = _Head.of(head_DV, h_BTD.dtype, on_mesh)

    def step(total: jax.Array, part: tuple) -> tuple[jax.Array, Any]:
        loss, logits_BTV, _ = _chunk_loss(head, *part)
        return total + loss, head.greedy(logits_BTV) if greedy else None

    chunks = _into_chunks(h_BTD, target_BT, weight_BT, chunk)
    total, tokens = jax.lax.scan(step, zeros_beside(h_BTD, (), jnp.float32), chunks)
    return total, _from_chunks(tokens, target_BT.shape[1]) if greedy else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _summed_loss(
    h_BTD: jax.Array, head_DV: jax.Array, target_BT: jax.Array, weight_BT: jax.Array, chunk: int, on_mesh: bool
) -> jax.Array:
    return _loss_and_greedy((h_BTD, head_DV, target_BT, weight_BT), chunk, on_mesh, greedy=False)[0]


def _forward(h_BTD, head_DV, target_BT, weight_BT, chunk, on_mesh):  # type: ignore[no-untyped-def]
    """Return the loss and, as residuals, its gradients with respect to states and head."""
    head = _Head.of(head_DV, h_BTD.dtype, on_mesh)

    def step(carry: tuple, part: tuple) -> tuple[tuple, jax.Array]:
        total, dhead_DV = carry
        h, target, weight = part
        loss, logits_BTV, log_sum_BT = _chunk_loss(head, h, target, weight)
        p_BTV = jnp.exp(logits_BTV - log_sum_BT[..., None])
        dlogits_BTV = ((p_BTV - head.is_target_BTV(target)) * weight[..., None]).astype(h.dtype)
        dh = jnp.einsum("BTV,DV->BTD", dlogits_BTV, head.kernel_DV)
        dhead_DV += jnp.einsum("BTD,BTV->DV", h, dlogits_BTV, preferred_element_type=jnp.float32)
        return (total + loss, dhead_DV), dh

    start = zeros_beside(h_BTD, (), jnp.float32), zeros_beside(h_BTD, head.kernel_DV.shape, jnp.float32)
    (total, dhead_DV), dh = jax.lax.scan(step, start, _into_chunks(h_BTD, target_BT, weight_BT, chunk))
    dh_BTD = _from_chunks(dh, h_BTD.shape[1])
    if on_mesh:
        # The barrier has the gradient reduced now, so that only this device's part of it is in memory until the backward pass.
        dhead_DV = reduce_scatter_grad(dhead_DV.astype(h_BTD.dtype), HEAD_AXES)
        total, dh_BTD, dhead_DV = jax.lax.optimization_barrier((total, dh_BTD, dhead_DV))
    return total, (dh_BTD, dhead_DV.astype(head_DV.dtype))


def _backward(chunk: int, on_mesh: bool, residuals: tuple, dloss: jax.Array) -> tuple:
    if on_mesh:
        # `_sum_over_devices` divided the loss by the size of the `tensor` group, but the gradients are of the whole loss.
        dloss = dloss * jax.lax.axis_size("tensor")
    return *((gradient * dloss).astype(gradient.dtype) for gradient in residuals), None, None


_summed_loss.defvjp(_forward, _backward)


def depth_weights(weight_BT: jax.Array, segment_starts_BT: jax.Array | None, depth: int) -> jax.Array:
    """Return the weight of each row in the cross entropy of depth k (k = 0: the main model): [B, T] float32.

    Row i of depth k joins the state of token i with token i + k and predicts target i + k, the token after that. The weight is
    zero in the last k rows, and with segment starts in padding and in rows whose token i + k is of another document.
    """
    rows_BT = rows_of_depth(weight_BT.shape, segment_starts_BT, depth)
    return jnp.where(rows_BT, jnp.roll(weight_BT, -depth, axis=1), 0.0).astype(jnp.float32)


def training_loss(
    params: Any,
    router: Any,
    config: ModelConfig,
    tokens_BT: jax.Array,
    target_BT: jax.Array,
    mtp_loss_weight: float | jax.Array,
    weight_BT: jax.Array | None = None,
    segment_starts_BT: jax.Array | None = None,
    *,
    aux_loss_alpha: float | jax.Array | None = None,
    totals: Sequence[jax.Array] | None = None,
    share: float | jax.Array = 1.0,
) -> Losses:
    """Return the losses of one batch, every term averaged over its own tokens, or one micro-batch's part of a step's losses.

    The parts of all micro-batches of a step, with `totals` and `share` given, add up to the losses of the whole step.

    Args:
      params, router: the model's two collections.
      config: the architecture.
      tokens_BT, target_BT: inputs, and the token after each.
      mtp_loss_weight: lambda.
      weight_BT: weight of each target, float32; None for 1.
      segment_starts_BT: start of each token's document (see `DeepSeekV3`); None lets attention cross documents.
      aux_loss_alpha: alpha; None for the config's.
      totals: sum of weights over the whole step, of the main model and of each depth; None if this batch is the whole step.
      share: this batch's share of the sequences of the step.
    """
    variables = {"params": params, "router": router}
    features = DeepSeekV3(config).apply(variables, tokens_BT, mtp=True, segment_starts_BT=segment_starts_BT, method="features")
    head_DV = params["lm_head"]["kernel"]
    weight_BT = jnp.ones(target_BT.shape, jnp.float32) if weight_BT is None else weight_BT

    def mean_loss(h_BTD: jax.Array, depth: int) -> jax.Array:
        counts_BT = depth_weights(weight_BT, segment_starts_BT, depth)
        total = counts_BT.sum() if totals is None else totals[depth]
        shifted_BT = jnp.roll(target_BT, -depth, axis=1)
        # The loss of a batch without any weight is 0.
        return cross_entropy(h_BTD, head_DV, shifted_BT, counts_BT, config.loss_chunk) / jnp.maximum(total, 1.0)

    main_loss = mean_loss(features.h_BTD, 0)
    depths = [mean_loss(h_BTD, k) for k, h_BTD in enumerate(features.mtp_h_BTD, 1)]
    mtp_loss = sum(depths, jnp.float32(0)) / max(len(depths), 1)
    balance_loss = features.balance_loss * share
    alpha = config.aux_loss_alpha if aux_loss_alpha is None else aux_loss_alpha
    loss = main_loss + mtp_loss_weight * mtp_loss + alpha * balance_loss
    return Losses(loss, main_loss, mtp_loss, balance_loss, features.load, features.rounds)
