"""RMSNorm, Linear, Embedding and SwiGLU against numpy in float64: values, gradients, dtypes."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from dsv3_jax.config import MeshConfig
from dsv3_jax.model.layers import EMBEDDING_AXES, Embedding, Linear, RMSNorm, SwiGLU
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import RULES, SERVING, TOKEN_SPEC, ShardingRules, use_rules
from tests.model.tiny import CONFIG, assert_gradient
from tests.tolerances import TOLERANCE

BFLOAT16 = CONFIG.with_dtype("bfloat16")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def values_and_gradients(
    module: nn.Module, params: dict[str, Any], x: np.ndarray, dy: np.ndarray
) -> tuple[jax.Array, tuple[Any, jax.Array]]:
    """module(x), and the gradient of sum(dy * module(x)) with respect to the parameters and x."""

    def loss(params: dict[str, Any], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = module.apply({"params": params}, x)
        return jnp.sum(dy * y), y

    gradients, y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    return y, gradients


# --- RMSNorm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "epsilon"), [((2, 3, 6), 0.5), ((2, 3, 4, 6), None)])
def test_rms_norm(shape: tuple[int, ...], epsilon: float | None) -> None:
    """scale * x / rms(x) over the last axis of any array, with the config's epsilon or its own; and the chain rule by hand."""
    config = dataclasses.replace(CONFIG, rms_norm_eps=0.1)
    norm = RMSNorm(config, 6, epsilon=epsilon)
    x, scale, dy = normal(*shape), normal(6, seed=1), normal(*shape, seed=2)
    found, gradients = values_and_gradients(norm, {"scale": scale}, x, dy)
    chex.assert_shape(found, shape)

    inverse = 1 / np.sqrt(np.mean(np.float64(x) ** 2, axis=-1, keepdims=True) + (0.1 if epsilon is None else epsilon))
    chex.assert_trees_all_close(np.float64(found), scale * x * inverse, **TOLERANCE["float32"])
    dscale = np.sum((dy * x * inverse).reshape(-1, 6), axis=0)
    dx = scale * dy * inverse - x * inverse**3 * np.mean(scale * dy * x, axis=-1, keepdims=True)
    chex.assert_trees_all_close(jax.tree.map(np.float64, gradients), ({"scale": dscale}, dx), **TOLERANCE["float32"])


def test_rms_norm_takes_statistics_in_float32() -> None:
    """In bfloat16 the mean square of these would be off by percents; the result is rounded once, at the end."""
    x = (normal(4, 1000) + 3).astype(jnp.bfloat16)
    scale = normal(1000, seed=1).astype(jnp.bfloat16)
    found = jax.jit(RMSNorm(BFLOAT16, 1000).apply)({"params": {"scale": scale}}, x)
    assert found.dtype == jnp.bfloat16
    exact = np.float64(x)
    exact = np.float64(scale) * exact / np.sqrt(np.mean(exact**2, axis=-1, keepdims=True) + BFLOAT16.rms_norm_eps)
    chex.assert_trees_all_close(np.float64(found), exact, rtol=2**-8 * 1.01, atol=0)


# --- Linear ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "num_in", "equation"), [((4, 3, 5), 1, "bti,inx->btnx"), ((3, 2, 5), 2, "btnw,nwd->btd")])
def test_linear(shape: tuple[int, ...], num_in: int, equation: str) -> None:
    linear = Linear(CONFIG, shape, ("a", "b", "c"), num_in)
    x, kernel = normal(2, 7, *shape[:num_in]), normal(*shape, seed=1)
    dy = normal(2, 7, *shape[num_in:], seed=2)
    found, gradients = values_and_gradients(linear, {"kernel": kernel}, x, dy)
    chex.assert_trees_all_close(
        np.float64(found), np.einsum(equation, np.float64(x), np.float64(kernel)), **TOLERANCE["float32"]
    )

    ins, out = equation.split("->")
    left, right = ins.split(",")
    dkernel = np.einsum(f"{left},{out}->{right}", np.float64(x), np.float64(dy))
    dx = np.einsum(f"{out},{right}->{left}", np.float64(dy), np.float64(kernel))
    chex.assert_trees_all_close(jax.tree.map(np.float64, gradients), ({"kernel": dkernel}, dx), **TOLERANCE["float32"])


def test_products_run_in_the_computation_dtype_and_parameters_stay_in_theirs() -> None:
    config = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="float32")
    linear = Linear(config, (4, 5), ("a", "b"))
    x = normal(2, 3, 4)
    found, variables = jax.jit(lambda: linear.init_with_output(jax.random.key(0), x))()
    kernel = nn.meta.unbox(variables)["params"]["kernel"]
    chex.assert_type([found, kernel], [jnp.bfloat16, jnp.float32])
    rounded = [np.float64(np.asarray(a).astype(jnp.bfloat16)) for a in (x, kernel)]
    chex.assert_trees_all_close(np.float64(found), rounded[0] @ rounded[1], rtol=2**-8, atol=1e-6)


# --- Embedding -------------------------------------------------------------------------------------------------------


def test_embedding_takes_rows_and_adds_their_gradients() -> None:
    V, D = CONFIG.vocab_size, CONFIG.hidden_size
    table_VD, tokens_BT = normal(V, D), np.array([[3, 0, 3, V - 1], [5, 3, 0, 0]])
    dy_BTD, expected_VD = normal(2, 4, D, seed=1), np.zeros((V, D))
    np.add.at(expected_VD, tokens_BT, dy_BTD)

    def loss(table_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
        found_BTD = Embedding(CONFIG).apply({"params": {"embedding": table_VD}}, tokens_BT)
        return jnp.sum(dy_BTD * found_BTD), found_BTD

    gradient_VD, found_BTD = jax.jit(jax.grad(loss, has_aux=True))(table_VD)
    chex.assert_trees_all_equal(np.asarray(found_BTD), table_VD[tokens_BT])
    chex.assert_trees_all_close(np.float64(gradient_VD), expected_VD, **TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_id_outside_the_table_is_nan_and_never_another_row(dtype: str) -> None:
    """Within jit nothing can be raised; an id that is clamped or wrapped would train on a wrong token in silence."""
    config = CONFIG.with_dtype(dtype)
    V, D = config.vocab_size, config.hidden_size
    table_VD = normal(V, D).astype(dtype)
    tokens_BT = np.array([[0, V, V - 1, V + 1000, -1, -V, 7]])
    found_BTD = np.asarray(jax.jit(Embedding(config).apply)({"params": {"embedding": table_VD}}, tokens_BT))
    is_nan_BT = np.isnan(np.float32(found_BTD)).all(-1)
    chex.assert_trees_all_equal(is_nan_BT, np.array([[False, True, False, True, True, True, False]]))
    chex.assert_trees_all_equal(found_BTD[0, [0, 2, 6]], table_VD[[0, V - 1, 7]])


@pytest.mark.parametrize("rules", [RULES, SERVING])
def test_rows_looked_up_on_a_mesh(rules: ShardingRules) -> None:
    """Columns split over fsdp, and expert or not; rows over tensor."""
    config = dataclasses.replace(CONFIG, vocab_size=12, hidden_size=16)
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    variables = {"params": {"embedding": normal(12, 16)}}
    tokens_BT = np.arange(24).reshape(8, 3) % 13
    shardings = {"params": {"embedding": NamedSharding(mesh, rules.spec(EMBEDDING_AXES))}}, NamedSharding(mesh, TOKEN_SPEC)
    with jax.set_mesh(mesh), use_rules(rules):
        found_BTD = jax.jit(Embedding(config).apply, in_shardings=shardings)(variables, tokens_BT)
    table = np.concatenate([variables["params"]["embedding"], np.full((1, 16), np.nan, np.float32)])
    np.testing.assert_array_equal(found_BTD, table[tokens_BT])


# --- SwiGLU ----------------------------------------------------------------------------------------------------------


def test_swiglu() -> None:
    D, F = CONFIG.hidden_size, 10
    params = {
        "gate_proj": {"kernel": normal(D, F) * D**-0.5},
        "up_proj": {"kernel": normal(D, F, seed=1) * D**-0.5},
        "down_proj": {"kernel": normal(F, D, seed=2) * F**-0.5},
    }
    x_BTD, dy_BTD = normal(2, 3, D, seed=3), normal(2, 3, D, seed=4)

    def oracle(params: dict[str, Any], x_BTD: np.ndarray) -> np.ndarray:
        gate, up, down = (params[name]["kernel"] for name in ("gate_proj", "up_proj", "down_proj"))
        gated = x_BTD @ gate
        return (gated / (1 + np.exp(-gated)) * (x_BTD @ up)) @ down

    found_BTD, gradients = values_and_gradients(SwiGLU(CONFIG, F), params, x_BTD, dy_BTD)
    exact = jax.tree.map(np.float64, (params, x_BTD))
    chex.assert_trees_all_close(np.float64(found_BTD), oracle(*exact), **TOLERANCE["float32"])
    assert_gradient(gradients, lambda at: float(np.sum(dy_BTD * oracle(*at))), exact)


# --- What they are born with -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "x", "name", "axes"),
    [
        (RMSNorm(CONFIG, 6), jnp.ones((1, 6)), "scale", ("norm",)),
        (
            Linear(CONFIG, (60, 7, 10), ("embed", "heads", "head_dim")),
            jnp.ones((1, 60)),
            "kernel",
            ("embed", "heads", "head_dim"),
        ),
        (Embedding(dataclasses.replace(CONFIG, vocab_size=300)), jnp.zeros((1, 1), int), "embedding", ("vocab", "embed")),
    ],
)
def test_initial_weights_and_their_logical_axes(module: nn.Module, x: jax.Array, name: str, axes: tuple[str, ...]) -> None:
    """Norms one, everything else normal with `initializer_range`; every parameter knows its axes."""
    box = jax.jit(lambda: module.init(jax.random.key(0), x))()["params"][name]
    assert box.names == axes
    values = np.asarray(box.unbox())
    chex.assert_rank(values, len(axes))
    if name == "scale":
        chex.assert_trees_all_equal(values, np.ones_like(values))
    else:
        std = CONFIG.initializer_range
        assert values.std() == pytest.approx(std, rel=0.05)
        assert abs(values.mean()) < 4 * std / values.size**0.5
