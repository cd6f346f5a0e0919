"""The training step against what it is made of: the model's own logits, jax's gradient, and the rules of the report."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv3_jax.config import Config, OptimizerConfig, TrainConfig
from dsv3_jax.config.run import StepHyperparams
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.model.losses import Batch
from dsv3_jax.train.state import TrainState
from dsv3_jax.train.step import train_step
from tests import reference_model
from tests.model.tiny import MOE_ONLY, oracle_tensors, published, random_tokens
from tests.tolerances import TOLERANCE
from tests.train.first_states import init_or_restore

B, T = 4, 24
GAMMA, LAMBDA = 0.01, 0.3
# Two MoE layers and one MTP depth, of few parts: each compiles for itself.
MODEL = dataclasses.replace(MOE_ONLY, q_lora_rank=None, n_shared_experts=0, rope_scaling=None, attention_chunk=T, loss_chunk=T)
RUN = Config(
    model=MODEL,
    # Clips from the first step on, so that a norm taken after clipping would show.
    optimizer=OptimizerConfig(
        learning_rate=3e-3, final_learning_rate=1e-3, warmup_steps=2, clip_norm=0.1, moment_dtype="float32"
    ),
    train=TrainConfig(steps=20, batch_size=B, sequence_length=T, mtp_loss_weight=LAMBDA, bias_update_speed=GAMMA),
)
TOKENS_BX = random_tokens(B, T + 1)
TOKENS_BT, TARGET_BT = TOKENS_BX[:, :-1], TOKENS_BX[:, 1:]
BATCH = Batch.of(TOKENS_BT, TARGET_BT)
METRICS = {"loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm", "skipped", "exchange_rounds", "max_violation"}

Step = Callable[..., tuple[TrainState, dict[str, jax.Array], dict[str, jax.Array]]]


def values(config: Config = RUN, step: int = 0) -> StepHyperparams:
    return config.schedules.at(step)


def start(config: Config = RUN) -> TrainState:
    return jax.device_put(init_or_restore(config))


@pytest.fixture(scope="module")
def step() -> Step:
    """The step as train.py has it."""
    return jax.jit(functools.partial(train_step, config=RUN), donate_argnums=0)


@pytest.fixture(scope="module")
def first(step: Step) -> tuple[TrainState, dict[str, jax.Array], dict[str, jax.Array]]:
    """The first step's result."""
    return step(start(), BATCH, values())


@dataclasses.dataclass(frozen=True)
class Expected:
    """The objective of the report over whole logits, at the start: its parts, its gradient, where the tokens went."""

    losses: dict[str, float]
    grads: Any
    load: dict[str, np.ndarray]
    logits_BTV: np.ndarray


@pytest.fixture(scope="module")
def expected() -> Expected:
    def cross_entropy(logits_BTV: jax.Array, target_BT: np.ndarray) -> jax.Array:
        return -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), target_BT[..., None], axis=-1).mean()

    def objective(params: Any, router: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "router": router}
        output = DeepSeekV3(MODEL).apply(variables, TOKENS_BT, mtp=True, hidden_states=True)
        main = cross_entropy(output.logits, TARGET_BT)
        mtp = cross_entropy(output.mtp_logits[0], TARGET_BT[:, 1:])
        loss = main + LAMBDA * mtp + MODEL.aux_loss_alpha * output.balance_loss
        parts = {"loss": loss, "main_loss": main, "mtp_loss": mtp, "balance_loss": output.balance_loss}
        return loss, (parts, output)

    before = start()
    grads, (losses, output) = jax.jit(jax.grad(objective, has_aux=True))(before.params, before.router)
    routes = np.asarray(output.routes).reshape(MODEL.num_moe_layers, -1)
    counted = np.stack([np.bincount(route, minlength=MODEL.n_routed_experts) for route in routes])
    load = {"moe_layers": counted, "mtp_0": np.asarray(output.load["mtp_0"])}
    return Expected(losses, grads, load, np.asarray(output.logits))


def test_metrics_and_gradient_are_those_of_the_objective_written_out(first: tuple, expected: Expected) -> None:
    after, metrics, _ = first
    norm = math.sqrt(sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in jax.tree.leaves(expected.grads)))
    assert norm > 2 * RUN.optimizer.clip_norm
    assert metrics.keys() == METRICS
    for name, value in metrics.items():
        chex.assert_shape(value, ())
        chex.assert_type(value, jnp.float32)
        assert np.isfinite(value), name
    figures = expected.losses | {"grad_norm": norm, "skipped": 0.0}
    for name, value in figures.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    # The first moment after one step from zero is a tenth of the clipped gradient.
    adam = next(part for part in after.optimizer if isinstance(part, optax.ScaleByAdamState))
    clipped = jax.tree.map(lambda g: 0.1 * np.asarray(g) * RUN.optimizer.clip_norm / norm, expected.grads)
    errors = jax.tree.map(lambda found, g: float(np.linalg.norm(found - g) / np.linalg.norm(g)), adam.mu, clipped)
    assert max(jax.tree.leaves(errors)) < 1e-4, errors


def test_parameters_move_by_the_updates_of_the_optimizer(first: tuple) -> None:
    after, _, _ = first
    before = start()
    assert int(after.step) == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    # Adam's update from its own moments after the step, the decay of the matrices, and the rate of the first step.
    adam = next(part for part in after.optimizer if isinstance(part, optax.ScaleByAdamState))
    rate = RUN.optimizer.learning_rate / 2  # the first of two steps of warm-up

    def moved(path: tuple, *arrays: jax.Array) -> np.ndarray:
        old, m, v = map(np.asarray, arrays)
        decay = 0 if path[-1].key == "scale" else RUN.optimizer.weight_decay
        return old - rate * ((m / 0.1) / (np.sqrt(v / 0.05) + RUN.optimizer.epsilon) + decay * old)

    expected = jax.tree_util.tree_map_with_path(moved, before.params, adam.mu, adam.nu)
    chex.assert_trees_all_close(after.params, expected, rtol=1e-4, atol=1e-6)


def test_biases_move_by_gamma_against_the_load(first: tuple, expected: Expected) -> None:
    after, _, _ = first
    signs = {name: np.sign(counts - counts.mean(-1, keepdims=True)) for name, counts in expected.load.items()}
    assert {-1, 1} <= {sign for array in signs.values() for sign in array.ravel()}
    for name, biases in start().router.items():
        old, new = jax.tree.leaves(biases), jax.tree.leaves(after.router[name])
        assert (len(old), new[0].dtype) == (1, jnp.float32)
        np.testing.assert_array_equal(new[0], np.asarray(old[0]) - np.float32(GAMMA) * signs[name].astype(np.float32))


def test_the_violation_is_that_of_the_worst_layer(first: tuple, expected: Expected) -> None:
    violations = np.concatenate([np.ravel(counts.max(-1) / counts.mean(-1) - 1) for counts in expected.load.values()])
    chex.assert_shape(violations, (3,))
    np.testing.assert_allclose(first[1]["max_violation"], violations.max(), rtol=1e-6)
    assert 0 < violations.min() < violations.max()


def test_the_loss_falls_on_a_repeated_batch_the_same_to_the_bit_each_time(step: Step) -> None:
    runs = []
    for _ in range(2):
        state, losses = start(), []
        for number in range(RUN.train.steps):
            state, metrics, _ = step(state, BATCH, values(step=number))
            losses.append(float(metrics["main_loss"]))
        runs.append((state, losses))
    chex.assert_trees_all_equal(*runs)
    losses = runs[0][1]
    assert losses[-1] < 0.8 * losses[0], losses
    assert sum(later < earlier for earlier, later in itertools.pairwise(losses)) >= 15, losses
    assert int(runs[0][0].step) == RUN.train.steps


def test_the_state_is_donated(step: Step) -> None:
    before = start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # jax warns of donated arrays that it could not use
        step(before, BATCH, values())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.router, before.optimizer)))


def in_bfloat16(**changes: int) -> tuple[Config, TrainState]:
    """The run without MTP, in bfloat16, and its first state."""
    model = dataclasses.replace(MODEL, num_nextn_predict_layers=0, dtype="bfloat16", **changes)
    config = dataclasses.replace(RUN, model=model, optimizer=dataclasses.replace(RUN.optimizer, moment_dtype="bfloat16"))
    return config, start(config)


def test_weights_stay_float32_in_bfloat16() -> None:
    config, before = in_bfloat16()
    after, metrics, _ = jax.eval_shape(functools.partial(train_step, config=config), before, BATCH, values(config))
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(metrics)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dense_layers", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_the_loss_in_bfloat16_is_near_the_oracle(dense_layers: int) -> None:
    """Of a dense layer as well, without which nothing is violated."""
    config, before = in_bfloat16(num_hidden_layers=1, first_k_dense_replace=dense_layers)
    tensors = oracle_tensors(config.model, before.variables)
    logits_BTV = reference_model.forward(published(config.model), tensors, TOKENS_BT).logits_BTV
    after, metrics, _ = jax.jit(functools.partial(train_step, config=config))(before, BATCH, values(config))
    log_p_BT = np.take_along_axis(logits_BTV, TARGET_BT[..., None], -1)[..., 0] - np.log(np.exp(logits_BTV).sum(-1))
    np.testing.assert_allclose(metrics["main_loss"], -log_p_BT.mean(), **TOLERANCE["bfloat16"])
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    if dense_layers:
        assert (float(metrics["max_violation"]), float(metrics["mtp_loss"]), after.router) == (0, 0, {})
        assert float(metrics["loss"]) == float(metrics["main_loss"])


# Micro-batches.


def test_filled_micro_batches_are_one_whole_batch_and_nothing_compiles_twice(step: Step) -> None:
    """Two of four, as in a ramp, and all four, which hold the whole batch twice; half of the targets count."""
    weight_BT = np.random.default_rng(5).integers(0, 2, (B, T)).astype(np.float32)
    weight_BT[:, -3:] = [[0, 0, 0], [1, 1, 1], [1, 0, 1], [0, 1, 0]]  # micro-batches weigh differently at every depth
    whole_batch = BATCH._replace(loss_weight_ABT=weight_BT[None])
    whole = step(start(), whole_batch, values())
    config = dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, batch_size=2 * B, micro_batch_size=B // 2))
    in_parts = jax.jit(functools.partial(train_step, config=config))

    def parts(first: Batch, second: Batch, filled: int, number: int = 0) -> tuple:
        rows = (np.concatenate(pair, axis=1).reshape(4, B // 2, T) for pair in zip(first[:3], second[:3], strict=True))
        now = values(step=number)._replace(micro_batches=np.int32(filled))
        return in_parts(start(config), Batch(*rows, None), now)

    # What lies in the others is not looked at but for its weights, which are 0.
    others = Batch.of(TOKENS_BT[::-1], TARGET_BT[::-1])._replace(loss_weight_ABT=np.zeros_like(whole_batch.loss_weight_ABT))
    for times, found in ((1, parts(whole_batch, others, 2)), (2, parts(whole_batch, whole_batch, 4))):
        chex.assert_trees_all_equal(jax.tree.map(lambda load, times=times: times * np.asarray(load), whole[2]), found[2])
        chex.assert_trees_all_equal(whole[0].router, found[0].router)
        chex.assert_trees_all_close(whole[1], found[1], rtol=1e-5)
        chex.assert_trees_all_close(whole[0], found[0], rtol=1e-4, atol=2e-5)
    changed = jax.tree.map(lambda new, old: np.abs(np.asarray(new) - old).max(), whole[0].params, start().params)
    assert min(jax.tree.leaves(changed)) > 5e-4
    for filled in (1, 3):
        parts(whole_batch, others, filled, number=filled)
    assert in_parts._cache_size() == 1


# What is not finite.


@pytest.mark.parametrize("where", ["batch", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(step: Step, where: str) -> None:
    batch, now = BATCH, values()
    if where == "batch":
        weights = BATCH.loss_weight_ABT.copy()
        weights[0, 1, 2] = np.nan
        batch = batch._replace(loss_weight_ABT=weights)
    else:  # A loss that float32 still holds, but not the squares of its slopes.
        now = now._replace(mtp_loss_weight=np.float32(1e30))
    after, metrics, _ = step(start(), batch, now)
    assert float(metrics["skipped"]) == 1
    assert np.isfinite(metrics["loss"]) == (where == "gradient")
    assert not np.isfinite(metrics["grad_norm"])
    assert int(after.step) == 1
    before = start()
    chex.assert_trees_all_equal(after.replace(step=before.step), before)


def test_a_batch_without_anything_to_learn_has_no_loss(step: Step) -> None:
    batch = BATCH._replace(loss_weight_ABT=np.zeros_like(BATCH.loss_weight_ABT))
    after, metrics, _ = step(start(), batch, values())
    assert (float(metrics["main_loss"]), float(metrics["mtp_loss"]), float(metrics["skipped"])) == (0, 0, 0)
    assert np.isfinite(metrics["grad_norm"])
    assert int(after.step) == 1
