"""The training objective (sections 2.1.2 and 2.2 of the report): CE + lambda * mean_k CE_k + alpha * balance loss.

The cross entropy walks the sequence in chunks and, when differentiated, makes its gradients in the same pass: the
[B, T, V] logits never exist, and no chunk of them is computed twice.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
    """Windows of held-out tokens, the token that follows each, and whether that one is scored."""

    tokens_BT: np.ndarray
    """int32."""
    targets_BT: np.ndarray
    """int32."""
    loss_weight_BT: np.ndarray
    """float32; 1 where the target is text, 0 where it is a mark between documents, a prompt, or padding."""
    segment_starts_BT: np.ndarray | None = None
    """int32; where in its window the document of each token begins, -1 for padding; None where attention crosses documents."""


class Batch(NamedTuple):
    """The rows of one step: A micro-batches of B rows, of which a small step fills only the first ones.

    Arrays of numpy, or of jax once they are on the devices.
    """

    tokens_ABT: Any
    """int32."""
    targets_ABT: Any
    """int32; the token that follows each."""
    loss_weight_ABT: Any
    """float32; what the loss of each target counts."""
    segment_starts_ABT: Any
    """int32; where in its row the document of each token begins, -1 for padding; None where attention crosses documents."""

    @classmethod
    def of(cls, tokens_BT: np.ndarray, targets_BT: np.ndarray) -> Batch:
        """One micro-batch in which every token counts, and attention crosses documents."""
        return cls(tokens_BT[None], targets_BT[None], np.ones(targets_BT.shape, np.float32)[None], None)


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
    rounds: jax.Array
    """Most rounds of exchange that any layer took."""


def cross_entropy(h_BTD: jax.Array, head_DV: jax.Array, target_BT: jax.Array, weight_BT: jax.Array, chunk: int) -> jax.Array:
    """sum over tokens of weight * -log softmax(h head)[target], a float32 scalar.

    On a mesh every device walks its own tokens; the vocabulary is split along `tensor`, and the head gathered along the
    fsdp axes.

    Args:
      h_BTD: normalised states, in the computation dtype.
      head_DV: the output head; products run in h's dtype and accumulate in float32.
      target_BT: token ids.
      weight_BT: float32 weight of each token; not differentiated.
      chunk: positions of every sequence per step.
    """
    if current_mesh() is None:
        return _summed_loss(h_BTD, head_DV, target_BT, weight_BT, chunk, False)

    def on_device(h_BTD: jax.Array, head_DV: jax.Array, target_BT: jax.Array, weight_BT: jax.Array) -> jax.Array:
        loss = _summed_loss(*varying_alike(h_BTD, head_DV, target_BT, weight_BT), chunk, True)
        # Each device of a `tensor` group has the whole loss of their tokens: its share keeps the sum right.
        return jax.lax.psum(loss / jax.lax.axis_size("tensor"), AXES)

    specs = TOKEN_SPEC, current_rules().spec(HEAD_AXES), TOKEN_SPEC, TOKEN_SPEC
    return jax.shard_map(on_device, in_specs=specs, out_specs=PartitionSpec())(h_BTD, head_DV, target_BT, weight_BT)


def cross_entropy_and_greedy(
    h_BTD: jax.Array, head_DV: jax.Array, target_BT: jax.Array, weight_BT: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """`cross_entropy`, not to be differentiated, and from the same logits the most likely token of every row.

    Takes what `cross_entropy` takes; the tokens are int32 [B, T], split as the targets are. Of equal logits the lowest id wins.
    """
    if current_mesh() is None:
        return _scored(h_BTD, head_DV, target_BT, weight_BT, chunk, False)

    def on_device(h_BTD: jax.Array, head_DV: jax.Array, target_BT: jax.Array, weight_BT: jax.Array) -> tuple:
        h_BTD, head_DV, target_BT, weight_BT = varying_alike(h_BTD, head_DV, target_BT, weight_BT)
        loss, greedy_BT = _scored(h_BTD, head_DV, target_BT, weight_BT, chunk, True)
        # All of a `tensor` group found the same tokens; the maximum says so.
        return jax.lax.psum(loss / jax.lax.axis_size("tensor"), AXES), jax.lax.pmax(greedy_BT, "tensor")

    specs = TOKEN_SPEC, current_rules().spec(HEAD_AXES), TOKEN_SPEC, TOKEN_SPEC
    return jax.shard_map(on_device, in_specs=specs, out_specs=(PartitionSpec(), TOKEN_SPEC))(
        h_BTD, head_DV, target_BT, weight_BT
    )


def _scored(
    h_BTD: jax.Array, head_DV: jax.Array, target_BT: jax.Array, weight_BT: jax.Array, chunk: int, on_mesh: bool
) -> tuple[jax.Array, jax.Array]:
    head = _Head.of(head_DV, h_BTD.dtype, on_mesh)

    def step(total: jax.Array, part: tuple) -> tuple[jax.Array, jax.Array]:
        h, target, weight = part
        loss, logits_BTV, _ = _chunk_loss(h, target, weight, head)
        return total + loss, head.greedy(logits_BTV)

    start = zeros_beside(h_BTD, (), jnp.float32)
    total, greedy = jax.lax.scan(step, start, _chunks(h_BTD, target_BT, weight_BT, chunk))
    B, T = target_BT.shape
    return total, jnp.moveaxis(greedy, 0, 1).reshape(B, -1)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _summed_loss(
    h_BTD: jax.Array, head_DV: jax.Array, target_BT: jax.Array, weight_BT: jax.Array, chunk: int, on_mesh: bool
) -> jax.Array:
    head = _Head.of(head_DV, h_BTD.dtype, on_mesh)

    def step(total: jax.Array, part: tuple) -> tuple[jax.Array, None]:
        h, target, weight = part
        return total + _chunk_loss(h, target, weight, head)[0], None

    return jax.lax.scan(step, zeros_beside(h_BTD, (), jnp.float32), _chunks(h_BTD, target_BT, weight_BT, chunk))[0]


class _Head(NamedTuple):
    """The head, whole or this device's columns of it, and what it takes to work with such a part."""

    kernel_DV: jax.Array
    first: jax.Array | int
    """Token id of the first column."""
    on_mesh: bool

    @classmethod
    def of(cls, head_DV: jax.Array, dtype: Any, on_mesh: bool) -> _Head:
        if not on_mesh:
            return cls(head_DV.astype(dtype), 0, False)
        return cls(all_gather_weight(head_DV, HEAD_AXES, dtype), jax.lax.axis_index("tensor") * head_DV.shape[1], True)

    def hit_BTV(self, target_BT: jax.Array) -> jax.Array:
        """Which of these columns is the target."""
        return (target_BT - self.first)[..., None] == jnp.arange(self.kernel_DV.shape[1])

    def total(self, partial: jax.Array) -> jax.Array:
        """The sum of every part's `partial`."""
        return varying_alike(jax.lax.psum(partial, "tensor"), partial)[0] if self.on_mesh else partial

    def largest(self, partial: jax.Array) -> jax.Array:
        """The maximum of every part's `partial`."""
        return varying_alike(jax.lax.pmax(partial, "tensor"), partial)[0] if self.on_mesh else partial

    def greedy(self, logits_BTV: jax.Array) -> jax.Array:
        """The token of the largest logit over every part, the lowest of several, int32."""
        token_BT = jnp.argmax(logits_BTV, -1).astype(jnp.int32) + self.first
        if not self.on_mesh:
            return token_BT
        top_BT = logits_BTV.max(-1)
        no_token = jnp.iinfo(jnp.int32).max
        here_BT = jnp.where(top_BT == self.largest(top_BT), token_BT, no_token)
        return varying_alike(jax.lax.pmin(here_BT, "tensor"), here_BT)[0]


def _chunks(h_BTD: jax.Array, target_BT: jax.Array, weight_BT: jax.Array, chunk: int) -> tuple:
    """Cuts the sequence axis into a leading axis of chunks, padded with tokens of weight zero."""
    T = h_BTD.shape[1]
    size = min(chunk, T)

    def cut(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, ((0, 0), (0, -T % size)) + ((0, 0),) * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(array.shape[0], -1, size, *array.shape[2:]), 1, 0)

    return cut(h_BTD), cut(target_BT), cut(weight_BT)


def _chunk_loss(h_BTD: jax.Array, target_BT: jax.Array, weight_BT: jax.Array, head: _Head) -> tuple:
    logits_BTV = jnp.einsum("BTD,DV->BTV", h_BTD, head.kernel_DV, preferred_element_type=jnp.float32)
    top_BT = head.largest(logits_BTV.max(-1))
    log_sum_BT = top_BT + jnp.log(head.total(jnp.exp(logits_BTV - top_BT[..., None]).sum(-1)))
    hit_BTV = head.hit_BTV(target_BT)
    picked_BT = head.total(jnp.sum(logits_BTV, axis=-1, where=hit_BTV))
    # A target outside of the vocabulary hits nothing: NaN, and not the loss of a logit of 0.
    picked_BT = jnp.where(head.total(jnp.sum(hit_BTV, axis=-1, dtype=jnp.int32)) == 1, picked_BT, jnp.nan)
    return jnp.sum(weight_BT * (log_sum_BT - picked_BT)), logits_BTV, log_sum_BT


def _forward(h_BTD, head_DV, target_BT, weight_BT, chunk, on_mesh):  # type: ignore[no-untyped-def]
    head = _Head.of(head_DV, h_BTD.dtype, on_mesh)

    def step(carry: tuple, part: tuple) -> tuple[tuple, jax.Array]:
        total, dhead_DV = carry
        h, target, weight = part
        loss, logits_BTV, log_sum_BT = _chunk_loss(h, target, weight, head)
        p_BTV = jnp.exp(logits_BTV - log_sum_BT[..., None])
        dlogits_BTV = ((p_BTV - head.hit_BTV(target)) * weight[..., None]).astype(h.dtype)
        dh = jnp.einsum("BTV,DV->BTD", dlogits_BTV, head.kernel_DV)
        dhead_DV += jnp.einsum("BTD,BTV->DV", h, dlogits_BTV, preferred_element_type=jnp.float32)
        return (total + loss, dhead_DV), dh

    start = zeros_beside(h_BTD, (), jnp.float32), zeros_beside(h_BTD, head.kernel_DV.shape, jnp.float32)
    (total, dhead_DV), dh = jax.lax.scan(step, start, _chunks(h_BTD, target_BT, weight_BT, chunk))
    B, T, D = h_BTD.shape
    dh_BTD = jnp.moveaxis(dh, 0, 1).reshape(B, -1, D)[:, :T]
    if on_mesh:
        # Now, and not when the compiler finds time: what waits for the end is this device's part of the gradient alone.
        dhead_DV = reduce_scatter_grad(dhead_DV.astype(h_BTD.dtype), HEAD_AXES)
        total, dh_BTD, dhead_DV = jax.lax.optimization_barrier((total, dh_BTD, dhead_DV))
    return total, (dh_BTD, dhead_DV.astype(head_DV.dtype))


def _backward(chunk: int, on_mesh: bool, residuals: tuple, dloss: jax.Array) -> tuple:
    if on_mesh:
        # The loss is the sum over all devices, and on each of a `tensor` group it was counted in shares.
        dloss = dloss * jax.lax.axis_size("tensor")
    return *((gradient * dloss).astype(gradient.dtype) for gradient in residuals), None, None


_summed_loss.defvjp(_forward, _backward)


def depth_weights(weight_BT: jax.Array, segment_starts_BT: jax.Array | None, depth: int) -> jax.Array:
    """The weights of depth `depth`'s cross entropy, 0 being the main model's: [B, T] float32.

    Row i of depth k joins the state of token i with token i + k and predicts target i + k, the token after that. The last k
    rows have none; nor, where documents are kept apart, have padding and the rows whose token i + k is of another document.

    Args:
      weight_BT: of the targets, each the token after the one of its place.
      segment_starts_BT: where the document of each token begins, -1 for padding; None keeps no documents apart.
      depth: k.
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
    """The objective over one batch, every term averaged over its own tokens; or a micro-batch's part of it.

    The parts of all micro-batches of a step add up to the objective over the whole step.

    Args:
      params, router: the model's two collections.
      config: the architecture.
      tokens_BT: inputs.
      target_BT: the tokens one further on.
      mtp_loss_weight: lambda.
      weight_BT: what each target counts, float32; None is 1.
      segment_starts_BT: where the document of each token begins (`DeepSeekV3.features`); None lets attention cross documents.
      aux_loss_alpha: alpha; None is the config's.
      totals: the weight, over the whole step, of the terms of the main model and of every depth; None if this is all of it.
      share: of the step's sequences that these are.
    """
    variables = {"params": params, "router": router}
    features = DeepSeekV3(config).apply(variables, tokens_BT, mtp=True, segment_starts_BT=segment_starts_BT, method="features")
    head_DV = params["lm_head"]["kernel"]
    weight_BT = jnp.ones(target_BT.shape, jnp.float32) if weight_BT is None else weight_BT

    def mean_loss(h_BTD: jax.Array, depth: int) -> jax.Array:
        counts_BT = depth_weights(weight_BT, segment_starts_BT, depth)
        total = counts_BT.sum() if totals is None else totals[depth]
        shifted_BT = jnp.roll(target_BT, -depth, axis=1)
        # A batch in which nothing is to be learnt has no loss.
        return cross_entropy(h_BTD, head_DV, shifted_BT, counts_BT, config.loss_chunk) / jnp.maximum(total, 1.0)

    main_loss = mean_loss(features.h_BTD, 0)
    depths = [mean_loss(h_BTD, k) for k, h_BTD in enumerate(features.mtp_h_BTD, 1)]
    mtp_loss = sum(depths, jnp.float32(0)) / max(len(depths), 1)
    balance_loss = features.balance_loss * share
    alpha = config.aux_loss_alpha if aux_loss_alpha is None else aux_loss_alpha
    loss = main_loss + mtp_loss_weight * mtp_loss + alpha * balance_loss
    return Losses(loss, main_loss, mtp_loss, balance_loss, features.load, features.rounds)
