"""A decoder block of either kind against the oracle, and what it keeps when asked."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.mla import CacheMetadata, Latents
from dsv3_jax.model.rope import rope_angles
from dsv3_jax.model.transformer import Block, BlockOutput
from tests import reference_model
from tests.model.tiny import CONFIG, oracle_tensors, published, random_variables
from tests.tolerances import TOLERANCE

B, T = 2, 11
EVERYTHING = "latents", "routes", "hidden"


@functools.cache
def program(moe: bool) -> Any:
    return jax.jit(Block(CONFIG, moe, return_intermediates=EVERYTHING).apply)


def inputs(moe: bool) -> tuple[Any, np.ndarray, Any]:
    """The first block of a kind, states, and their rotation."""
    name = "moe_layers" if moe else "dense_layers"
    layer = {c: jax.tree.map(lambda leaf: leaf[0], tree[name]) for c, tree in random_variables().items() if name in tree}
    h_BTD = np.random.default_rng(1).standard_normal((B, T, CONFIG.hidden_size)).astype(np.float32)
    return layer, h_BTD, rope_angles(CONFIG, jnp.arange(T)[None])


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_block(moe: bool) -> None:
    """h += attention(norm(h)); h += ffn(norm(h)); and everything it can keep."""
    layer, h_BTD, turns = inputs(moe)
    found_BTD, output = program(moe)(layer, h_BTD, None, turns)

    tensors = reference_model.layer_tensors(oracle_tensors(CONFIG, random_variables()), 1 if moe else 0)
    expected_BTD, routing = reference_model.block(published(CONFIG), tensors, np.float64(h_BTD), moe)
    chex.assert_trees_all_equal_shapes_and_dtypes(found_BTD, h_BTD)
    chex.assert_trees_all_close(np.float64(found_BTD), expected_BTD, **TOLERANCE["float32"])

    chex.assert_trees_all_equal(output.hidden_BTD, found_BTD)
    chex.assert_shape(list(output.latents), [(B, T, CONFIG.kv_lora_rank), (B, T, CONFIG.qk_rope_head_dim)])
    if moe:
        chex.assert_trees_all_equal(np.int64(output.chosen_BTK), routing.chosen_BTK)
        chex.assert_trees_all_equal(output.load_E, np.float32(np.bincount(routing.chosen_BTK.ravel(), minlength=8)))
        chex.assert_shape(output.balance_loss, ())
    else:
        assert (output.load_E, output.balance_loss, output.chosen_BTK) == (None, None, None)


def test_nothing_is_kept_unasked() -> None:
    """Unrequested outputs would be stacked over 61 layers."""
    shapes = {}
    for moe in (False, True):
        block = Block(CONFIG, moe)
        h_BTD = jnp.zeros((B, T, CONFIG.hidden_size))
        arguments = h_BTD, None, rope_angles(CONFIG, jnp.arange(T)[None])
        shapes[moe] = jax.eval_shape(lambda block=block, a=arguments: block.init_with_output(jax.random.key(0), *a))[0][1]
    assert shapes[False] == BlockOutput()
    unasked = shapes[True]._replace(load_E=None, balance_loss=None, rounds=None)
    assert unasked == BlockOutput()
    chex.assert_shape([shapes[True].load_E, shapes[True].balance_loss], [(CONFIG.n_routed_experts,), ()])


def test_cached_block_is_the_uncached_one() -> None:
    """The last token alone, on the latents that the block kept of the others: the same row, and the same latents."""
    (layer, h_BTD, turns), run = inputs(moe=True), program(moe=True)
    whole_BTD, output = run(layer, h_BTD, None, turns)
    cache = Latents(*(np.where(np.arange(T)[:, None] < T - 1, part, np.nan) for part in output.latents))
    last = jax.tree.map(lambda part: part[:, -1:], turns)
    found_BTD, alone = run(layer, h_BTD[:, -1:], cache, last, None, CacheMetadata(np.full(B, T - 1)))
    chex.assert_trees_all_close(found_BTD, whole_BTD[:, -1:], **TOLERANCE["float32"])
    chex.assert_trees_all_close(alone.latents, jax.tree.map(lambda part: part[:, -1:], output.latents), **TOLERANCE["float32"])
