"""Multi-token prediction: against the oracle, token by token what it may see, and what it shares."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model import DeepSeekV3
from tests import reference_model
from tests.model.tiny import (
    CONFIG,
    abstract_variables,
    compiled_gradient,
    compiled_model,
    initialised,
    oracle_tensors,
    perturbed,
    published,
    random_tokens,
    random_variables,
)
from tests.parity.compare import LOGITS

T = 12
WITHOUT = dataclasses.replace(CONFIG, num_nextn_predict_layers=0)


def test_logits_of_every_depth_against_the_oracle() -> None:
    """u = eh_proj([enorm(embedding ahead) ; hnorm(state)]), a block, a norm of its own, and the main model's head."""
    variables, tokens_BT = random_variables(), random_tokens(T + 1, T)
    found = compiled_model()(variables, tokens_BT)
    expected = reference_model.forward(published(CONFIG), oracle_tensors(CONFIG, variables), tokens_BT)
    chex.assert_shape(found.mtp_logits, [(T + 1, T - 1, CONFIG.vocab_size), (T + 1, T - 2, CONFIG.vocab_size)])
    chex.assert_type(found.mtp_logits, jnp.float32)
    chex.assert_trees_all_close(jax.tree.map(np.float64, found.mtp_logits), expected.mtp_logits, rtol=0, atol=LOGITS)
    assert all(logits.std() > 0.5 for logits in expected.mtp_logits)


def test_row_i_of_depth_k_sees_the_tokens_up_to_i_plus_k() -> None:
    """Every one of them and none beyond: each token is changed in turn."""
    found = compiled_model()(random_variables(), perturbed(T))
    for k, logits_BTV in enumerate(found.mtp_logits, 1):
        change_TT = np.abs(np.asarray(logits_BTV[1:] - logits_BTV[:1])).max(-1)
        sees = np.arange(T)[:, None] <= np.arange(T - k) + k
        assert change_TT[sees].min() > 1e-3
        assert change_TT[~sees].max() < 1e-5


def test_load_leaves_out_the_rows_without_a_token_ahead() -> None:
    """Depth k counts T - k rows of each sequence."""
    found = compiled_model()(random_variables(), random_tokens(T + 1, T))
    counted = {name: float(load.sum()) for name, load in found.load.items()}
    per_row = (T + 1) * CONFIG.num_experts_per_tok
    assert counted == {"moe_layers": 2 * T * per_row, "mtp_0": (T - 1) * per_row, "mtp_1": (T - 2) * per_row}
    chex.assert_shape([found.load["moe_layers"], found.load["mtp_0"]], [(2, 8), (8,)])


@pytest.mark.parametrize(("length", "depths"), [(1, 2), (2, 3)])
def test_a_sequence_shorter_than_a_depth_has_no_rows_there(length: int, depths: int) -> None:
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, num_nextn_predict_layers=depths)
    variables = abstract_variables(config)
    tokens_BT = jax.ShapeDtypeStruct((2, length), jnp.int32)
    output = jax.eval_shape(lambda v, t: DeepSeekV3(config).apply(v, t, mtp=True), variables, tokens_BT)
    assert [logits.shape[1] for logits in output.mtp_logits] == [max(length - k, 0) for k in range(1, depths + 1)]


# --- What it shares --------------------------------------------------------------------------------------------------


def test_embedding_and_head_are_no_parameters_of_a_depth() -> None:
    V = CONFIG.vocab_size
    variables = abstract_variables(CONFIG)
    for k in range(CONFIG.num_nextn_predict_layers):
        depth = variables["params"][f"mtp_{k}"]
        assert set(depth) == {"enorm", "hnorm", "eh_proj", "block", "norm"}
        assert set(depth["block"]) == {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
        assert not any(V in leaf.shape for leaf in jax.tree.leaves(depth))
    assert [leaf.shape for leaf in jax.tree.leaves(variables["params"]) if V in leaf.shape] == [(V, 24), (24, V)]


def test_its_gradient_reaches_the_embedding_and_the_head() -> None:
    """A token that stands last in its sequence is seen by the depths alone, and only as the embedding ahead."""
    tokens_BT = random_tokens(2, T) % 20
    target_BT = np.roll(tokens_BT, -1, axis=1)
    tokens_BT[0, -1], tokens_BT[1, -1] = 27, 28
    with_mtp, without = (compiled_gradient()(random_variables(), tokens_BT, target_BT, weight)[0] for weight in (1.0, 0.0))
    gradient = jax.tree.map(np.subtract, with_mtp, without)
    norm_V = np.linalg.norm(gradient["embed"]["embedding"], axis=-1)
    assert norm_V[[27, 28]].min() > 0.01
    assert norm_V[20:27].max() == 0
    assert np.linalg.norm(gradient["lm_head"]["kernel"]) > 0.01
    # It goes through the state too, to the main model's own layers.
    assert np.linalg.norm(gradient["dense_layers"]["mlp"]["down_proj"]["kernel"]) > 0.01


# --- Without it ------------------------------------------------------------------------------------------------------


def test_depth_0_leaves_the_main_model_alone_bit_for_bit() -> None:
    """From the same seed the same weights, and from those the same logits, whether the depths exist, run, or do neither."""
    variables, without = initialised(CONFIG, 3), initialised(WITHOUT, 3)
    main = {name: {key: value for key, value in tree.items() if not key.startswith("mtp_")} for name, tree in variables.items()}
    assert "mtp_0" in variables["params"]
    assert "mtp_0" in variables["router"]
    chex.assert_trees_all_equal(without, main)

    # As they were initialised, logits are hundredths; larger ones have more to lose.
    variables, without = (jax.tree.map(lambda leaf: np.asarray(leaf) * 30, tree) for tree in (variables, without))
    tokens_BT = random_tokens(T + 1, T)
    expected = jax.jit(DeepSeekV3(WITHOUT).apply)(without, tokens_BT)
    found = jax.jit(DeepSeekV3(CONFIG).apply)(variables, tokens_BT)
    with_mtp = compiled_model()(variables, tokens_BT)
    assert [len(output.mtp_logits) for output in (expected, found, with_mtp)] == [0, 0, 2]
    chex.assert_trees_all_equal(found.logits, expected.logits)
    chex.assert_trees_all_equal(with_mtp.logits, expected.logits)
    assert np.std(expected.logits) > 0.1
