"""The chunked cross entropy, and the training objective with every gradient, against float64."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.model.losses import cross_entropy, cross_entropy_and_greedy, training_loss
from dsv3_jax.parallel.mesh import make_mesh
from tests import reference_model
from tests.intermediates import intermediate_shapes
from tests.model.tiny import (
    CONFIG,
    DENSE_ONLY,
    assert_gradient,
    balance_by_sequence,
    compiled_gradient,
    oracle_tensors,
    published,
    random_tokens,
    random_variables,
)
from tests.tolerances import TOLERANCE

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
LAMBDA = 0.7
T = 12


# --- Cross entropy ---------------------------------------------------------------------------------------------------


def naive(h_BTD: np.ndarray, head_DV: np.ndarray, target_BT: np.ndarray, weight_BT: np.ndarray) -> tuple[float, Any, Any]:
    """The weighted sum, and its gradients: softmax - onehot, times the weight."""
    logits_BTV = h_BTD @ head_DV
    p_BTV = np.exp(logits_BTV - logits_BTV.max(-1, keepdims=True))
    p_BTV /= p_BTV.sum(-1, keepdims=True)
    loss_BT = -np.log(np.take_along_axis(p_BTV, target_BT[..., None], -1)[..., 0])
    dlogits_BTV = weight_BT[..., None] * (p_BTV - np.eye(head_DV.shape[1])[target_BT])
    dhead_DV = np.einsum("BTD,BTV->DV", h_BTD, dlogits_BTV)
    return float(np.sum(weight_BT * loss_BT)), dlogits_BTV @ head_DV.T, dhead_DV


@pytest.mark.parametrize(
    ("length", "chunk", "dtype", "head_dtype"),
    [
        (13, 4, "float32", "float32"),
        (12, 4, "float32", "float32"),
        (13, 64, "float32", "float32"),
        (1, 1, "float32", "float32"),
        (13, 5, "bfloat16", "float32"),
        (13, 5, "bfloat16", "bfloat16"),
    ],
)
def test_cross_entropy(length: int, chunk: int, dtype: str, head_dtype: str) -> None:
    """Values and both gradients, for lengths that are no multiple of the chunk and weights of which some are zero."""
    B, D, V, factor = 3, 8, 17, 0.5
    rng = np.random.default_rng(length)
    h_BTD = rng.standard_normal((B, length, D)).astype(DTYPES[dtype])
    head_DV = (rng.standard_normal((D, V)) / 2).astype(DTYPES[head_dtype])
    target_BT = rng.integers(0, V, (B, length), np.int32)
    weight_BT = (rng.random((B, length)) * (rng.random((B, length)) < 0.6)).astype(np.float32)

    def scaled(h_BTD: jax.Array, head_DV: jax.Array) -> jax.Array:
        return factor * cross_entropy(h_BTD, head_DV, target_BT, weight_BT, chunk)

    both = jax.jit(lambda *args: (jax.value_and_grad(scaled, (0, 1))(*args), scaled(*args)))
    (loss, gradients), undifferentiated = both(h_BTD, head_DV)
    # Products run in h's dtype, so the head is rounded to it.
    exact = np.float64(h_BTD), np.float64(head_DV.astype(DTYPES[dtype]))
    expected = jax.tree.map(lambda a: factor * a, naive(*exact, target_BT, weight_BT))
    chex.assert_type([loss, undifferentiated], jnp.float32)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, (h_BTD, head_DV))
    assert float(loss) == pytest.approx(expected[0], rel=1e-5)
    assert float(undifferentiated) == pytest.approx(expected[0], rel=1e-5)
    chex.assert_trees_all_close(jax.tree.map(np.float64, gradients), expected[1:], **TOLERANCE[dtype])
    assert not np.any(np.float32(gradients[0])[weight_BT == 0])


def test_large_logits_do_not_overflow() -> None:
    """Logits of a thousand: the loss is a difference of large numbers, and finite."""
    h_BTD, head_DV = np.full((1, 2, 1), 1000, np.float32), np.array([[1.0, 0.5, -1.0]], np.float32)
    target_BT, weight_BT = np.array([[0, 1]]), np.ones((1, 2), np.float32)
    loss, gradient = jax.jit(jax.value_and_grad(lambda h: cross_entropy(h, head_DV, target_BT, weight_BT, 1)))(h_BTD)
    assert float(loss) == pytest.approx(500.0)
    chex.assert_trees_all_close(gradient, np.float32([[[0.0], [0.5]]]), **TOLERANCE["float32"])


@pytest.mark.parametrize(("length", "chunk"), [(13, 4), (12, 4), (5, 64)])
def test_the_most_likely_tokens_come_with_the_loss(length: int, chunk: int) -> None:
    """Logits are small integers, so that many are equal: the lowest id wins. The loss is `cross_entropy`'s, to the bit."""
    rng = np.random.default_rng(length)
    h_BTD, head_DV = (rng.integers(-2, 3, shape).astype(np.float32) for shape in ((3, length, 4), (4, 17)))
    target_BT, weight_BT = rng.integers(0, 17, (3, length), np.int32), rng.random((3, length), np.float32)
    both = jax.jit(lambda *args: (*cross_entropy_and_greedy(*args, chunk), cross_entropy(*args, chunk)))
    loss, greedy_BT, expected = both(h_BTD, head_DV, target_BT, weight_BT)
    logits_BTV = h_BTD @ head_DV
    assert ((logits_BTV == logits_BTV.max(-1, keepdims=True)).sum(-1) > 1).any()
    chex.assert_type(greedy_BT, jnp.int32)
    np.testing.assert_array_equal(greedy_BT, logits_BTV.argmax(-1))
    assert loss == expected


@pytest.mark.parametrize(
    "mesh",
    [{"tensor": 8}, {"data": 2, "context": 2, "tensor": 2}, pytest.param({"fsdp": 2, "tensor": 4}, marks=pytest.mark.nightly)],
)
def test_the_most_likely_tokens_of_a_split_vocabulary(mesh: dict[str, int]) -> None:
    """Ties within a device's part of the vocabulary and between parts."""
    rng = np.random.default_rng(0)
    h_BTD, head_DV = (rng.integers(-1, 2, shape).astype(np.float32) for shape in ((4, 8, 4), (4, 16)))
    target_BT, weight_BT = rng.integers(0, 16, (4, 8), np.int32), rng.random((4, 8), np.float32)
    with jax.set_mesh(make_mesh(MeshConfig(**mesh))):
        loss, greedy_BT = jax.jit(cross_entropy_and_greedy, static_argnums=4)(h_BTD, head_DV, target_BT, weight_BT, 2)
    logits_BTV = h_BTD @ head_DV
    best = logits_BTV == logits_BTV.max(-1, keepdims=True)
    assert (best[..., :2].any(-1) & best[..., 2:].any(-1)).any()
    np.testing.assert_array_equal(greedy_BT, logits_BTV.argmax(-1))
    assert float(loss) == pytest.approx(naive(h_BTD, head_DV, target_BT, weight_BT)[0], rel=1e-5)


# --- The objective ---------------------------------------------------------------------------------------------------


def objective(
    config: ModelConfig, tensors: dict[str, np.ndarray], tokens_BT: np.ndarray, target_BT: np.ndarray
) -> dict[str, float]:
    """The losses from full logits, the balance loss from what every gate was given."""
    balance = 0.0

    def recording(config: reference_model.Config, layer: dict, x_BTD: np.ndarray) -> reference_model.Routing:
        nonlocal balance
        score_BTE = 1 / (1 + np.exp(-(x_BTD @ layer["mlp.gate.weight"].T)))
        balance += balance_by_sequence(score_BTE, np.ones(x_BTD.shape[:2], bool), config["num_experts_per_tok"])
        return route(config, layer, x_BTD)

    route = reference_model.route
    with mock.patch.object(reference_model, "route", recording):
        found = reference_model.forward(published(config), tensors, tokens_BT)

    def mean_loss(logits_BTV: np.ndarray, ahead: int) -> float:
        shifted = logits_BTV - logits_BTV.max(-1, keepdims=True)
        log_p_BTV = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        return float(-np.take_along_axis(log_p_BTV, target_BT[:, ahead:, None], -1).mean())

    main, mtp = mean_loss(found.logits_BTV, 0), float(np.mean([mean_loss(a, k) for k, a in enumerate(found.mtp_logits, 1)]))
    return {
        "loss": main + LAMBDA * mtp + config.aux_loss_alpha * balance,
        "main_loss": main,
        "mtp_loss": mtp,
        "balance_loss": balance,
    }


def test_training_loss_and_every_gradient() -> None:
    """CE + lambda mean_k CE_k + alpha balance, every term over its own tokens; two MTP depths, five gates.

    The gradients of embedding and head are sums of what the main model and the depths give them.
    """
    variables, tokens_BT = random_variables(), random_tokens(2, T + 1)
    tokens_BT, target_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    gradient, losses = compiled_gradient()(variables, tokens_BT, target_BT, LAMBDA)

    def oracle(params: Any) -> dict[str, float]:
        tensors = oracle_tensors(CONFIG, {"params": params, "router": variables["router"]})
        return objective(CONFIG, tensors, tokens_BT, target_BT)

    expected = oracle(variables["params"])
    found = {name: float(getattr(losses, name)) for name in expected}
    chex.assert_type(jax.tree.leaves(losses._replace(rounds=None)), jnp.float32)
    assert losses.rounds == 1
    chex.assert_trees_all_close(found, expected, rtol=2e-5)
    assert len(set(np.round(list(expected.values()), 3))) == 4
    per_row = 2 * CONFIG.num_experts_per_tok
    load = {name: float(load_E.sum()) for name, load_E in losses.load.items()}
    assert load == {"moe_layers": 2 * T * per_row, "mtp_0": (T - 1) * per_row, "mtp_1": (T - 2) * per_row}

    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, variables["params"])
    chex.assert_tree_all_finite(gradient)
    assert_gradient(gradient, lambda params: oracle(params)["loss"], variables["params"], rtol=2e-4)


def test_logits_of_the_whole_sequence_never_exist() -> None:
    """Neither in the loss nor in its gradient is there an array of all positions by all of the vocabulary."""
    config = dataclasses.replace(DENSE_ONLY, num_nextn_predict_layers=1)
    tokens_BT, V, length = random_tokens(2, 40), config.vocab_size, 40
    variables = random_variables(config)
    assert length > config.loss_chunk

    def loss(params: Any) -> jax.Array:
        return training_loss(params, variables["router"], config, tokens_BT, tokens_BT, LAMBDA).loss

    def of_full_logits(params: Any) -> jax.Array:
        h_BTD = params["embed"]["embedding"][tokens_BT]
        return optax.softmax_cross_entropy_with_integer_labels(h_BTD @ params["lm_head"]["kernel"], tokens_BT).sum()

    def logits(shapes: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
        return {shape for shape in shapes if V in shape and np.prod(shape) >= length * V}

    shapes, of_full = (
        intermediate_shapes(jax.value_and_grad(function), variables["params"]) for function in (loss, of_full_logits)
    )
    assert (2, config.loss_chunk, V) in shapes
    assert logits(shapes) == set()
    assert (2, length, V) in logits(of_full)


def test_a_target_outside_the_vocabulary_is_nan() -> None:
    h_BTD, head_DV, weight_BT = np.ones((1, 2, 3), np.float32), np.ones((3, 5), np.float32), np.ones((1, 2), np.float32)
    loss = jax.jit(lambda target_BT: cross_entropy(h_BTD, head_DV, target_BT, weight_BT, 2))
    is_nan = {target: bool(np.isnan(loss(np.array([[0, target]])))) for target in (-1, 0, 4, 5)}
    assert is_nan == {-1: True, 0: False, 4: False, 5: True}
