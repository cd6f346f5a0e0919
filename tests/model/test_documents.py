"""Documents packed in a row and kept apart: each is computed, counted and learned from as if it were alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.model import DeepSeekV3, unstack
from dsv3_jax.model.losses import cross_entropy, depth_weights
from dsv3_jax.model.sharding import variable_shardings
from dsv3_jax.parallel.devices import BatchPlacement
from dsv3_jax.parallel.mesh import make_mesh
from tests import reference_model
from tests.kernels.reference_attention import pack
from tests.model.tiny import CONFIG, MOE_ONLY, oracle_tensors, published, random_tokens, random_variables
from tests.parity.compare import LOGITS
from tests.train import test_on_mesh

FIRST, SECOND, PADDING = 11, 13, 4
T = FIRST + SECOND + PADDING
STARTS_BT, _ = pack([[FIRST, SECOND]], T)
MODEL = dataclasses.replace(test_on_mesh.MODEL, num_hidden_layers=2, first_k_dense_replace=0)
ONE, OTHER = slice(0, FIRST), slice(FIRST, FIRST + SECOND)


def two_documents() -> np.ndarray:
    """One row of two documents without a token in common, whose second begins within a tile of attention."""
    tokens_BT = random_tokens(1, T)
    tokens_BT[:, ONE] %= 10
    tokens_BT[:, OTHER] = 10 + tokens_BT[:, OTHER] % (CONFIG.vocab_size - 10)
    tokens_BT[:, OTHER.stop :] = 0
    return tokens_BT


def alone(config: ModelConfig, tokens_BT: np.ndarray) -> reference_model.Reference:
    """Result of the numpy model for these tokens, as one document."""
    return reference_model.forward(published(config), oracle_tensors(config, random_variables(config)), tokens_BT)


@pytest.mark.parametrize("whole_form", [True, False], ids=["materialised_scanned", "absorbed_unrolled"])
def test_each_document_has_the_outputs_that_it_has_alone(whole_form: bool) -> None:
    """Logits of the model and of both depths, and routes."""
    tokens_BT, variables = two_documents(), random_variables()
    model = DeepSeekV3(CONFIG, absorbed=not whole_form, unrolled=not whole_form)
    apply = jax.jit(lambda v, t, s: model.apply(v, t, mtp=True, hidden_states=True, segment_starts_BT=s))
    packed = jax.tree.map(np.asarray, apply(variables if whole_form else unstack(variables), tokens_BT, STARTS_BT))
    chex.assert_tree_all_finite(packed)
    for part in (ONE, OTHER):
        expected = alone(CONFIG, tokens_BT[:, part])
        assert expected.margin > 1e-5, "a near tie: draw another"
        chex.assert_trees_all_close(np.float64(packed.logits[:, part]), expected.logits_BTV, rtol=0, atol=LOGITS)
        chex.assert_trees_all_equal(np.sort(packed.routes[:, :, part], axis=-1), np.int32(expected.routes_LBTK))
        for k, (found, wanted) in enumerate(zip(packed.mtp_logits, expected.mtp_logits, strict=True), 1):
            chex.assert_trees_all_close(np.float64(found[:, part.start : part.stop - k]), wanted, rtol=0, atol=LOGITS)
    across_BTV = alone(CONFIG, tokens_BT).logits_BTV[:, OTHER]
    assert np.abs(across_BTV - packed.logits[:, OTHER]).max() > 0.1, "attention across documents would not show"


def summed_losses(config: ModelConfig, *, balance: float = 0.0) -> Callable[..., Any]:
    """(params, router, tokens, targets, their weights, starts) -> cross entropies and a share of the balance loss; loads."""

    def objective(params: Any, router: Any, tokens_BT: Any, target_BT: Any, weight_BT: Any, segment_starts_BT: Any) -> Any:
        variables = {"params": params, "router": router}
        model, head_DV = DeepSeekV3(config), params["lm_head"]["kernel"]
        features = model.apply(variables, tokens_BT, mtp=True, segment_starts_BT=segment_starts_BT, method="features")
        loss = balance * features.balance_loss
        for k, h_BTD in enumerate([features.h_BTD, *features.mtp_h_BTD]):
            loss_weight_BT = depth_weights(weight_BT, segment_starts_BT, k)
            loss += cross_entropy(h_BTD, head_DV, jnp.roll(target_BT, -k, axis=1), loss_weight_BT, config.loss_chunk)
        return loss, features.load

    return jax.value_and_grad(objective, has_aux=True)


def assert_alike(found: Any, expected: Any) -> None:
    """Each array of a tree within 1e-5 of the other's norm."""
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        apart = np.linalg.norm(np.asarray(one) - np.asarray(other)) / np.linalg.norm(other)
        assert apart < 1e-5, (jax.tree_util.keystr(path), apart)


@pytest.mark.slow
def test_a_document_has_the_loss_and_the_gradients_that_it_has_alone() -> None:
    """And none of it reaches a token of the other one, or of the padding: their embeddings' gradients are zero.

    Loads add up, of which padding has no part.
    """
    tokens_BT, variables = two_documents(), random_variables(MOE_ONLY)
    target_BT = np.roll(tokens_BT, -1, axis=1)
    weight_BT = np.zeros((1, T), np.float32)
    weight_BT[:, OTHER] = np.linspace(0.5, 1.5, SECOND)
    weight_BT[:, OTHER.stop - 1] = 0  # What follows a document is no target.
    program = jax.jit(summed_losses(dataclasses.replace(MOE_ONLY, remat="full")))

    def at(part: slice, segment_starts_BT: Any) -> Any:
        arrays = (array[:, part] for array in (tokens_BT, target_BT, weight_BT))
        return program(variables["params"], variables["router"], *arrays, segment_starts_BT)

    (loss, load), gradient = at(slice(None), STARTS_BT)
    (expected_loss, expected_load), expected = at(OTHER, None)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    assert_alike(gradient, expected)
    embedding_VD = np.asarray(gradient["embed"]["embedding"])
    routes_LBTK = alone(MOE_ONLY, tokens_BT[:, ONE]).routes_LBTK
    first_LE = [np.bincount(routes.ravel(), minlength=MOE_ONLY.n_routed_experts) for routes in routes_LBTK]
    chex.assert_trees_all_equal(np.asarray(load["moe_layers"]), np.float32(first_LE) + expected_load["moe_layers"])
    of_first_E = np.asarray(load["mtp_0"]) - expected_load["mtp_0"]
    assert of_first_E.min() >= 0
    assert of_first_E.sum() == (FIRST - 1) * MOE_ONLY.num_experts_per_tok
    assert not embedding_VD[:10].any()
    assert embedding_VD[10:].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [{"context": 2, "expert": 2, "tensor": 2}, pytest.param({"context": 4, "fsdp": 2}, marks=pytest.mark.nightly)],
)
def test_losses_loads_and_gradients_on_a_mesh_are_those_of_one_device(sizes: dict[str, int]) -> None:
    """Rows of other documents each, one of padding alone; documents, and what depths join, lie across devices."""
    B, length = 4, 16
    segment_starts_BT, _ = pack([[5, 11], [7, 1, 1, -2, 5], [], [16]], length)
    tokens_BT, target_BT = (random_tokens(B, length, MODEL, seed) for seed in (0, 1))
    weight_BT = np.random.default_rng(2).random((B, length)).astype(np.float32)
    batch, variables = (tokens_BT, target_BT, weight_BT, segment_starts_BT), random_variables(MODEL)

    def program() -> Callable[..., Any]:
        return jax.jit(summed_losses(MODEL, balance=20.0))

    (loss, load), gradient = program()(variables["params"], variables["router"], *batch)
    mesh = make_mesh(MeshConfig(**sizes))
    variables = jax.device_put(variables, variable_shardings(MODEL, mesh))
    place = BatchPlacement(mesh, B, length).place
    with jax.set_mesh(mesh):
        (loss_there, load_there), gradient_there = program()(variables["params"], variables["router"], *map(place, batch))
    assert float(loss_there) == pytest.approx(float(loss), rel=1e-5)
    chex.assert_trees_all_equal(load_there, load)
    assert_alike(gradient_there, gradient)
    counted = float(np.sum(segment_starts_BT >= 0)) * MODEL.num_experts_per_tok
    assert np.asarray(load["moe_layers"]).sum(-1).tolist() == [counted] * MODEL.num_moe_layers
    assert float(load["mtp_0"].sum()) == (4 + 10 + 6 + 4 + 15) * MODEL.num_experts_per_tok


# --- Weights of the depths -------------------------------------------------------------------------------------------


def test_the_weights_of_a_depth() -> None:
    """Row i of depth k has the weight of target i + k, if token i + k is of its document."""
    weight_BT = np.arange(1, 7, dtype=np.float32)[None]
    segment_starts_BT = np.array([[0, 0, 0, 3, 3, -1]], np.int32)
    expected = {0: [1, 2, 3, 4, 5, 0], 1: [2, 3, 0, 5, 0, 0], 2: [3, 0, 0, 0, 0, 0], 3: [0] * 6, 7: [0] * 6}
    across = {0: [1, 2, 3, 4, 5, 6], 1: [2, 3, 4, 5, 6, 0], 2: [3, 4, 5, 6, 0, 0], 7: [0] * 6}

    @jax.jit
    def found(weight_BT: jax.Array) -> tuple[dict[int, jax.Array], ...]:
        starts = (segment_starts_BT, expected), (None, across)
        return tuple(
            {k: depth_weights(weight_BT, segment_starts_BT, k) for k in depths} for segment_starts_BT, depths in starts
        )

    wanted = tuple({k: np.float32([weights]) for k, weights in table.items()} for table in (expected, across))
    chex.assert_trees_all_equal(found(weight_BT), wanted)
    half = jax.eval_shape(found, jax.ShapeDtypeStruct(weight_BT.shape, jnp.bfloat16))
    chex.assert_type(jax.tree.leaves(half), jnp.float32)


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([[0, 0, 1, 2]], "row 0 has start 1 at position 2, after 0; give each token the position of the first one of its doc"),
        ([[-1, 0, -1, 3]], "row 0 has start 0 at position 1, after -1"),
        ([[0, 0, 0, -2]], "row 0 has start -2 at position 3, after 0"),
        ([[0, 0, 0]], r"starts of documents are int32 \(1, 3\); give one integer for each token, \(1, 4\)"),
    ],
)
def test_what_are_no_starts_is_refused(starts: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepSeekV3(CONFIG).apply(random_variables(), random_tokens(1, 4), segment_starts_BT=np.array(starts, np.int32))


def test_starts_that_are_no_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="starts of documents are float32"):
        DeepSeekV3(CONFIG).apply(random_variables(), random_tokens(1, 4), segment_starts_BT=np.zeros((1, 4), np.float32))
