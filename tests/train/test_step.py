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
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.train.optimizer import learning_rate_schedule, make_optimizer
from dsv3_jax.train.state import TrainState, state_of
from dsv3_jax.train.step import heldout_loss, train_step
from tests.model.tiny import CONFIG, random_tokens, random_variables
from tests.tolerances import TOLERANCE

B, T = 4, 24
GAMMA, LAMBDA = 0.01, 0.3
RUN = Config(
    model=CONFIG,
    # Clips from the first step on, so that a norm taken after clipping would show.
    optimizer=OptimizerConfig(
        learning_rate=3e-3, final_learning_rate=1e-3, warmup_steps=2, clip_norm=0.1, moment_dtype="float32"
    ),
    train=TrainConfig(steps=20, batch_size=B, sequence_length=T, mtp_loss_weight=LAMBDA, bias_update_speed=GAMMA),
)
TOKENS_BX = random_tokens(B, T + 1)
TOKENS_BT, TARGET_BT = TOKENS_BX[:, :-1], TOKENS_BX[:, 1:]
METRICS = {"loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm", "learning_rate", "max_violation"}

Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def start(config: Config = RUN) -> TrainState:
    return jax.tree.map(jnp.asarray, state_of(config, random_variables(config.model)))


@pytest.fixture(scope="module")
def step() -> Step:
    """The step as train.py compiles it."""
    return jax.jit(functools.partial(train_step, config=RUN), donate_argnums=0)


@pytest.fixture(scope="module")
def first(step: Step) -> tuple[TrainState, dict[str, jax.Array]]:
    """The first step's result."""
    return step(start(), TOKENS_BT, TARGET_BT)


def loads(variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """Tokens per expert, the main model's counted from its routes."""
    model = DeepSeekV3(CONFIG)
    output = jax.jit(functools.partial(model.apply, mtp=True, hidden_states=True))(variables, TOKENS_BT)
    routes_LX = np.asarray(output.routes).reshape(CONFIG.num_moe_layers, -1)
    counted = {"moe_layers": np.stack([np.bincount(route, minlength=CONFIG.n_routed_experts) for route in routes_LX])}
    return counted | {name: np.asarray(output.load[name]) for name in ("mtp_0", "mtp_1")}


def objective(params: Any, router: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The objective of the report over whole logits."""
    output = DeepSeekV3(CONFIG).apply({"params": params, "router": router}, TOKENS_BT, mtp=True)

    def cross_entropy(logits_BTV: jax.Array, target_BT: np.ndarray) -> jax.Array:
        return -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), target_BT[..., None], axis=-1).mean()

    main = cross_entropy(output.logits, TARGET_BT)
    mtp = (cross_entropy(output.mtp_logits[0], TARGET_BT[:, 1:]) + cross_entropy(output.mtp_logits[1], TARGET_BT[:, 2:])) / 2
    loss = main + LAMBDA * mtp + CONFIG.aux_loss_alpha * output.balance_loss
    return loss, {"loss": loss, "main_loss": main, "mtp_loss": mtp, "balance_loss": output.balance_loss}


def test_metrics_and_gradient_are_those_of_the_objective_written_out(first: tuple) -> None:
    after, metrics = first
    before = start()
    grads, expected = jax.jit(jax.grad(objective, has_aux=True))(before.params, before.router)
    norm = math.sqrt(sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in jax.tree.leaves(grads)))
    assert norm > 2 * RUN.optimizer.clip_norm
    expected |= {"grad_norm": norm, "learning_rate": RUN.optimizer.learning_rate / 2}
    assert metrics.keys() == METRICS
    for name, value in metrics.items():
        chex.assert_shape(value, ())
        chex.assert_type(value, jnp.float32)
        assert np.isfinite(value), name
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    # The first moment after one step from zero is a tenth of the clipped gradient.
    adam = next(part for part in after.optimizer if isinstance(part, optax.ScaleByAdamState))
    clipped = jax.tree.map(lambda g: 0.1 * g * RUN.optimizer.clip_norm / norm, grads)
    errors = jax.tree.map(lambda found, g: float(jnp.linalg.norm(found - g) / jnp.linalg.norm(g)), adam.mu, clipped)
    assert max(jax.tree.leaves(errors)) < 1e-4, errors


def test_parameters_move_by_the_updates_of_the_optimizer(first: tuple) -> None:
    after, _ = first
    before = start()
    assert int(after.step) == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    # Adam's update from its own moments after the step, the decay of the matrices, and the rate of the first step.
    adam = next(part for part in after.optimizer if isinstance(part, optax.ScaleByAdamState))
    rate = float(learning_rate_schedule(RUN.optimizer, RUN.train.steps)(0))

    def moved(path: tuple, old: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        decay = 0 if path[-1].key == "scale" else RUN.optimizer.weight_decay
        return old - rate * ((m / 0.1) / (jnp.sqrt(v / 0.05) + RUN.optimizer.epsilon) + decay * old)

    expected = jax.tree_util.tree_map_with_path(moved, before.params, adam.mu, adam.nu)
    chex.assert_trees_all_close(after.params, expected, rtol=1e-4, atol=1e-6)


def test_biases_move_by_gamma_against_the_load_and_the_violation_is_the_largest(first: tuple) -> None:
    after, metrics = first
    before = start()
    load = loads(before.variables)
    violation = max((counts.max(-1) / counts.mean(-1) - 1).max() for counts in load.values())
    np.testing.assert_allclose(metrics["max_violation"], violation, rtol=1e-6)
    assert violation > 0.5
    signs = {name: np.sign(counts - counts.mean(-1, keepdims=True)) for name, counts in load.items()}
    assert {-1, 1} <= {sign for array in signs.values() for sign in array.ravel()}
    for name, biases in before.router.items():
        old, new = jax.tree.leaves(biases), jax.tree.leaves(after.router[name])
        assert (len(old), new[0].dtype) == (1, jnp.float32)
        np.testing.assert_array_equal(new[0], np.asarray(old[0]) - np.float32(GAMMA) * signs[name].astype(np.float32))


def test_the_loss_falls_on_a_repeated_batch_the_same_to_the_bit_each_time(step: Step) -> None:
    runs = []
    for _ in range(2):
        state, losses = start(), []
        for _ in range(RUN.train.steps):
            state, metrics = step(state, TOKENS_BT, TARGET_BT)
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
        step(before, TOKENS_BT, TARGET_BT)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.router, before.optimizer)))


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights() -> None:
    config = dataclasses.replace(
        RUN,
        model=dataclasses.replace(CONFIG, dtype="bfloat16"),
        optimizer=dataclasses.replace(RUN.optimizer, moment_dtype="bfloat16"),
    )
    before = start(config)
    after, metrics = jax.jit(functools.partial(train_step, config=config))(before, TOKENS_BT, TARGET_BT)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype("float32")}
    _, expected = objective(before.params, before.router)
    for name in ("loss", "main_loss", "mtp_loss"):
        np.testing.assert_allclose(metrics[name], expected[name], **TOLERANCE["bfloat16"], err_msg=name)


def test_without_an_moe_layer_nothing_is_violated() -> None:
    model = dataclasses.replace(CONFIG, num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=0)
    config = dataclasses.replace(RUN, model=model)
    after, metrics = jax.jit(functools.partial(train_step, config=config))(start(config), TOKENS_BT, TARGET_BT)
    assert (float(metrics["max_violation"]), float(metrics["mtp_loss"]), after.router) == (0, 0, {})
    assert float(metrics["loss"]) == float(metrics["main_loss"])


def test_heldout_loss_sums_the_weighted_tokens() -> None:
    variables = random_variables()
    weight_BT = np.random.default_rng(3).integers(0, 2, (B, T)).astype(np.float32)
    logits_BTV = np.asarray(DeepSeekV3(CONFIG).apply(variables, TOKENS_BT).logits, np.float64)
    log_sum_BT = np.log(np.exp(logits_BTV).sum(-1))
    loss_BT = log_sum_BT - np.take_along_axis(logits_BTV, TARGET_BT[..., None], axis=-1)[..., 0]
    found = jax.jit(functools.partial(heldout_loss, config=CONFIG))(variables, TOKENS_BT, TARGET_BT, weight_BT)
    chex.assert_shape(found, ())
    chex.assert_type(found, jnp.float32)
    np.testing.assert_allclose(found, np.sum(weight_BT * loss_BT), rtol=1e-5)
    assert 0 < weight_BT.mean() < 1


def test_the_optimizer_of_the_step_is_that_of_the_state() -> None:
    chex.assert_trees_all_equal_structs(start().optimizer, make_optimizer(RUN).init(random_variables()["params"]))
