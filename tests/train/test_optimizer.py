"""AdamW against optax, and against numpy written from the formulas; the schedule; what decays."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from dsv3_jax.config import OptimizerConfig
from dsv3_jax.train.optimizer import decayed, make_optimizer, scale_by_adam
from tests.model.tiny import CONFIG, abstract_variables

BETA1, BETA2, EPSILON = 0.9, 0.95, 1e-8
Tree = Any


def gradients(steps: int, scale: float = 1.0) -> list[Tree]:
    """Trees of gradients of very different sizes, some exactly zero."""
    rng = np.random.default_rng(0)
    sizes = {"kernel": 1e-2, "tiny": 1e-6, "zero": 0.0}
    return [
        {name: jnp.asarray(scale * size * rng.standard_normal((3, 5)), jnp.float32) for name, size in sizes.items()}
        for _ in range(steps)
    ]


def run(transformation: optax.GradientTransformation, grads: list[Tree]) -> tuple[list[Tree], optax.ScaleByAdamState]:
    state = transformation.init(grads[0])
    update = jax.jit(transformation.update)
    updates = []
    for grad in grads:
        updated, state = update(grad, state)
        updates.append(updated)
    return updates, state


def test_float32_moments_give_what_optax_gives() -> None:
    grads = gradients(5)
    ours, our_state = run(scale_by_adam(BETA1, BETA2, EPSILON, "float32"), grads)
    theirs, their_state = run(optax.scale_by_adam(BETA1, BETA2, EPSILON), grads)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5)
    chex.assert_trees_all_close(our_state, their_state, rtol=1e-5)
    assert int(our_state.count) == 5
    assert not np.any(ours[-1]["zero"])


def test_bfloat16_moments_are_rounded_only_where_they_are_stored() -> None:
    grads = gradients(4)
    updates, state = run(scale_by_adam(BETA1, BETA2, EPSILON, "bfloat16"), grads)
    for tree in (state.mu, state.nu):
        chex.assert_trees_all_equal_structs(tree, grads[0])
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float32")}

    mu, nu = np.zeros((2, 3, 5), ml_dtypes.bfloat16)
    for step, (grad, update) in enumerate(zip(grads, updates, strict=True), 1):
        g = np.asarray(grad["kernel"], np.float64)
        m = BETA1 * mu.astype(np.float64) + (1 - BETA1) * g
        v = BETA2 * nu.astype(np.float64) + (1 - BETA2) * g**2
        expected = (m / (1 - BETA1**step)) / (np.sqrt(v / (1 - BETA2**step)) + EPSILON)
        chex.assert_trees_all_close(np.asarray(update["kernel"]), expected.astype(np.float32), rtol=1e-4, atol=1e-6)
        mu, nu = m.astype(ml_dtypes.bfloat16), v.astype(ml_dtypes.bfloat16)


def test_bfloat16_moments_stay_close_to_float32_ones() -> None:
    grads = gradients(20)
    rounded, _ = run(scale_by_adam(BETA1, BETA2, EPSILON, "bfloat16"), grads)
    exact, _ = run(scale_by_adam(BETA1, BETA2, EPSILON, "float32"), grads)
    chex.assert_trees_all_equal(rounded[0], exact[0])
    chex.assert_trees_all_close(rounded, exact, rtol=3e-2, atol=3e-2)
    assert np.abs(rounded[-1]["kernel"] - exact[-1]["kernel"]).max() > 0


def test_gradients_in_bfloat16_are_squared_in_float32() -> None:
    grads = [jax.tree.map(lambda g: g.astype(jnp.bfloat16), tree) for tree in gradients(2)]
    ours, _ = run(scale_by_adam(BETA1, BETA2, EPSILON, "float32"), grads)
    wide = [jax.tree.map(lambda g: g.astype(jnp.float32), tree) for tree in grads]
    theirs, _ = run(optax.scale_by_adam(BETA1, BETA2, EPSILON), wide)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5)


def test_every_parameter_decays_but_the_norm_scales() -> None:
    params = abstract_variables(CONFIG)["params"]
    kept_out = {
        "/".join(key.key for key in path) for path, decays in jax.tree_util.tree_leaves_with_path(decayed(params)) if not decays
    }
    layers = ("dense_layers", "moe_layers", "mtp_0/block", "mtp_1/block")
    in_layers = ("input_layernorm", "post_attention_layernorm", "self_attn/q_a_layernorm", "self_attn/kv_a_layernorm")
    expected = {f"{layer}/{norm}/scale" for layer in layers for norm in in_layers}
    expected |= {f"mtp_{k}/{norm}/scale" for k in range(2) for norm in ("enorm", "hnorm", "norm")}
    assert kept_out == expected | {"norm/scale"}
    assert len(jax.tree.leaves(params)) > 2 * len(kept_out)


@pytest.mark.parametrize("clip_norm", [0.01, 100.0])
def test_the_whole_optimizer_is_adamw_written_out(clip_norm: float) -> None:
    """Clipping by the norm over all parameters, Adam, decoupled decay of the matrix alone."""
    settings = OptimizerConfig(
        learning_rate=1e-2, warmup_steps=2, weight_decay=0.5, clip_norm=clip_norm, epsilon=1e-6, moment_dtype="float32"
    )
    rng = np.random.default_rng(1)
    params = {"proj": {"kernel": rng.standard_normal((4, 3))}, "norm": {"scale": rng.standard_normal(3)}}
    grads = [jax.tree.map(lambda p: rng.standard_normal(p.shape), params) for _ in range(6)]

    rates = np.linspace(0.005, 0.01, 6)
    optimizer = make_optimizer(settings)
    ours: Tree = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    state, update = optimizer.init(ours), jax.jit(optimizer.update)
    for rate, grad in zip(rates, grads, strict=True):
        updates, state = update(jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grad), state, ours)
        ours = jax.tree.map(lambda p, u, rate=rate: p - jnp.float32(rate) * u, ours, updates)

    moments = {name: [0.0, 0.0] for name in ("proj", "norm")}
    for step, grad in enumerate(grads, 1):
        norm = math.sqrt(sum(float(np.sum(g**2)) for g in jax.tree.leaves(grad)))
        rate = rates[step - 1]
        for name, leaf, decay in (("proj", "kernel", 0.5), ("norm", "scale", 0.0)):
            g = grad[name][leaf] * min(1, clip_norm / norm)
            m, v = moments[name]
            m, v = moments[name] = [0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2]
            direction = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-6)
            params[name][leaf] = params[name][leaf] - rate * (direction + decay * params[name][leaf])
    chex.assert_trees_all_close(jax.tree.map(np.asarray, ours), params, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_the_optimizer_knows_the_parameters_and_not_the_router_biases(moment_dtype: Any) -> None:
    settings = dataclasses.replace(OptimizerConfig(), moment_dtype=moment_dtype)
    variables = abstract_variables(CONFIG)
    state = jax.eval_shape(make_optimizer(settings).init, variables["params"])
    adam = next(part for part in state if isinstance(part, optax.ScaleByAdamState))
    for moments in (adam.mu, adam.nu):
        chex.assert_trees_all_equal_shapes(moments, variables["params"])
        assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {jnp.dtype(moment_dtype)}
        names = {key.key for path, _ in jax.tree_util.tree_leaves_with_path(moments) for key in path}
        assert "e_score_correction_bias" not in names
