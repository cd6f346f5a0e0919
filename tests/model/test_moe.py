"""The MoE feed-forward against every token at every expert in float64: nothing is dropped under any load."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.model import ExpertBackend
from dsv3_jax.model.moe import MoE, Routing
from tests import reference_model
from tests.model.tiny import CONFIG, assert_gradient, oracle_tensors, published, random_variables
from tests.tolerances import TOLERANCE

ONE_LAYER = dataclasses.replace(CONFIG, num_hidden_layers=2)
"""Its layer 1 is MoE."""

Tree = dict[str, Any]


def draw(config: ModelConfig) -> tuple[Tree, np.ndarray]:
    """The layer's variables, and states [2, 25, D]: more rows than two tiles of experts' rows."""
    variables = random_variables(config)
    layer = {name: jax.tree.map(lambda leaf_L: leaf_L[0], tree["moe_layers"]["mlp"]) for name, tree in variables.items()}
    x_BTD = np.random.default_rng(1).standard_normal((2, 25, config.hidden_size)).astype(np.float32)
    return layer, x_BTD


def oracle(config: ModelConfig, layer: Tree, x_BTD: np.ndarray) -> tuple[np.ndarray, reference_model.Routing]:
    """sum_k weight_k Expert_k(x) + Shared(x)."""
    stacks = {name: {"moe_layers": {"mlp": jax.tree.map(lambda leaf: leaf[None], tree)}} for name, tree in layer.items()}
    tensors = reference_model.layer_tensors(oracle_tensors(config, stacks), 1)
    routing = reference_model.route(published(config), tensors, np.float64(x_BTD))
    return reference_model.experts(published(config), tensors, np.float64(x_BTD), routing), routing


def moe(config: ModelConfig, layer: Tree, x_BTD: np.ndarray) -> tuple[jax.Array, Routing]:
    y_BTD, routing, _ = jax.jit(MoE(config).apply)(layer, x_BTD)
    return y_BTD, routing


@pytest.mark.parametrize(("shared", "backend"), [(0, "reference"), (1, "tiles"), (2, "ragged_dot")])
def test_values_and_gradients(shared: int, backend: str) -> None:
    """Without, with one and with two shared experts; every backend of the routed ones. The bias has no gradient."""
    config = dataclasses.replace(ONE_LAYER, n_shared_experts=shared, expert_backend=backend)
    layer, x_BTD = draw(config)
    assert ("shared_experts" in layer["params"]) == (shared > 0)
    dy_BTD = np.random.default_rng(2).standard_normal(x_BTD.shape)

    def loss(layer: Tree, x_BTD: jax.Array) -> tuple[jax.Array, Any]:
        y_BTD, routing = moe(config, layer, x_BTD)
        return jnp.sum(dy_BTD * y_BTD), (y_BTD, routing)

    gradient, (y_BTD, routing) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(layer, x_BTD)
    expected_BTD, expected_routing = oracle(config, layer, x_BTD)
    assert expected_routing.margin_BT.min() > 1e-4, "a near tie: draw another"
    chex.assert_trees_all_equal(np.int64(routing.chosen_BTK), expected_routing.chosen_BTK)
    chex.assert_trees_all_equal_shapes(y_BTD, expected_BTD)
    chex.assert_trees_all_close(np.float64(y_BTD), expected_BTD, **TOLERANCE["float32"])
    assert_gradient(gradient, lambda at: float(np.sum(dy_BTD * oracle(config, *at)[0])), (layer, x_BTD))


def test_the_backends_are_those_of_the_config() -> None:
    """The test above, the "auto" of the one below and tests/kernels/test_pallas_*.py leave none out."""
    backends = {"auto", "reference", "tiles", "ragged_dot", "pallas_tpu", "pallas_gpu"}
    assert set(typing.get_args(ExpertBackend)) == backends


def test_everything_to_one_expert() -> None:
    """50 tokens in one place: a capacity would drop most of them."""
    config = dataclasses.replace(ONE_LAYER, num_experts_per_tok=1, n_group=1, topk_group=1)
    layer, x_BTD = draw(config)
    layer["router"]["gate"]["e_score_correction_bias"][:] = 0
    layer["router"]["gate"]["e_score_correction_bias"][5] = 10
    y_BTD, routing = moe(config, layer, x_BTD)
    expected_BTD, _ = oracle(config, layer, x_BTD)
    chex.assert_trees_all_equal(np.asarray(routing.load_E), np.float32([0, 0, 0, 0, 0, 50, 0, 0]))
    chex.assert_trees_all_close(np.float64(y_BTD), expected_BTD, **TOLERANCE["float32"])
    assert (
        np.abs(expected_BTD - reference_model.swiglu(shared_of(layer), "shared_experts", np.float64(x_BTD))).max(-1).min()
        > 1e-3
    )


def shared_of(layer: Tree) -> dict[str, np.ndarray]:
    """Output for a token that its expert dropped."""
    shared = layer["params"]["shared_experts"]
    return {f"shared_experts.{name}.weight": np.float64(leaf["kernel"]).T for name, leaf in shared.items()}


def test_bfloat16() -> None:
    """The experts' products are bfloat16, their weights and the sum over them float32: a few roundings from the exact."""
    config = ONE_LAYER.with_dtype("bfloat16")
    layer, x_BTD = draw(config)
    x_BTD = np.asarray(jnp.asarray(x_BTD, jnp.bfloat16))
    y_BTD, routing = moe(config, layer, x_BTD)
    expected_BTD, expected_routing = oracle(config, layer, x_BTD)
    assert y_BTD.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(np.int64(routing.chosen_BTK), expected_routing.chosen_BTK)
    assert np.linalg.norm(np.float64(y_BTD) - expected_BTD) < TOLERANCE["bfloat16"]["rtol"] * np.linalg.norm(expected_BTD)


def test_uncounted_tokens_are_computed_all_the_same() -> None:
    """The mask is for statistics: the output does not see it."""
    layer, x_BTD = draw(ONE_LAYER)
    token_mask_BT = np.arange(25) < np.array([[25], [4]])
    apply = jax.jit(MoE(ONE_LAYER).apply)
    (y_BTD, routing, rounds), (masked_BTD, masked, _) = (
        apply(layer, x_BTD, mask) for mask in (np.ones_like(token_mask_BT), token_mask_BT)
    )
    assert rounds == 1
    chex.assert_trees_all_equal(y_BTD, masked_BTD)
    K = ONE_LAYER.num_experts_per_tok
    assert (float(routing.load_E.sum()), float(masked.load_E.sum())) == (50 * K, 29 * K)
