"""Rows to experts and back on one device: the dispatch and combine of DeepSeekMoE (section 2.1.2 of the report).

Choice (t, k) is number t * K + k, and R = T * K rows hold one choice each, sorted by expert. Both directions are
permutations, so the gradient of a gather is a gather by the inverse permutation, summed over K in float32. Automatic
differentiation would scatter-add instead, which is slower on every platform and sums in the dtype of the rows.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class ExpertOrder(NamedTuple):
    """How the choices of a batch are sorted by expert; equal experts keep the order of their choices."""

    order: jax.Array
    """int32 [R]: the choice that row r holds."""
    inverse: jax.Array
    """int32 [R]: the row that holds choice i."""
    group_sizes_E: jax.Array
    """int32 [E]: rows of each expert."""


def sort_by_expert(chosen_TK: jax.Array, num_experts: int) -> ExpertOrder:
    """Sorts the choices by expert.

    Args:
      chosen_TK: int32, the experts of each token, all in [0, num_experts).
      num_experts: E.

    Raises:
      ValueError: if num_experts * T * K does not fit in an int32.
    """
    num_choices = chosen_TK.size
    if num_experts * num_choices >= 2**31:
        raise ValueError(
            f"{num_choices} choices among {num_experts} experts are too many to sort at once; split the batch so that "
            "their product stays below 2**31"
        )
    choice = jnp.arange(num_choices, dtype=jnp.int32)
    # One integer that holds both expert and choice: sorting it alone takes a sixth of the time of a stable argsort on CPUs.
    key = jax.lax.sort(chosen_TK.reshape(-1).astype(jnp.int32) * num_choices + choice)
    order = key % num_choices
    inverse = jnp.zeros_like(order).at[order].set(choice, unique_indices=True, mode="promise_in_bounds")
    first_row = jnp.searchsorted(key, jnp.arange(num_experts + 1, dtype=jnp.int32) * num_choices)
    return ExpertOrder(order, inverse, jnp.diff(first_row).astype(jnp.int32))


@jax.custom_vjp
def dispatch(x_TD: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """The token of every row: [R, D], row r being x[order[r] // K].

    The gradient of x is summed over K in float32.

    Args:
      x_TD: the tokens.
      order, inverse: as `sort_by_expert` gives them; K is R / T.
    """
    return rows_at(x_TD, order // (order.shape[0] // x_TD.shape[0]))


@jax.custom_vjp
def combine(y_RD: jax.Array, weight_TK: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """sum_k weight_k y_k of every token, in float32, then y's dtype: [T, D].

    Args:
      y_RD: what the experts made of the rows.
      weight_TK: the weight of each choice.
      order, inverse: as `sort_by_expert` gives them.
    """
    return sum_over_choices(y_RD, inverse.reshape(weight_TK.shape), weight_TK).astype(y_RD.dtype)


def rows_at(array_XD: jax.Array, index_R: jax.Array) -> jax.Array:
    """The rows at indices that are known to lie within the array."""
    return array_XD.at[index_R].get(mode="promise_in_bounds")


def sum_over_choices(y_RD: jax.Array, row_TK: jax.Array, weight_TK: jax.Array | None) -> jax.Array:
    """sum_k weight_k y[row_k] of every token, or the plain sum: [T, D], float32 at the least."""
    # One gather for each k, rather than one of [T, K, D], fuses into a single pass without a temporary.
    total_TD = jnp.zeros_like(y_RD, shape=(row_TK.shape[0], y_RD.shape[1]), dtype=jnp.promote_types(y_RD.dtype, jnp.float32))
    for k in range(row_TK.shape[1]):
        chosen_TD = rows_at(y_RD, row_TK[:, k])
        total_TD += chosen_TD if weight_TK is None else weight_TK[:, k, None] * chosen_TD
    return total_TD


def _dispatch_forward(x_TD: jax.Array, order: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    # The number of tokens travels with the inverse: [T, K].
    return dispatch(x_TD, order, inverse), inverse.reshape(x_TD.shape[0], -1)


def _dispatch_backward(row_TK: jax.Array, dx_RD: jax.Array) -> tuple[jax.Array, None, None]:
    return sum_over_choices(dx_RD, row_TK, None).astype(dx_RD.dtype), None, None


def _combine_forward(
    y_RD: jax.Array, weight_TK: jax.Array, order: jax.Array, inverse: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return combine(y_RD, weight_TK, order, inverse), (y_RD, weight_TK, order, inverse)


def _combine_backward(residuals: tuple[jax.Array, ...], dout_TD: jax.Array) -> tuple[jax.Array | None, ...]:
    y_RD, weight_TK, order, inverse = residuals
    wide = jnp.promote_types(y_RD.dtype, jnp.float32)
    dout_RD = rows_at(dout_TD, order // weight_TK.shape[1]).astype(wide)
    dy_RD = rows_at(weight_TK.reshape(-1), order)[:, None] * dout_RD
    dweight_TK = rows_at(jnp.sum(y_RD * dout_RD, axis=1), inverse).reshape(weight_TK.shape)
    return dy_RD.astype(y_RD.dtype), dweight_TK.astype(weight_TK.dtype), None, None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)
combine.defvjp(_combine_forward, _combine_backward)
