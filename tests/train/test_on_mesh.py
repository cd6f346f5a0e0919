"""Training on meshes of eight devices against training on one: losses, gradients, biases, and what is equal everywhere."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from dsv3_jax.model import DeepSeekV3, training_loss, unstack
from dsv3_jax.model import moe as router_module
from dsv3_jax.model.losses import Batch
from dsv3_jax.model.sharding import variable_shardings
from dsv3_jax.parallel.devices import BatchPlacement
from dsv3_jax.parallel.mesh import TOKEN_AXES, current_mesh, make_mesh
from dsv3_jax.parallel.sharding import MICRO_BATCHES, TOKEN_SPEC
from dsv3_jax.train.state import TrainState, state_shardings
from dsv3_jax.train.step import train_step
from tests.model.tiny import CONFIG, random_variables
from tests.parallel.ragged_emulation import emulate_ragged
from tests.parallel.test_all_to_all import MESHES
from tests.train.first_states import init_or_restore

MODEL = dataclasses.replace(
    CONFIG,
    vocab_size=32,
    hidden_size=32,
    num_nextn_predict_layers=1,
    num_attention_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    intermediate_size=24,
    moe_intermediate_size=8,
    attention_chunk=4,
    loss_chunk=4,
    initializer_range=0.3,  # Scores far enough apart that rounding does not choose between experts.
)
RUN = Config(
    model=MODEL,
    optimizer=OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=4, moment_dtype="float32"),
    train=TrainConfig(steps=20, batch_size=8, sequence_length=8, bias_update_speed=0.01, seed=6),
)
WITH_MTP = dataclasses.replace(RUN, model=dataclasses.replace(MODEL, num_hidden_layers=1, first_k_dense_replace=0))
ONE_LAYER = dataclasses.replace(WITH_MTP, model=dataclasses.replace(WITH_MTP.model, num_nextn_predict_layers=0))


@pytest.fixture(autouse=True)
def ragged_all_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate_ragged(monkeypatch)


def batches(run: Config, steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(7)
    shape = steps, run.train.batch_size, run.train.sequence_length + 1
    return [(rows[:, :-1], rows[:, 1:]) for rows in rng.integers(0, run.model.vocab_size, shape).astype(np.int32)]


# One step's loss and gradients.


def loss_and_gradients(model: ModelConfig) -> Callable[..., Any]:
    def objective(params: Any, router: Any, tokens_BT: jax.Array, target_BT: jax.Array) -> tuple[jax.Array, Any]:
        losses = training_loss(params, router, model, tokens_BT, target_BT, 0.3)
        return losses.loss, losses.load

    return jax.value_and_grad(objective, has_aux=True)


@functools.cache
def of_one_device() -> Any:
    variables = random_variables(MODEL)
    program = jax.jit(loss_and_gradients(MODEL))
    return program(variables["params"], variables["router"], *batches(RUN, 1)[0])


# Every axis and every exchange: one quickly, two in CI, and all pairs by night.
QUICK = "data, expert, tensor", "dense"
SLOW = ("fsdp, expert", "all_gather"), ("context, expert, tensor", "ragged")


def mark(pair: tuple[str, str]) -> Any:
    return () if pair == QUICK else pytest.mark.slow if pair in SLOW else pytest.mark.nightly


@pytest.mark.parametrize(
    ("sizes", "exchange"),
    [pytest.param(*pair, marks=mark(pair)) for pair in itertools.product(MESHES, ("dense", "all_gather", "ragged"))],
)
def test_loss_and_gradients_of_every_mesh_and_exchange(sizes: str, exchange: str) -> None:
    mesh = make_mesh(MeshConfig(**MESHES[sizes]))
    variables = jax.device_put(random_variables(MODEL), variable_shardings(MODEL, mesh))
    place = BatchPlacement(mesh, *batches(RUN, 1)[0][0].shape).place
    model = dataclasses.replace(MODEL, expert_exchange=exchange)
    with jax.set_mesh(mesh):
        program = jax.jit(loss_and_gradients(model))
        (loss, load), grads = program(variables["params"], variables["router"], *map(place, batches(RUN, 1)[0]))
    (wanted_loss, wanted_load), wanted_grads = of_one_device()
    assert abs(loss - wanted_loss) < 1e-5
    chex.assert_trees_all_equal(load, wanted_load)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, wanted_grads)
    for (path, found), wanted in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wanted_grads), strict=True):
        apart = np.linalg.norm(np.asarray(found) - wanted) / np.linalg.norm(wanted)
        assert apart < 1e-5, (jax.tree_util.keystr(path), apart)


# Whole steps.


def train(
    run: Config, sizes: dict[str, int], steps: int = 8, watch: Callable[..., None] = lambda *now: None
) -> tuple[TrainState, list[dict[str, jax.Array]]]:
    """The state after `steps` steps on a mesh of as many devices as its sizes multiply to, and the metrics of each."""
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])
    shardings, everywhere = state_shardings(run, mesh), NamedSharding(mesh, PartitionSpec())
    batch = NamedSharding(mesh, MICRO_BATCHES)
    state = jax.device_put(init_or_restore(run), shardings)
    step = jax.jit(
        functools.partial(train_step, config=run),
        in_shardings=(shardings, batch, everywhere),
        out_shardings=(shardings, everywhere, everywhere),
    )
    metrics = []
    with jax.set_mesh(mesh):
        for number, (tokens_BT, target_BT) in enumerate(batches(run, steps)):
            watch(state.variables, tokens_BT)
            rows = Batch(
                *(
                    array.reshape(run.train.micro_batches, run.train.micro_batch, -1)
                    for array in (tokens_BT, target_BT, np.ones(target_BT.shape, np.float32))
                ),
                None,
            )
            state, row, _ = step(state, rows, run.schedules.at(number))
            metrics.append(row)
    return state, metrics


@functools.cache
def on_one_device(run: Config) -> tuple[TrainState, list[dict[str, jax.Array]]]:
    return train(run, {"fsdp": 1})


@pytest.mark.nightly
@pytest.mark.parametrize("run", [WITH_MTP, ONE_LAYER])
def test_no_choice_of_experts_hangs_on_rounding(run: Config) -> None:
    """As the comparisons of steps take for granted: if one fails, the model or the tokens may have come too close."""
    margins: list[jax.Array] = []
    margin = jax.jit(functools.partial(margin_of, run.model))
    train(run, {"fsdp": 1}, watch=lambda *now: margins.append(margin(*now)))
    assert float(min(margins)) > 1e-5


def margin_of(model: ModelConfig, variables: dict[str, Any], tokens_BT: jax.Array) -> jax.Array:
    """The smallest margin of any choice: layers unrolled, so that each router's scores can be had on the way."""
    margins: list[jax.Array] = []
    choose = router_module.choose_experts

    def watched(biased_BTE: jax.Array, config: ModelConfig) -> jax.Array:
        margins.append(smallest_margin(biased_BTE, config))
        return choose(biased_BTE, config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router_module, "choose_experts", watched)
        has_mtp = model.num_nextn_predict_layers > 0
        DeepSeekV3(model, unrolled=True).apply(unstack(variables), tokens_BT, mtp=has_mtp, method="features")
    return jnp.min(jnp.stack(margins))


def smallest_margin(biased_BTE: jax.Array, config: ModelConfig) -> jax.Array:
    """How much any score, of an expert or of a group, would have to move at least to change a choice."""
    G, K, kept = config.n_group, config.num_experts_per_tok, config.topk_group
    grouped = biased_BTE.reshape(*biased_BTE.shape[:-1], G, -1)
    group_BTG = jax.lax.top_k(grouped, 2)[0].sum(-1)
    best_BTG = jax.lax.top_k(group_BTG, kept + 1)[0]
    inside = jnp.where((group_BTG >= best_BTG[..., kept - 1 : kept])[..., None], grouped, -jnp.inf).reshape(biased_BTE.shape)
    best_BTE = jax.lax.top_k(inside, K + 1)[0]
    groups, experts = best_BTG[..., kept - 1] - best_BTG[..., kept], best_BTE[..., K - 1] - best_BTE[..., K]
    return jnp.minimum(groups.min(), experts.min())


@pytest.mark.parametrize(
    "sizes", [pytest.param(sizes, marks=pytest.mark.slow if "context" in sizes else pytest.mark.nightly) for sizes in MESHES]
)
def test_eight_steps_are_those_of_one_device(sizes: str) -> None:
    wanted_state, wanted = on_one_device(WITH_MTP)
    # Accumulated over micro-batches of a sequence a device, where that makes more than one.
    places = int(np.prod([MESHES[sizes].get(axis, 1) for axis in ("data", "fsdp", "expert")]))
    accumulating = dataclasses.replace(WITH_MTP, train=dataclasses.replace(RUN.train, micro_batch_size=places))
    state, metrics = train(accumulating, MESHES[sizes])
    for found, expected in zip(metrics, wanted, strict=True):
        for name in ("loss", "main_loss", "mtp_loss", "balance_loss"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=1e-4)
        np.testing.assert_allclose(found["max_violation"], expected["max_violation"], rtol=1e-6)
    chex.assert_trees_all_equal(state.router, wanted_state.router)


# What is declared to be the same on every device.

BY_AXIS = {"data": 2, "fsdp": 2, "expert": 2}, {"fsdp": 2, "expert": 2, "context": 2}


def equal_on_all_devices(tree: Any) -> bool:
    leaves = [[np.asarray(shard.data) for shard in leaf.addressable_shards] for leaf in jax.tree.leaves(tree)]
    return all(np.array_equal(shards[0], shard) for shards in leaves for shard in shards)


def same_biases(state: TrainState, wanted: TrainState) -> bool:
    return all(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (state.router, wanted.router)), strict=True))


@pytest.mark.parametrize(
    "sizes", [pytest.param(BY_AXIS[0], marks=pytest.mark.slow), pytest.param(BY_AXIS[1], marks=pytest.mark.nightly)]
)
def test_biases_and_metrics_are_equal_everywhere_and_those_of_one_device(sizes: dict[str, int]) -> None:
    wanted, wanted_metrics = on_one_device(ONE_LAYER)
    state, metrics = train(ONE_LAYER, sizes)
    assert equal_on_all_devices([state.router, metrics])
    assert same_biases(state, wanted)
    for name in ("loss", "max_violation"):
        np.testing.assert_allclose(metrics[-1][name], wanted_metrics[-1][name], rtol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "left_out"),
    [
        pytest.param(BY_AXIS[0], "expert", marks=pytest.mark.slow),
        pytest.param(BY_AXIS[1], "context", marks=pytest.mark.nightly),
        *(pytest.param(BY_AXIS[0], axis, marks=pytest.mark.nightly) for axis in ("data", "fsdp", None)),
    ],
)
def test_a_load_that_leaves_an_axis_out_would_show(
    sizes: dict[str, int], left_out: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mistake that is easily made: counts summed over all axes that split tokens but one. Without it, nothing shows."""
    count = router_module.expert_load

    def partial_load(chosen_BTK: jax.Array, token_mask_BT: jax.Array, num_experts: int) -> jax.Array:
        if current_mesh() is None:  # While variables are made.
            return count(chosen_BTK, token_mask_BT, num_experts)

        def on_device(chosen_BTK: jax.Array, token_mask_BT: jax.Array) -> jax.Array:
            return jax.lax.psum(
                count(chosen_BTK, token_mask_BT, num_experts), [axis for axis in TOKEN_AXES if axis != left_out]
            )

        mapped = jax.shard_map(on_device, in_specs=(TOKEN_SPEC, TOKEN_SPEC), out_specs=PartitionSpec(), check_vma=False)
        return mapped(chosen_BTK, token_mask_BT)

    wanted, _ = on_one_device(ONE_LAYER)
    monkeypatch.setattr(router_module, "expert_load", partial_load)
    state, metrics = train(ONE_LAYER, sizes)
    assert (equal_on_all_devices([state.router, metrics]) and same_biases(state, wanted)) == (left_out is None)
