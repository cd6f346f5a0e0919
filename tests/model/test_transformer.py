"""Stacks of blocks: scanned as unrolled, and the same gradient under every setting of `remat`."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.rope import rope_angles
from dsv3_jax.model.transformer import Block, rematerialised, run_stacks, stack_sizes, unstack
from tests.model.tiny import CONFIG, DENSE_ONLY, MOE_ONLY, random_variables
from tests.tolerances import TOLERANCE

B, T = 2, 11
Tree = dict[str, Any]


class Stack(nn.Module):
    """The MoE stack alone."""

    config: ModelConfig
    unrolled: bool

    @nn.compact
    def __call__(self, h_BTD: jax.Array) -> tuple[jax.Array, Any]:
        turns = rope_angles(self.config, jnp.arange(h_BTD.shape[1])[None])
        config = dataclasses.replace(self.config, first_k_dense_replace=0, num_hidden_layers=self.config.num_moe_layers)
        return run_stacks(config, h_BTD, None, turns, unrolled=self.unrolled, return_intermediates=("hidden",))


def states(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((B, T, CONFIG.hidden_size)).astype(np.float32)


def stack_variables() -> Tree:
    return {collection: {"moe_layers": tree["moe_layers"]} for collection, tree in random_variables().items()}


@functools.cache
def values_and_gradients(remat: str, *, unrolled: bool = False) -> tuple[Any, tuple]:
    """Output of the stack, and the gradient of sum(dy * output) + its balance losses."""
    config, dy_BTD = dataclasses.replace(CONFIG, remat=remat, expert_backend="reference"), states(1)
    variables = unstack(stack_variables()) if unrolled else stack_variables()

    def loss(params: Tree, h_BTD: jax.Array) -> tuple[jax.Array, Any]:
        h_BTD, outputs = Stack(config, unrolled).apply({**variables, "params": params}, h_BTD)
        balance_loss = sum(jnp.sum(output.balance_loss) for output in outputs.values())
        return jnp.sum(dy_BTD * h_BTD) + balance_loss, (h_BTD, outputs)

    gradients, found = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], states())
    return found, gradients


def test_scanned_is_unrolled() -> None:
    """Values, kept outputs and gradients; the scan's gain a leading layer axis. Recomputing in one of them changes nothing."""
    (h_BTD, outputs), gradients = values_and_gradients("none")
    (unrolled_BTD, by_layer), (by_layer_gradient, dh_BTD) = values_and_gradients("save_latents", unrolled=True)
    assert list(by_layer) == ["moe_layers_0", "moe_layers_1"]
    stacked = jax.tree.map(lambda *layers: np.stack(layers), *by_layer.values())
    stacked_gradient = jax.tree.map(lambda *layers: np.stack(layers), *by_layer_gradient.values())
    expected = (unrolled_BTD, {"moe_layers": stacked}), ({"moe_layers": stacked_gradient}, dh_BTD)
    found = (h_BTD, outputs), gradients
    chex.assert_shape(outputs["moe_layers"].load_E, (2, CONFIG.n_routed_experts))
    chex.assert_shape(outputs["moe_layers"].hidden_BTD, (2, B, T, CONFIG.hidden_size))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_tree_all_finite(found)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_equal(outputs["moe_layers"].hidden_BTD[-1], h_BTD)


@pytest.mark.parametrize("remat", [pytest.param("save_latents", marks=pytest.mark.nightly), "full"])
def test_recomputing_changes_nothing(remat: str) -> None:
    plain, recomputed = values_and_gradients("none"), values_and_gradients(remat)
    chex.assert_trees_all_equal_shapes_and_dtypes(plain, recomputed)
    chex.assert_trees_all_close(plain, recomputed, **TOLERANCE["float32"])


# --- What the backward pass keeps ------------------------------------------------------------------------------------


def printed_residuals(capsys: pytest.CaptureFixture, function: Any, *args: Any) -> list[str]:
    """One line for each array that the forward pass keeps, except arguments and constants."""
    jax.ad_checkpoint.print_saved_residuals(function, *args)
    lines = capsys.readouterr().out.strip().splitlines()
    return [line for line in lines if "from the argument" not in line and "from a constant" not in line]


Q, C_AND_P, D = 10, 18, 24
"""Widths of what "save_latents" names: c_q, c_kv with k_r, and the FFN's input."""


@pytest.mark.parametrize(
    ("remat", "named"), [("save_latents", {("c_q", Q), ("c_kv", C_AND_P), ("ffn_input", D)}), ("full", set())]
)
def test_an_unrolled_block_keeps_only_what_is_named(remat: str, named: set, capsys: pytest.CaptureFixture) -> None:
    config = dataclasses.replace(CONFIG, remat=remat)
    variables = {c: jax.tree.map(lambda leaf: leaf[0], tree["moe_layers"]) for c, tree in stack_variables().items()}
    block = rematerialised(Block, config, scanned=False)(config, moe=True)
    turns = rope_angles(config, jnp.arange(T)[None])
    lines = printed_residuals(capsys, lambda v, h: block.apply(v, h, None, turns)[0], variables, states())
    found = [re.match(rf"f32\[{B},{T},(\d+)\] named '(\w+)'", line) for line in lines]
    assert all(found), lines
    assert sorted((match[2], int(match[1])) for match in found) == sorted(named)


@pytest.mark.parametrize(
    ("remat", "widths"),
    # The scan keeps every block's input too: that is what "full" recomputes it from.
    [("save_latents", sorted([D, Q, C_AND_P, D])), ("full", [D])],
)
def test_a_scan_keeps_only_what_is_named(remat: str, widths: list[int], capsys: pytest.CaptureFixture) -> None:
    config = dataclasses.replace(CONFIG, remat=remat)
    stack = Stack(config, unrolled=False)
    lines = printed_residuals(capsys, lambda v, h: stack.apply(v, h)[0], stack_variables(), states())
    shapes = [tuple(map(int, re.match(r"\w+\[([\d,]*)\]", line)[1].split(","))) for line in lines]
    of_activations = [shape for shape in shapes if shape[-3:-1] == (B, T)]
    assert sorted(shape[-1] for shape in of_activations if len(shape) == 4) == widths, lines
    assert all(shape[0] == CONFIG.num_moe_layers for shape in of_activations if len(shape) == 4)


def test_without_recomputing_far_more_is_kept(capsys: pytest.CaptureFixture) -> None:
    """The searches above can fail."""
    lines = printed_residuals(capsys, lambda v, h: Stack(CONFIG, unrolled=False).apply(v, h)[0], stack_variables(), states())
    assert len(lines) > 20


# --- Layout ----------------------------------------------------------------------------------------------------------


def test_stack_sizes() -> None:
    assert stack_sizes(CONFIG) == {"dense_layers": 1, "moe_layers": 2}
    assert stack_sizes(DENSE_ONLY) == {"dense_layers": 2}
    assert stack_sizes(MOE_ONLY) == {"moe_layers": 2}
    assert list(stack_sizes(ModelConfig()).items()) == [("dense_layers", 3), ("moe_layers", 58)]


def test_unstack_takes_layers_apart_and_leaves_the_rest() -> None:
    variables = random_variables()
    apart = unstack(variables)
    assert set(apart["params"]) == {
        "embed",
        "norm",
        "lm_head",
        "mtp_0",
        "mtp_1",
        "dense_layers_0",
        "moe_layers_0",
        "moe_layers_1",
    }
    assert set(apart["router"]) == {"mtp_0", "mtp_1", "moe_layers_0", "moe_layers_1"}
    for name in ("embed", "norm", "lm_head", "mtp_0", "mtp_1"):
        chex.assert_trees_all_equal(apart["params"][name], variables["params"][name])
    for collection in ("params", "router"):
        for i in range(2):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], variables[collection]["moe_layers"])
            chex.assert_trees_all_equal(apart[collection][f"moe_layers_{i}"], layer)
