"""The whole model: against the oracle, from the past alone, in pieces, at full size without an array, and refusing."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.cli import load_config
from dsv3_jax.model import DeepSeekV3, logical_axes, unstack
from tests import reference_model
from tests.model.tiny import (
    CONFIG,
    DENSE_ONLY,
    MOE_ONLY,
    abstract_variables,
    compiled_model,
    initialised,
    oracle_tensors,
    perturbed,
    published,
    random_tokens,
    random_variables,
)
from tests.parity.compare import HIDDEN_STATES, LOGITS
from tests.shipped import SHIPPED, shipped
from tests.tolerances import TOLERANCE

ROOT = pathlib.Path(__file__).parents[2]
T = 12


# --- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [CONFIG, DENSE_ONLY, pytest.param(MOE_ONLY, marks=pytest.mark.nightly)],
    ids=["both_kinds", "dense_only", "moe_only"],
)
def test_forward_against_the_oracle(config: ModelConfig) -> None:
    """Logits, every hidden state, every route, and the load that the routes make.

    MoE layers alone are in `tests/test_parity_fixtures.py` too.
    """
    variables, tokens_BT = random_variables(config), random_tokens(T + 1, T, config)
    found = compiled_model(config)(variables, tokens_BT)
    expected = reference_model.forward(published(config), oracle_tensors(config, variables), tokens_BT)
    chex.assert_shape(found.logits, (T + 1, T, config.vocab_size))
    chex.assert_type(found.logits, jnp.float32)
    assert expected.margin > 1e-5, "a near tie: draw another"
    assert 0.5 < expected.logits_BTV.std() < 4
    chex.assert_trees_all_close(np.float64(found.logits), expected.logits_BTV, rtol=0, atol=LOGITS)
    chex.assert_trees_all_close(np.float64(found.hidden_states), np.stack(expected.hidden_states), rtol=0, atol=HIDDEN_STATES)
    if config.num_moe_layers:
        chex.assert_trees_all_equal(np.sort(found.routes, axis=-1), np.int32(expected.routes_LBTK))
        load_LE = [np.bincount(routes.ravel(), minlength=config.n_routed_experts) for routes in expected.routes_LBTK]
        chex.assert_trees_all_equal(np.asarray(found.load["moe_layers"]), np.float32(load_LE))
    else:
        assert found.routes is None
        assert (found.load, float(found.balance_loss)) == ({}, 0.0)


def test_no_token_sees_the_future() -> None:
    """Each token is changed in turn: row t of the logits changes with every token up to t, and with none after it."""
    found = compiled_model()(random_variables(), perturbed(T))
    change_TT = np.abs(np.asarray(found.logits[1:] - found.logits[:1])).max(-1)
    past = np.tri(T, dtype=bool).T
    assert change_TT[past].min() > 1e-3
    assert change_TT[~past].max() < 1e-5


@pytest.mark.parametrize(("unrolled", "size"), [(False, 3), (True, 1)], ids=["scanned_in_pieces", "unrolled_by_tokens"])
def test_decoding_is_the_forward_pass(unrolled: bool, size: int) -> None:
    """On the latents of earlier pieces; empty rows of the cache are NaN.

    The second sequence runs a piece behind the first, so that each has a length and positions of its own.
    """
    variables, tokens_BT = random_variables(), random_tokens(T + 1, T)
    expected_BTV = np.asarray(compiled_model()(variables, tokens_BT).logits)[:2]
    model = DeepSeekV3(CONFIG, unrolled=unrolled)
    decode = jax.jit(lambda *args: model.apply(*args, method="decode"))
    laid_out = unstack(variables) if unrolled else variables
    cache, batch_axis = empty_cache(unrolled), 0 if unrolled else 1

    found_BTV = np.full_like(expected_BTV, np.nan)
    for start in range(0, T, size):
        cached_length_B = np.array([start, max(start - size, 0)])
        rows_BT = cached_length_B[:, None] + np.arange(size)
        logits_BTV, new = decode(laid_out, np.take_along_axis(tokens_BT[:2], rows_BT, axis=1), cache, cached_length_B)
        chex.assert_type(logits_BTV, jnp.float32)
        chex.assert_trees_all_equal_structs(cache, new)
        for b, rows in enumerate(rows_BT):
            found_BTV[b, rows] = logits_BTV[b]
            for old, fresh in zip(jax.tree.leaves(cache), jax.tree.leaves(new), strict=True):
                np.moveaxis(old, batch_axis, 0)[b][..., rows, :] = np.moveaxis(fresh, batch_axis, 0)[b]
    chex.assert_trees_all_close(found_BTV[0], expected_BTV[0], rtol=0, atol=LOGITS)
    chex.assert_trees_all_close(found_BTV[1, : T - size], expected_BTV[1, : T - size], rtol=0, atol=LOGITS)


def empty_cache(unrolled: bool) -> dict[str, Any]:
    """T + 3 rows of NaN, laid out as `decode` gives them back."""
    model = DeepSeekV3(CONFIG, unrolled=unrolled)
    variables = abstract_variables(CONFIG)
    variables = jax.eval_shape(unstack, variables) if unrolled else variables
    tokens = jax.ShapeDtypeStruct((2, T + 3), jnp.int32)
    features = jax.eval_shape(
        lambda v, t: model.apply(v, t, return_intermediates=("latents",), method="features"), variables, tokens
    )
    latents = {name: output.latents for name, output in features.outputs.items()}
    return jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, leaf.dtype), latents)


# --- Dtypes ----------------------------------------------------------------------------------------------------------


def test_bfloat16_near_the_oracle() -> None:
    """Without a choice to flip, whole logits are as near as bfloat16 gets: a few of its roundings, 2^-8 each."""
    config = DENSE_ONLY.with_dtype("bfloat16")
    variables, tokens_BT = random_variables(config), random_tokens(T + 1, T, config)
    found = compiled_model(config)(variables, tokens_BT)
    exact = reference_model.forward(published(config), oracle_tensors(config, variables), tokens_BT)
    chex.assert_type([found.logits, found.hidden_states], [jnp.float32, jnp.bfloat16])
    error = np.linalg.norm(np.asarray(found.logits) - exact.logits_BTV) / np.linalg.norm(exact.logits_BTV)
    assert error < TOLERANCE["bfloat16"]["rtol"]


def test_what_stays_float32_in_a_bfloat16_model() -> None:
    """The biases among the variables; logits, loads and losses among the outputs."""
    config = MOE_ONLY.with_dtype("bfloat16")
    variables = abstract_variables(config)
    chex.assert_type(jax.tree.leaves(variables["params"]), jnp.bfloat16)
    chex.assert_type(jax.tree.leaves(variables["router"]), jnp.float32)
    tokens = jax.ShapeDtypeStruct((2, T), jnp.int32)
    output = jax.eval_shape(lambda v, t: DeepSeekV3(config).apply(v, t, mtp=True, hidden_states=True), variables, tokens)
    chex.assert_type([output.logits, *output.mtp_logits, *output.load.values(), output.balance_loss], jnp.float32)
    chex.assert_type([output.hidden_states, output.routes], [jnp.bfloat16, jnp.int32])


def test_dtype_of_computation_and_of_storage_are_two() -> None:
    config = dataclasses.replace(MOE_ONLY, dtype="bfloat16", param_dtype="float32")
    variables = abstract_variables(config)
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, 3), jnp.int32)
    output = jax.eval_shape(lambda v, t: DeepSeekV3(config).apply(v, t, hidden_states=True), variables, tokens)
    chex.assert_type([output.hidden_states, output.logits], [jnp.bfloat16, jnp.float32])


# --- Variables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(DENSE_ONLY, q_lora_rank=None)])
def test_every_variable_has_as_many_logical_axes_as_axes(config: ModelConfig) -> None:
    shapes, axes = abstract_variables(config), logical_axes(config)
    ranks = jax.tree.map(lambda leaf: leaf.ndim, shapes)
    named = jax.tree.map(len, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert ranks == named
    for path, names in jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda leaf: isinstance(leaf, tuple)):
        assert all(isinstance(name, str) for name in names), path
        assert (names[0] == "layers") == (path[1].key in ("dense_layers", "moe_layers")), path


def test_logical_axes_say_what_an_axis_is() -> None:
    axes = logical_axes(CONFIG)
    moe, depth = axes["params"]["moe_layers"], axes["params"]["mtp_0"]
    assert axes["params"]["embed"]["embedding"] == ("vocab", "embed")
    assert axes["params"]["lm_head"]["kernel"] == ("embed", "vocab")
    assert moe["mlp"]["experts"]["gate_proj"] == ("layers", "experts", "expert_embed", "expert_mlp")
    assert moe["mlp"]["experts"]["down_proj"] == ("layers", "experts", "expert_mlp", "expert_embed")
    assert moe["self_attn"]["q_b_proj"]["kernel"] == ("layers", "latent", "heads", "head_dim")
    assert moe["self_attn"]["o_proj"]["kernel"] == ("layers", "heads", "head_dim", "embed")
    assert depth["block"]["mlp"]["experts"]["up_proj"] == ("experts", "expert_embed", "expert_mlp")
    assert axes["router"]["moe_layers"]["mlp"]["gate"]["e_score_correction_bias"] == ("layers", "router")


def test_fresh_variables_are_plain_and_from_the_seed() -> None:
    """Dicts of arrays: matrices of deviation `initializer_range`, layers and depths unlike one another, biases zero."""
    variables = initialised(CONFIG, 3)
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, random_variables())
    chex.assert_trees_all_equal(variables["router"], jax.tree.map(jnp.zeros_like, variables["router"]))
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        if path[-1].key == "scale":
            assert (leaf == 1).all(), path
        else:
            assert float(leaf.std()) == pytest.approx(CONFIG.initializer_range, rel=5 / leaf.size**0.5), path
    params = variables["params"]
    gates = [
        *params["moe_layers"]["mlp"]["gate"]["kernel"],
        *(params[f"mtp_{k}"]["block"]["mlp"]["gate"]["kernel"] for k in range(2)),
    ]
    assert len({np.asarray(gate_DE).tobytes() for gate_DE in gates}) == 4


def test_variables_are_laid_out_where_the_named_kernels_do_not_run() -> None:
    """As when a pod's program is compiled on a machine without a TPU."""
    named = dataclasses.replace(MOE_ONLY, expert_backend="pallas_tpu", attention_backend="splash", cache_backend="pallas_tpu")
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract_variables(named), abstract_variables(MOE_ONLY))


# --- At full size ----------------------------------------------------------------------------------------------------


def size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "config", [load_config(str(ROOT / "configs/v3_671b.py")).model, ModelConfig()], ids=["file", "defaults"]
)
def test_the_published_model_to_the_last_parameter(config: ModelConfig) -> None:
    variables = abstract_variables(config)
    params, router = variables["params"], variables["router"]
    main = {name: tree for name, tree in params.items() if name != "mtp_0"}
    biases = size(router["moe_layers"])
    assert biases == 14_848
    assert size(main) == 671_026_404_352
    assert size(main) + biases == 671_026_419_200

    # Layer 61 as stored: the depth, its biases, and copies of embedding and head.
    depth = size(params["mtp_0"]) + size(router["mtp_0"])
    assert depth + size(params["embed"]) + size(params["lm_head"]) == 13_463_426_304
    assert depth == pytest.approx(11.61e9, abs=0.005e9)

    shared, experts = (params["moe_layers"]["mlp"][name] for name in ("shared_experts", "experts"))
    layers, routed = experts["gate_proj"].shape[:2]
    assert layers * (routed + config.n_shared_experts) == 14_906
    assert layers * (config.num_experts_per_tok + config.n_shared_experts) == 522
    one = size(experts) // (layers * routed)
    assert one == size(shared) // layers
    active = size(main) + biases - layers * (routed - config.num_experts_per_tok) * one
    assert active == pytest.approx(37.55e9, abs=0.005e9)
    # An embedding row is looked up, not multiplied with: without the table, as the report counts.
    assert active - size(params["embed"]) == pytest.approx(36.63e9, abs=0.005e9)


def test_the_published_latent_cache() -> None:
    """576 values a token and layer, 70,272 bytes a token in bfloat16."""
    config = ModelConfig()
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    model = DeepSeekV3(config)
    features = jax.eval_shape(
        lambda v, t: model.apply(v, t, return_intermediates=("latents",), method="features"), abstract_variables(config), tokens
    )
    latents = jax.tree.leaves({name: output.latents for name, output in features.outputs.items()})
    assert size(latents) == 61 * 576
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in latents) == 70_272


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_builds(name: str) -> None:
    """Variables, and the model over one of its own batches: all shapes, no array."""
    config = shipped(name)
    model, train = config.model, config.train
    tokens = jax.ShapeDtypeStruct((2, train.sequence_length), jnp.int32)
    output = jax.eval_shape(lambda v, t: DeepSeekV3(model).apply(v, t, mtp=True), abstract_variables(model), tokens)
    chex.assert_shape(output.logits, (2, train.sequence_length, model.vocab_size))
    assert len(output.mtp_logits) == model.num_nextn_predict_layers


# --- Refusal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [CONFIG.vocab_size, -1])
def test_a_token_outside_the_vocabulary_is_refused(token: int) -> None:
    tokens_BT = random_tokens(2, 4)
    tokens_BT[1, 2] = token
    with pytest.raises(ValueError, match=rf"token id {token} is outside the vocabulary of {CONFIG.vocab_size}"):
        DeepSeekV3(CONFIG).apply(random_variables(), tokens_BT)


def test_within_jit_such_a_token_gives_nan() -> None:
    """From its position on, and in no other sequence."""
    tokens_BT = random_tokens(T + 1, T)
    tokens_BT[1, 2] = CONFIG.vocab_size
    found = compiled_model()(random_variables(), tokens_BT)
    is_nan_BT = np.isnan(found.logits).all(-1)
    assert not np.isnan(np.delete(found.logits, 1, axis=0)).any()
    assert is_nan_BT[1, 2:].all()


def test_too_long_a_sequence_is_refused() -> None:
    longest = CONFIG.max_position_embeddings
    with pytest.raises(ValueError, match=rf"{longest + 1} tokens exceed max_position_embeddings \({longest}\)"):
        jax.eval_shape(lambda v, t: DeepSeekV3(CONFIG).apply(v, t), random_variables(), random_tokens(1, longest + 1))


def test_tokens_without_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens have shape \(5,\); the model takes \[batch, length\]"):
        DeepSeekV3(CONFIG).apply(random_variables(), random_tokens(1, 5)[0])
