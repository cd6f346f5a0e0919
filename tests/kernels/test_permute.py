"""Sorting by expert and the two row movements, against plain indexing and its automatic gradients."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.permute import combine, dispatch, sort_by_expert
from tests.tolerances import TOLERANCE

# Tokens, choices of each, experts.
SHAPES = [(1, 3, 8), (7, 1, 4), (33, 8, 256)]


def choose(num_tokens: int, num_chosen: int, num_experts: int) -> jax.Array:
    """Distinct experts for each token, as top-k gives them."""
    rng = np.random.default_rng(0)
    return jnp.asarray(np.stack([rng.permutation(num_experts)[:num_chosen] for _ in range(num_tokens)]), jnp.int32)


def value_and_gradients(function: Callable[..., jax.Array], gradient: jax.Array, *args: jax.Array) -> tuple[jax.Array, ...]:
    @jax.jit
    def run(gradient: jax.Array, *args: jax.Array) -> tuple[jax.Array, ...]:
        value, backward = jax.vjp(function, *args)
        return value, *backward(gradient)

    return run(gradient, *args)


def check_order(chosen_TK: jax.Array, num_experts: int) -> None:
    order, inverse, group_sizes_E = jax.jit(sort_by_expert, static_argnums=1)(chosen_TK, num_experts)
    chex.assert_type([order, inverse, group_sizes_E], jnp.int32)
    flat = np.asarray(chosen_TK).reshape(-1)
    np.testing.assert_array_equal(order, np.argsort(flat, kind="stable"))
    np.testing.assert_array_equal(inverse[order], np.arange(flat.size))
    np.testing.assert_array_equal(group_sizes_E, np.bincount(flat, minlength=num_experts))


@pytest.mark.parametrize("shape", SHAPES)
def test_choices_are_sorted_by_expert(shape: tuple[int, int, int]) -> None:
    check_order(choose(*shape), shape[2])


@pytest.mark.parametrize("expert", [0, 2, 4])
def test_one_expert_may_get_everything(expert: int) -> None:
    check_order(jnp.full((6, 2), expert, jnp.int32), 5)


def test_more_choices_than_can_be_sorted_are_refused() -> None:
    chosen_TK = jax.ShapeDtypeStruct((2**20, 8), jnp.int32)
    with pytest.raises(ValueError, match="8388608 choices among 256 experts"):
        jax.eval_shape(lambda chosen_TK: sort_by_expert(chosen_TK, 256), chosen_TK)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_dispatch_is_a_gather(shape: tuple[int, int, int], dtype: str) -> None:
    num_tokens, num_chosen, num_experts = shape
    order, inverse, _ = sort_by_expert(choose(*shape), num_experts)
    rng = np.random.default_rng(1)
    x_TD = jnp.asarray(rng.standard_normal((num_tokens, 5)), dtype)
    dx_RD = jnp.asarray(rng.standard_normal((num_tokens * num_chosen, 5)), dtype)

    x_RD, dx_TD = value_and_gradients(lambda x_TD: dispatch(x_TD, order, inverse), dx_RD, x_TD)
    want_RD, want_TD = value_and_gradients(
        lambda x_TD: x_TD[order // num_chosen], dx_RD.astype(jnp.float32), x_TD.astype(jnp.float32)
    )
    chex.assert_trees_all_equal(x_RD, want_RD.astype(dtype))
    chex.assert_trees_all_equal_dtypes(dx_TD, x_TD)
    # Summed in float32 and rounded once, so even bfloat16 agrees to its last digit.
    tolerance = {"float32": 1e-6, "bfloat16": 2.0**-8}[dtype]
    chex.assert_trees_all_close(dx_TD.astype(jnp.float32), want_TD, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_combine_is_the_weighted_sum(shape: tuple[int, int, int], dtype: str) -> None:
    num_tokens, num_chosen, num_experts = shape
    order, inverse, _ = sort_by_expert(choose(*shape), num_experts)
    rng = np.random.default_rng(2)
    y_RD = jnp.asarray(rng.standard_normal((num_tokens * num_chosen, 5)), dtype)
    weight_TK = jnp.asarray(rng.uniform(size=(num_tokens, num_chosen)), jnp.float32)
    dout_TD = jnp.asarray(rng.standard_normal((num_tokens, 5)), dtype)

    def plain(y_RD: jax.Array, weight_TK: jax.Array) -> jax.Array:
        y_TKD = y_RD[inverse].reshape(num_tokens, num_chosen, -1)
        return jnp.einsum("TK,TKD->TD", weight_TK, y_TKD, precision="highest")

    found = value_and_gradients(lambda *args: combine(*args, order, inverse), dout_TD, y_RD, weight_TK)
    want = value_and_gradients(plain, dout_TD.astype(jnp.float32), y_RD.astype(jnp.float32), weight_TK)
    chex.assert_trees_all_equal_dtypes(found, (y_RD, y_RD, weight_TK))
    chex.assert_trees_all_close([a.astype(jnp.float32) for a in found], list(want), **TOLERANCE[dtype])
    # The weights' gradient is float32 throughout, whatever the rows are.
    chex.assert_trees_all_close(found[2], want[2], **TOLERANCE["float32"])


def test_gradients_do_not_scatter() -> None:
    order, inverse, _ = sort_by_expert(choose(16, 4, 16), 16)
    x_TD, y_RD, weight_TK = jnp.ones((16, 5)), jnp.ones((64, 5)), jnp.ones((16, 4))
    moved = jax.make_jaxpr(jax.grad(lambda x_TD: jnp.sum(dispatch(x_TD, order, inverse) ** 2)))(x_TD)
    summed = jax.make_jaxpr(jax.grad(lambda *args: jnp.sum(combine(*args, order, inverse) ** 2), argnums=(0, 1)))
    assert "scatter" in str(jax.make_jaxpr(jax.grad(lambda x_TD: jnp.sum(x_TD[order // 4] ** 2)))(x_TD))
    assert "scatter" not in str(moved)
    assert "scatter" not in str(summed(y_RD, weight_TK))


def test_there_and_back() -> None:
    """With weights that sum to one, experts that do nothing give the tokens back."""
    chosen_TK = choose(33, 8, 64)
    order, inverse, _ = sort_by_expert(chosen_TK, 64)
    x_TD = jnp.asarray(np.random.default_rng(3).standard_normal((33, 6)), jnp.float32)
    weight_TK = jax.nn.softmax(chosen_TK.astype(jnp.float32) / 64)
    chex.assert_trees_all_close(combine(dispatch(x_TD, order, inverse), weight_TK, order, inverse), x_TD, rtol=1e-5, atol=1e-6)
