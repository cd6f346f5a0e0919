"""Sorting by expert and the two row movements, against plain indexing and its automatic gradients."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.experts import combine, dispatch, sort_by_expert
from tests.tolerances import TOLERANCE

# Tokens, choices of each, experts.
SHAPES = [(1, 3, 8), (7, 1, 4), (33, 8, 256)]


def choose(num_tokens: int, num_chosen: int, num_experts: int) -> jax.Array:
    """Distinct experts for each token, as top-k gives them."""
    rng = np.random.default_rng(0)
    return jnp.asarray(np.stack([rng.permutation(num_experts)[:num_chosen] for _ in range(num_tokens)]).astype(np.int32))


sorted_by_expert = jax.jit(sort_by_expert, static_argnums=1)
# Each shape, each dtype, and the largest in both.
SHAPES_AND_DTYPES = [(SHAPES[0], "float32"), (SHAPES[1], "bfloat16"), (SHAPES[2], "float32"), (SHAPES[2], "bfloat16")]


def value_and_gradients(function: Callable[..., jax.Array], gradient: jax.Array, *args: jax.Array) -> tuple[jax.Array, ...]:
    @jax.jit
    def run(gradient: jax.Array, *args: jax.Array) -> tuple[jax.Array, ...]:
        value, backward = jax.vjp(function, *args)
        return value, *backward(gradient)

    return run(gradient, *args)


def check_order(chosen_TK: jax.Array, num_experts: int) -> None:
    order, inverse, group_sizes_E = sorted_by_expert(chosen_TK, num_experts)
    chex.assert_type([order, inverse, group_sizes_E], jnp.int32)
    flat = np.asarray(chosen_TK).reshape(-1)
    np.testing.assert_array_equal(order, np.argsort(flat, kind="stable"))
    np.testing.assert_array_equal(np.asarray(inverse)[order], np.arange(flat.size))
    np.testing.assert_array_equal(group_sizes_E, np.bincount(flat, minlength=num_experts))


@pytest.mark.parametrize("shape", SHAPES)
def test_choices_are_sorted_by_expert(shape: tuple[int, int, int]) -> None:
    check_order(choose(*shape), shape[2])


@pytest.mark.parametrize("expert", [0, 2, 4])
def test_one_expert_may_get_everything(expert: int) -> None:
    check_order(jnp.asarray(np.full((6, 2), expert, np.int32)), 5)


def test_more_choices_than_can_be_sorted_are_refused() -> None:
    chosen_TK = jax.ShapeDtypeStruct((2**20, 8), jnp.int32)
    with pytest.raises(ValueError, match="8388608 choices among 256 experts"):
        jax.eval_shape(lambda chosen_TK: sort_by_expert(chosen_TK, 256), chosen_TK)


@pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_DTYPES)
def test_dispatch_is_a_gather(shape: tuple[int, int, int], dtype: str) -> None:
    num_tokens, num_chosen, num_experts = shape
    order, inverse, _ = sorted_by_expert(choose(*shape), num_experts)
    rng = np.random.default_rng(1)
    x_TD = rng.standard_normal((num_tokens, 5)).astype(jnp.dtype(dtype))
    dx_RD = rng.standard_normal((num_tokens * num_chosen, 5)).astype(jnp.dtype(dtype))

    x_RD, dx_TD = value_and_gradients(lambda x_TD: dispatch(x_TD, order, inverse), dx_RD, x_TD)
    want_TD = np.zeros((num_tokens, 5), np.float32)
    np.add.at(want_TD, np.asarray(order) // num_chosen, dx_RD.astype(np.float32))
    chex.assert_trees_all_equal(np.asarray(x_RD), x_TD[np.asarray(order) // num_chosen])
    chex.assert_trees_all_equal_dtypes(dx_TD, x_TD)
    # Summed in float32 and rounded once, so even bfloat16 agrees to its last digit.
    tolerance = {"float32": 1e-6, "bfloat16": 2.0**-8}[dtype]
    chex.assert_trees_all_close(np.asarray(dx_TD, np.float32), want_TD, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_DTYPES)
def test_combine_is_the_weighted_sum(shape: tuple[int, int, int], dtype: str) -> None:
    num_tokens, num_chosen, num_experts = shape
    order, inverse, _ = sorted_by_expert(choose(*shape), num_experts)
    rng = np.random.default_rng(2)
    y_RD = rng.standard_normal((num_tokens * num_chosen, 5)).astype(jnp.dtype(dtype))
    weight_TK = rng.uniform(size=(num_tokens, num_chosen)).astype(np.float32)
    dout_TD = rng.standard_normal((num_tokens, 5)).astype(jnp.dtype(dtype))

    found = value_and_gradients(lambda *args: combine(*args, order, inverse), dout_TD, y_RD, weight_TK)
    y_TKD, dout = y_RD.astype(np.float32)[np.asarray(inverse)].reshape(num_tokens, num_chosen, -1), dout_TD.astype(np.float32)
    dy_RD = np.empty_like(y_RD, np.float32)
    dy_RD[np.asarray(inverse)] = np.einsum("TK,TD->TKD", weight_TK, dout).reshape(dy_RD.shape)
    want = np.einsum("TK,TKD->TD", weight_TK, y_TKD), dy_RD, np.einsum("TD,TKD->TK", dout, y_TKD)
    chex.assert_trees_all_equal_dtypes(found, (y_RD, y_RD, weight_TK))
    chex.assert_trees_all_close([np.asarray(a, np.float32) for a in found], list(want), **TOLERANCE[dtype])
    # The weights' gradient is float32 throughout, whatever the rows are.
    chex.assert_trees_all_close(np.asarray(found[2]), want[2], **TOLERANCE["float32"])


def test_gradients_do_not_scatter() -> None:
    order, inverse, _ = sorted_by_expert(choose(16, 4, 16), 16)
    x_TD, y_RD, weight_TK = jnp.ones((16, 5)), jnp.ones((64, 5)), jnp.ones((16, 4))
    moved = jax.make_jaxpr(jax.grad(lambda x_TD: jnp.sum(dispatch(x_TD, order, inverse) ** 2)))(x_TD)
    summed = jax.make_jaxpr(jax.grad(lambda *args: jnp.sum(combine(*args, order, inverse) ** 2), argnums=(0, 1)))
    assert "scatter" in str(jax.make_jaxpr(jax.grad(lambda x_TD: jnp.sum(x_TD[order // 4] ** 2)))(x_TD))
    assert "scatter" not in str(moved)
    assert "scatter" not in str(summed(y_RD, weight_TK))


def test_there_and_back() -> None:
    """With weights that sum to one, experts that do nothing give the tokens back."""
    order, inverse, _ = sorted_by_expert(choose(33, 8, 64), 64)
    rng = np.random.default_rng(3)
    x_TD, weight_TK = rng.standard_normal((33, 6)).astype(np.float32), rng.uniform(size=(33, 8)).astype(np.float32)
    weight_TK /= weight_TK.sum(1, keepdims=True)
    found = jax.jit(lambda x_TD, weight_TK: combine(dispatch(x_TD, order, inverse), weight_TK, order, inverse))(x_TD, weight_TK)
    chex.assert_trees_all_close(found, x_TD, rtol=1e-5, atol=1e-6)
