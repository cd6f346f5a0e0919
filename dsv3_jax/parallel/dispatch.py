"""The expert all-to-all (sections 2.1.2 and 3.2 of the report): tokens to the devices of their experts and back.

One `jax.shard_map` region over the whole mesh. The tokens' choices travel along the `expert` axis in as many rounds as the
fullest device needs, nearly always one (`exchange.py`); each round is one call of `expert_ffn` on a buffer of fixed size.
Weights are gathered along the fsdp axes in here, in the computation dtype, and their gradients leave by reduce-scatter.

The number of rounds is known only at run time, so the gradient is written out. It keeps nothing but the inputs: the
backward pass sends the tokens again, together with the gradients of their sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.expert_ffn import expert_ffn
from dsv3_jax.kernels.varying import varying_alike, zeros_beside
from dsv3_jax.parallel.exchange import EXCHANGES, EXPERT_AXIS, Exchange, choose_exchange
from dsv3_jax.parallel.mesh import TOKEN_AXES, current_mesh, current_platform
from dsv3_jax.parallel.placement import Weight, scattered_sum, splittable, whole_weight
from dsv3_jax.parallel.rules import TOKENS

ExpertWeights = tuple[Weight, Weight, Weight]
"""The routed experts' parameters, gate, up and down: [E, D, F] twice and [E, F, D]."""
WEIGHT_AXES = (
    ("experts", "expert_embed", "expert_mlp"),
    ("experts", "expert_embed", "expert_mlp"),
    ("experts", "expert_mlp", "expert_embed"),
)
"""Their logical axes."""


class _How(NamedTuple):
    """What is fixed before the program runs."""

    backend: str
    dtype: str


def routed_experts_on_mesh(
    x_BTD: jax.Array, chosen_BTK: jax.Array, weight_BTK: jax.Array, weights: ExpertWeights, config: ModelConfig, backend: str
) -> tuple[jax.Array, jax.Array]:
    """sum_k weight_k * Expert_{chosen_k}(x) on the current mesh.

    The sum over the choices is in float32, rounded to x's dtype once; along `tensor`, where every device has one over its own
    hidden units, each is rounded, and they are added up in x's dtype.

    Args:
      x_BTD, chosen_BTK, weight_BTK: tokens, their experts (indices of the stacks) and the weights of these, split as `TOKENS`.
      weights: split as `WEIGHT_AXES`.
      config: gives the exchange and the size of its buffer.
      backend: of `expert_ffn`.

    Returns:
      The sums, [B, T, D] in x's dtype, and the number of rounds it took, an int32 scalar.
    """
    mesh = current_mesh()
    assert mesh is not None
    exchange = choose_exchange(config.expert_exchange, current_platform(), mesh.shape[EXPERT_AXIS])
    region = functools.partial(
        _on_device,
        num_experts=weights[0].shape[0],
        exchange=exchange,
        receive_factor=config.receive_factor,
        how=_How(backend, config.dtype),
    )
    split, weight_specs = zip(*map(splittable, weights, WEIGHT_AXES), strict=True)
    specs = TOKENS, TOKENS, TOKENS, weight_specs
    return jax.shard_map(region, in_specs=specs, out_specs=(TOKENS, PartitionSpec()))(x_BTD, chosen_BTK, weight_BTK, split)


def _on_device(
    x_BTD: jax.Array,
    chosen_BTK: jax.Array,
    weight_BTK: jax.Array,
    weights: ExpertWeights,
    *,
    num_experts: int,
    exchange: str,
    receive_factor: float,
    how: _How,
) -> tuple[jax.Array, jax.Array]:
    """The share of one device: its own tokens, and the experts it holds."""
    x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
    chosen_TK, weight_TK = (array.reshape(-1, array.shape[-1]) for array in (chosen_BTK, weight_BTK))
    plan = EXCHANGES[exchange].plan(chosen_TK, num_experts, receive_factor)
    # The fullest device of the whole mesh sets the number: all of them run one program.
    rounds = jax.lax.pmax(plan.rounds(), TOKEN_AXES)
    y_TD = _weighted_sums(*varying_alike(x_TD, weight_TK, weights, plan, rounds), how)
    # Along `tensor` every device has summed over its own hidden units.
    return jax.lax.psum(y_TD, "tensor").reshape(x_BTD.shape), rounds


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _weighted_sums(
    x_TD: jax.Array, weight_TK: jax.Array, weights: ExpertWeights, plan: Exchange, rounds: jax.Array, how: _How
) -> jax.Array:
    whole = _gather(weights, how)

    def one_round(r: jax.Array, sum_TD: jax.Array) -> jax.Array:
        y_RD = expert_ffn(plan.send_tokens(r, x_TD), *whole, group_sizes_E=plan.group_sizes(r), backend=how.backend)
        return sum_TD + plan.return_sums(r, y_RD, weight_TK)

    start = zeros_beside(x_TD, x_TD.shape, jnp.promote_types(x_TD.dtype, jnp.float32))
    return _over_rounds(one_round, start, plan, rounds).astype(x_TD.dtype)


def _over_rounds(one_round: Callable[[jax.Array, Any], Any], start: Any, plan: Exchange, rounds: jax.Array) -> Any:
    """Folds `one_round(r, carry)` over the rounds. The first, mostly the only one, stands outside of the loop.

    There the compiler can compute other things, the shared expert above all, while rows travel. Where one round is sure to
    do there is no loop, whose body would be compiled for nothing.
    """
    first = one_round(zeros_beside(rounds, (), jnp.int32), start)
    return first if plan.fits_one_round() else jax.lax.fori_loop(1, rounds, one_round, first)


def _forward(
    x_TD: jax.Array, weight_TK: jax.Array, weights: ExpertWeights, plan: Exchange, rounds: jax.Array, how: _How
) -> tuple[jax.Array, tuple]:
    return _weighted_sums(x_TD, weight_TK, weights, plan, rounds, how), (x_TD, weight_TK, weights, plan, rounds)


def _backward(how: _How, residuals: tuple, dsum_TD: jax.Array) -> tuple:
    x_TD, weight_TK, weights, plan, rounds = residuals
    whole = _gather(weights, how)

    def one_round(r: jax.Array, carry: tuple[jax.Array, jax.Array, ExpertWeights]) -> tuple:
        dx_TD, dweight_TK, dwhole = carry
        sizes_e = plan.group_sizes(r)
        dsum_RD, weight_R = plan.send_tokens(r, dsum_TD), plan.send_choices(r, weight_TK)
        ffn = functools.partial(expert_ffn, group_sizes_E=sizes_e, backend=how.backend)
        y_RD, transpose = jax.vjp(ffn, plan.send_tokens(r, x_TD), *whole)
        wide_RD = dsum_RD.astype(dx_TD.dtype)
        dx_RD, *more = transpose((weight_R[:, None] * wide_RD).astype(y_RD.dtype))
        return (
            dx_TD + plan.return_sums(r, dx_RD, None),
            dweight_TK + plan.return_choices(r, jnp.sum(y_RD * wide_RD, axis=1)),
            tuple(a + b for a, b in zip(dwhole, more, strict=True)),
        )

    start = (
        zeros_beside(x_TD, x_TD.shape, jnp.promote_types(x_TD.dtype, jnp.float32)),
        zeros_beside(x_TD, weight_TK.shape, weight_TK.dtype),
        tuple(zeros_beside(x_TD, w.shape, w.dtype) for w in whole),
    )
    dx_TD, dweight_TK, dwhole = _over_rounds(one_round, start, plan, rounds)
    return dx_TD.astype(x_TD.dtype), dweight_TK, _scatter(dwhole, weights), None, None


_weighted_sums.defvjp(_forward, _backward)


def _gather(weights: ExpertWeights, how: _How) -> ExpertWeights:
    """The local experts' weights, whole along the fsdp axes."""
    gate, up, down = (whole_weight(w, axes, how.dtype) for w, axes in zip(weights, WEIGHT_AXES, strict=True))
    return gate, up, down


def _scatter(dwhole: tuple[jax.Array, ...], weights: ExpertWeights) -> ExpertWeights:
    """Their gradients, summed over the fsdp axes and split along them again, in the dtype of the parameters."""
    triples = zip(dwhole, WEIGHT_AXES, weights, strict=True)
    gate, up, down = (scattered_sum(dw, axes).astype(w.dtype) for dw, axes, w in triples)
    return gate, up, down
