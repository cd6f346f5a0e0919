"""Models with redundant experts against the same models without: equal outputs, other shards at work."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import MeshConfig
from dsv3_jax.model import DeepSeekV3, ModelOutput, unstack
from dsv3_jax.model.moe import MoE
from dsv3_jax.model.sharding import variable_shardings
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.replicas import place_experts, replicas_of
from dsv3_jax.parallel.sharding import TOKEN_SPEC
from dsv3_jax.plan.hlo import collectives
from dsv3_jax.rebalance import rebalance_experts, shard_loads
from tests.model.tiny import CONFIG as TINY
from tests.model.tiny import random_tokens, random_variables
from tests.parallel.ragged_emulation import emulate_ragged
from tests.tolerances import TOLERANCE

CONFIG = dataclasses.replace(
    TINY,
    vocab_size=32,
    hidden_size=32,
    num_hidden_layers=2,
    first_k_dense_replace=0,
    num_nextn_predict_layers=1,
    num_attention_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    moe_intermediate_size=8,
)
"""Two MoE layers and an MTP depth, of widths that the mesh divides."""
MESH = MeshConfig(expert=4, tensor=2)
E, SHARDS, SLOTS = CONFIG.n_routed_experts, 4, 3
TOKENS_BT = random_tokens(8, 12, CONFIG)

Tree = dict[str, Any]


@pytest.fixture(autouse=True)
def ragged_all_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate_ragged(monkeypatch)


@functools.cache
def run(unrolled: bool) -> Any:
    model = DeepSeekV3(CONFIG, unrolled=unrolled)
    return jax.jit(lambda variables: model.apply(variables, TOKENS_BT, mtp=True, hidden_states=True))


@functools.cache
def plain() -> tuple[Tree, ModelOutput]:
    """The model without copies on one device."""
    variables = jax.tree.map(jnp.asarray, random_variables(CONFIG))
    return variables, run(False)(variables)


def placements_of(load: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: rebalance_experts(counts, SHARDS, SLOTS) for name, counts in load.items()}


def assert_same(found: ModelOutput, wanted: ModelOutput) -> None:
    """Logits, those of the MTP depth, hidden states and routes, and all that counts logical experts."""
    chex.assert_trees_all_equal(found.routes, wanted.routes)
    chex.assert_trees_all_close(found.logits, wanted.logits, **TOLERANCE["float32"])
    chex.assert_trees_all_close(found.mtp_logits, wanted.mtp_logits, **TOLERANCE["float32"])
    chex.assert_trees_all_close(found.balance_loss, wanted.balance_loss, **TOLERANCE["float32"])


def test_outputs_of_an_unrolled_model() -> None:
    """Each layer placed by itself; the MTP depth as well."""
    variables, wanted = plain()
    placed = place_experts(variables, placements_of(wanted.load))
    assert placed["params"]["moe_layers"]["mlp"]["experts"]["up_proj"].shape[:2] == (2, SHARDS * SLOTS)
    assert placed["params"]["mtp_0"]["block"]["mlp"]["experts"]["up_proj"].shape[0] == SHARDS * SLOTS
    found = run(True)(unstack(placed))
    assert_same(found, wanted)
    np.testing.assert_array_equal(np.stack([found.load[f"moe_layers_{i}"] for i in range(2)]), wanted.load["moe_layers"])
    np.testing.assert_array_equal(found.load["mtp_0"], wanted.load["mtp_0"])


def test_a_wrong_copy_would_show() -> None:
    """The comparison can fail: with two experts' weights swapped in the slots, it does."""
    variables, wanted = plain()
    placed = unstack(place_experts(variables, placements_of(wanted.load)))
    experts = placed["params"]["moe_layers_0"]["mlp"]["experts"]
    experts["down_proj"] = experts["down_proj"].at[:2].set(experts["down_proj"][1::-1])
    with pytest.raises(AssertionError):
        assert_same(run(True)(placed), wanted)


@functools.cache
def stacked_on_mesh() -> tuple[Any, Tree]:
    """The variables, split as their rules say."""
    mesh = make_mesh(MESH)
    return mesh, jax.device_put(plain()[0], variable_shardings(CONFIG, mesh))


@functools.cache
def on_mesh() -> tuple[Any, Tree]:
    """The same, unrolled."""
    mesh, stacked = stacked_on_mesh()
    return mesh, unstack(stacked)


def unrolled_load() -> dict[str, Any]:
    load = plain()[1].load
    return {"moe_layers_0": load["moe_layers"][0], "moe_layers_1": load["moe_layers"][1], "mtp_0": load["mtp_0"]}


def test_outputs_on_a_mesh() -> None:
    """A scanned stack, its experts on four shards, their units on two.

    And the loads that the routes make of the shards, against the prediction.
    """
    mesh, variables = stacked_on_mesh()
    wanted = plain()[1]
    with jax.set_mesh(mesh):
        found = run(False)(place_experts(variables, placements_of(wanted.load)))
    assert_same(found, wanted)
    chex.assert_trees_all_equal(found.load, wanted.load)
    load = unrolled_load()
    placements = placements_of(load)
    for layer, name in enumerate(["moe_layers_0", "moe_layers_1"]):
        counts, placement = np.asarray(load[name]), placements[name]
        slot_BTK = np.asarray(replicas_of(placement, E).slots(found.routes[layer]))
        measured = np.bincount(slot_BTK.reshape(-1) // SLOTS, minlength=SHARDS)
        before, predicted = counts.reshape(SHARDS, -1).sum(1), shard_loads(placement, counts, SHARDS)
        assert measured.max() < before.max()
        # Within a few of the 288 choices.
        np.testing.assert_allclose(measured, predicted, atol=12)


def experts_of(variables: Tree, name: str) -> Tree:
    layer = variables["params"][name]
    return layer.get("block", layer)["mlp"]["experts"]


def test_every_slot_holds_its_expert_and_the_weights_stay_split() -> None:
    mesh, variables = on_mesh()
    placements = placements_of(unrolled_load())
    placed = place_experts(variables, placements)
    for name, placement in placements.items():
        for proj, weight in experts_of(placed, name).items():
            old = experts_of(variables, name)[proj]
            assert weight.sharding == old.sharding
            np.testing.assert_array_equal(weight, np.asarray(old)[placement])
    copies = placed["placement"]["mtp_0"]["block"]["mlp"]["experts"]["copies"]
    assert copies.slot_EC.sharding == NamedSharding(mesh, PartitionSpec())
    # All that is not experts is not even copied.
    assert placed["params"]["embed"]["embedding"] is variables["params"]["embed"]["embedding"]
    assert placed["router"] == variables["router"]


@pytest.mark.parametrize("on_a_mesh", [False, True])
def test_placed_anew(on_a_mesh: bool) -> None:
    """From one placement to another, with another number of slots, as from none to it; layers not named stay."""
    variables = on_mesh()[1] if on_a_mesh else unstack(plain()[0])
    load = unrolled_load()
    first = place_experts(variables, placements_of(load))
    later = {"moe_layers_1": rebalance_experts(np.arange(E) ** 2, SHARDS, 4)}
    chex.assert_trees_all_equal(place_experts(first, later), place_experts(variables, placements_of(load) | later))


def test_scanned_stacks_on_a_mesh() -> None:
    """The stack of both layers at once gives what each by itself gives."""
    placed = unstack(place_experts(stacked_on_mesh()[1], placements_of(plain()[1].load)))
    wanted = place_experts(on_mesh()[1], placements_of(unrolled_load()))
    chex.assert_trees_all_equal(placed["params"], wanted["params"])


@functools.cache
def layer() -> tuple[Tree, np.ndarray, np.ndarray, np.ndarray]:
    """An MoE layer whose experts 2 and 3, on one shard, are chosen by all; inputs and outputs [B, T, D], and its loads."""
    config = dataclasses.replace(CONFIG, n_group=1, topk_group=1)
    tree = {name: tree["moe_layers"]["mlp"] for name, tree in random_variables(config).items()}
    tree = jax.tree.map(lambda leaf: leaf[0], tree)
    tree["router"]["gate"]["e_score_correction_bias"][[2, 3]] += 10.0
    tree = jax.tree.map(jnp.asarray, tree)
    x_BTD = np.random.default_rng(1).standard_normal((8, 16, CONFIG.hidden_size)).astype(np.float32)
    y_BTD, routing, _ = jax.jit(MoE(config).apply)(tree, x_BTD)
    return tree, x_BTD, np.asarray(y_BTD), np.asarray(routing.load_E)


def placed_layer(placement: np.ndarray) -> Tree:
    """The layer, as a model of nothing else, in slots."""
    tree, *_ = layer()
    wrapped = {name: {"moe_layers_0": {"mlp": subtree}} for name, subtree in tree.items()}
    return {
        name: subtree["moe_layers_0"]["mlp"] for name, subtree in place_experts(wrapped, {"moe_layers_0": placement}).items()
    }


@functools.cache
def program(exchange: str) -> tuple[Any, Any]:
    config = dataclasses.replace(CONFIG, n_group=1, topk_group=1, expert_exchange=exchange, receive_factor=1.0)
    mesh = make_mesh(MESH)
    tokens = NamedSharding(mesh, TOKEN_SPEC)
    return mesh, jax.jit(MoE(config).apply, in_shardings=(None, tokens))


def assert_rounds(apply: Any, variables: Tree, rounds: int) -> None:
    _, x_BTD, wanted_BTD, load_E = layer()
    found_BTD, routing, found = apply(variables, x_BTD)
    np.testing.assert_array_equal(routing.load_E, load_E)
    chex.assert_trees_all_close(np.asarray(found_BTD), wanted_BTD, **TOLERANCE["float32"])
    assert int(found) == rounds


@pytest.mark.parametrize("exchange", ["dense", "all_gather", "ragged"])
def test_every_exchange_needs_fewer_rounds(exchange: str) -> None:
    """Two of three choices go to one shard of four with copies of others, 2.7 times its buffer; with their own, to all."""
    *_, load_E = layer()
    assert load_E[2:4].tolist() == [128, 128]
    mesh, apply = program(exchange)
    elsewhere, placement = np.array([0, 1, 4, 5, 2, 3, 0, 1, 0, 4, 5, 6, 0, 6, 7, 1]), rebalance_experts(load_E, SHARDS, 4)
    # Of the same shapes, so that one program does for both.
    assert np.bincount(elsewhere).max() == np.bincount(placement).max() == 4
    with jax.set_mesh(mesh):
        assert_rounds(apply, placed_layer(elsewhere), 3)
        assert_rounds(apply, placed_layer(placement), 2)


def test_no_other_collective() -> None:
    """The slots of choices are found where the tokens are: the program sends what it sent without copies."""
    tree, x_BTD, _, load_E = layer()
    mesh, apply = program("dense")
    found = []
    with jax.set_mesh(mesh):
        for variables, rounds in (tree, 3), (placed_layer(rebalance_experts(load_E, SHARDS, 4)), 2):
            compiled = apply.lower(variables, x_BTD).compile()
            found.append({(row.kind, row.axis, row.count) for row in collectives(compiled.as_text(), dict(mesh.shape))})
            assert_rounds(apply, variables, rounds)
    assert found[0] == found[1]
    assert {("all-to-all", "expert")} <= {(kind, axis) for kind, axis, _ in found[0]}


@pytest.mark.parametrize(
    ("name", "placement", "message"),
    [
        (
            "lm_head",
            np.arange(E),
            "lm_head has no routed experts to place; those that have: moe_layers_0, moe_layers_1, mtp_0",
        ),
        ("moe_layers", np.arange(E), "moe_layers has no routed experts"),
        ("mtp_1", np.arange(E), "mtp_1 has no routed experts"),
        ("moe_layers_1", np.zeros((2, E), np.int32), r"the placement of moe_layers_1 is \[2, 8\]; give shape \['slots'\]"),
        ("moe_layers_1", np.arange(E + 1), "the placement of moe_layers_1: a slot holds expert 8, not in 0..7"),
        ("mtp_0", np.zeros(E, np.int32), "the placement of mtp_0: expert 1 is in no slot"),
        ("mtp_0", np.arange(E + 1) % E, r"mtp_0/.*: 9 slots are no multiple of mesh.expert \(4\)"),
    ],
)
def test_what_cannot_be_placed(name: str, placement: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place_experts(on_mesh()[1], {name: placement})
