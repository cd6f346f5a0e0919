"""The gate against one token at a time in numpy, the balance loss, and the bias rule: alone and in training."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from dsv3_jax.model.losses import Batch
from dsv3_jax.model.moe import Router, choose_experts, max_violation, sequence_balance_loss, updated_bias
from dsv3_jax.train.state import TrainState, state_of
from dsv3_jax.train.step import train_step
from tests.model.tiny import CONFIG, assert_gradient, balance_by_sequence, random_tokens, random_variables
from tests.tolerances import TOLERANCE

ONE_GROUP = {"n_group": 1, "topk_group": 1}


# --- The choice ------------------------------------------------------------------------------------------------------


def choose_one(biased_E: list[float], n_group: int, topk_group: int, num_chosen: int) -> list[int]:
    """One token, as section 2.1.2 says it: the best groups by the sum of their two best, then the best experts in them."""
    size = len(biased_E) // n_group
    groups = [range(g * size, (g + 1) * size) for g in range(n_group)]
    if n_group > 1:
        groups.sort(key=lambda group: -sum(sorted(biased_E[e] for e in group)[-2:]))
    allowed = [e for group in groups[:topk_group] for e in group]
    return sorted(allowed, key=lambda e: -biased_E[e])[:num_chosen]


def choose(biased_TE: list[list[float]], n_group: int, topk_group: int, num_chosen: int) -> list[list[int]]:
    """The same of many, by the model."""
    tokens, experts = np.shape(biased_TE)
    config = dataclasses.replace(
        CONFIG, n_routed_experts=experts, n_group=n_group, topk_group=topk_group, num_experts_per_tok=num_chosen
    )
    chosen_BTK = jax.jit(choose_experts, static_argnums=1)(np.float32([biased_TE]), config)
    chex.assert_shape(chosen_BTK, (1, tokens, num_chosen))
    assert chosen_BTK.dtype == jnp.int32
    return chosen_BTK[0].tolist()


@pytest.mark.parametrize(
    ("biased_E", "expected", "if_wrong"),
    [
        pytest.param([0.9, 0.0, 0.5, 0.6], [3, 2], [0, 1], id="best_two_of_a_group_count_not_its_best"),
        pytest.param([-0.1, -0.3, -0.4, -0.5], [0, 1], [2, 3], id="dropped_groups_lose_to_negative_scores"),
        pytest.param([0.2, -0.3, -0.4, 0.1], [0, 1], [0, 2], id="and_to_those_of_mixed_sign"),
    ],
)
def test_choice_by_hand(biased_E: list[float], expected: list[int], if_wrong: list[int]) -> None:
    """Two groups of two, of which one stays; `if_wrong` is what the likely mistake chooses."""
    assert choose_one(biased_E, 2, 1, 2) == expected
    assert choose([biased_E], 2, 1, 2) == [expected] != [if_wrong]


@pytest.mark.parametrize(
    ("experts", "n_group", "topk_group", "num_chosen"),
    [(16, 4, 2, 4), (16, 8, 3, 6), (12, 1, 1, 5), (9, 3, 3, 2), (8, 4, 1, 2), (8, 1, 1, 8)],
)
def test_choice_of_many(experts: int, n_group: int, topk_group: int, num_chosen: int) -> None:
    """Best first; of the second half, shifted by -2, every score is negative."""
    biased_TE = np.random.default_rng(experts).random((120, experts)).astype(np.float32)
    biased_TE[60:] -= 2
    expected = [choose_one(biased_E, n_group, topk_group, num_chosen) for biased_E in biased_TE.tolist()]
    assert choose(biased_TE.tolist(), n_group, topk_group, num_chosen) == expected


# --- The whole gate --------------------------------------------------------------------------------------------------


class Drawn:
    """A gate's inputs: x [2, 9, D], a kernel, biases of which some are far below zero, and a mask of counted tokens."""

    def __init__(self, config: ModelConfig) -> None:
        rng = np.random.default_rng(3)
        D, E = config.hidden_size, config.n_routed_experts
        self.x_BTD = rng.standard_normal((2, 9, D)).astype(np.float32)
        self.kernel_DE = (rng.standard_normal((D, E)) * D**-0.5).astype(np.float32)
        self.bias_E = rng.normal(0, 0.3, E).astype(np.float32)
        self.bias_E[1::4] -= 3
        self.token_mask_BT = np.arange(9) < np.array([[6], [9]])
        self.variables = {"params": {"kernel": self.kernel_DE}, "router": {"e_score_correction_bias": self.bias_E}}

    def scores(self, kernel_DE: np.ndarray | None = None) -> np.ndarray:
        kernel_DE = self.kernel_DE if kernel_DE is None else kernel_DE
        return 1 / (1 + np.exp(-np.float64(self.x_BTD) @ np.float64(kernel_DE)))


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("changes", [{}, ONE_GROUP], ids=["grouped", "one_group"])
def test_gate_token_by_token(changes: dict[str, int], norm_topk_prob: bool) -> None:
    """Chosen by biased score, weighed by the plain one, normalised if asked for, scaled; counted where the mask says so."""
    config = dataclasses.replace(CONFIG, norm_topk_prob=norm_topk_prob, routed_scaling_factor=1.7, **changes)
    drawn = Drawn(config)
    routing = jax.jit(Router(config).apply)(drawn.variables, drawn.x_BTD, drawn.token_mask_BT)
    B, T, K, E = 2, 9, config.num_experts_per_tok, config.n_routed_experts
    chex.assert_shape(list(routing), [(B, T, K), (B, T, K), (E,), ()])
    chex.assert_type(list(routing), [jnp.int32, jnp.float32, jnp.float32, jnp.float32])

    score_BTE, load_E = drawn.scores(), np.zeros(E)
    for b, t in np.ndindex(B, T):
        chosen = choose_one((score_BTE[b, t] + drawn.bias_E).tolist(), config.n_group, config.topk_group, K)
        weights = score_BTE[b, t, chosen]
        weights = 1.7 * (weights / weights.sum() if norm_topk_prob else weights)
        assert routing.chosen_BTK[b, t].tolist() == chosen
        chex.assert_trees_all_close(np.float64(routing.weight_BTK[b, t]), weights, **TOLERANCE["float32"])
        load_E[chosen] += drawn.token_mask_BT[b, t]
    chex.assert_trees_all_equal(np.float64(routing.load_E), load_E)
    assert load_E.sum() == K * drawn.token_mask_BT.sum()


def test_without_a_mask_every_token_counts() -> None:
    drawn = Drawn(CONFIG)
    route = jax.jit(Router(CONFIG).apply)
    everywhere = route(drawn.variables, drawn.x_BTD, np.ones_like(drawn.token_mask_BT))
    chex.assert_trees_all_equal(route(drawn.variables, drawn.x_BTD), everywhere)


def test_the_gate_is_float32_in_a_bfloat16_model() -> None:
    """Kernel and states are bfloat16 numbers; what is made of them is not rounded again, or choices would flip."""
    config = CONFIG.with_dtype("bfloat16")
    drawn = Drawn(config)
    variables = {**drawn.variables, "params": {"kernel": jnp.asarray(drawn.kernel_DE, jnp.bfloat16)}}
    x_BTD = jnp.asarray(drawn.x_BTD, jnp.bfloat16)
    exact = {**drawn.variables, "params": {"kernel": np.float32(variables["params"]["kernel"])}}
    found = jax.jit(Router(config).apply)(variables, x_BTD)
    expected = jax.jit(Router(CONFIG).apply)(exact, np.float32(x_BTD))
    chex.assert_type(found.weight_BTK, jnp.float32)
    chex.assert_trees_all_close(found, expected, **TOLERANCE["float32"])


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_gradient_reaches_the_kernel_and_no_bias(norm_topk_prob: bool) -> None:
    config = dataclasses.replace(CONFIG, norm_topk_prob=norm_topk_prob)
    drawn = Drawn(config)
    dw_BTK = np.random.default_rng(5).standard_normal((2, 9, config.num_experts_per_tok))
    biased_TE = (drawn.scores() + drawn.bias_E).reshape(18, -1).tolist()
    chosen_TK = [choose_one(biased_E, config.n_group, config.topk_group, config.num_experts_per_tok) for biased_E in biased_TE]
    chosen_BTK = np.reshape(chosen_TK, dw_BTK.shape)

    def oracle(kernel_DE: np.ndarray) -> float:
        weight_BTK = np.take_along_axis(drawn.scores(kernel_DE), chosen_BTK, axis=-1)
        weight_BTK = weight_BTK / weight_BTK.sum(-1, keepdims=True) if norm_topk_prob else weight_BTK
        return float(np.sum(dw_BTK * weight_BTK) * config.routed_scaling_factor)

    gradient = jax.jit(jax.grad(lambda v: jnp.sum(dw_BTK * Router(config).apply(v, drawn.x_BTD).weight_BTK)))(drawn.variables)
    assert_gradient(gradient["params"]["kernel"], oracle, drawn.kernel_DE)
    chex.assert_trees_all_equal(gradient["router"], {"e_score_correction_bias": jnp.zeros(config.n_routed_experts)})


def test_fresh_biases_are_zero_in_float32_whatever_the_parameters_are() -> None:
    router, x_BTD = Router(CONFIG.with_dtype("bfloat16")), np.ones((1, 1, CONFIG.hidden_size), np.float32)
    variables = jax.jit(lambda: router.init(jax.random.key(0), x_BTD))()
    bias_E = variables["router"]["e_score_correction_bias"].unbox()
    chex.assert_trees_all_equal(np.asarray(bias_E), np.zeros(CONFIG.n_routed_experts, np.float32))
    assert variables["params"]["kernel"].unbox().dtype == jnp.bfloat16


# --- The balance loss ------------------------------------------------------------------------------------------------


def test_balance_loss_by_sequence() -> None:
    """Unbiased and ungrouped, each sequence over its own counted tokens; and its gradient."""
    drawn = Drawn(CONFIG)
    K = CONFIG.num_experts_per_tok

    @jax.jit
    @jax.value_and_grad
    def loss(kernel_DE: jax.Array, token_mask_BT: jax.Array) -> jax.Array:
        return (
            Router(CONFIG).apply({**drawn.variables, "params": {"kernel": kernel_DE}}, drawn.x_BTD, token_mask_BT).balance_loss
        )

    for token_mask_BT in (drawn.token_mask_BT, np.ones_like(drawn.token_mask_BT)):
        value, gradient = loss(drawn.kernel_DE, token_mask_BT)
        expected = balance_by_sequence(drawn.scores(), token_mask_BT, K)
        assert float(value) == pytest.approx(expected, rel=1e-5)
        assert expected > 1.01
        assert_gradient(gradient, lambda k, c=token_mask_BT: balance_by_sequence(drawn.scores(k), c, K), drawn.kernel_DE)


def test_balance_loss_is_one_without_preference_and_e_over_k_when_all_choose_alike() -> None:
    """Equal scores choose K experts as any others do, whichever they are."""
    token_mask_BT = np.ones((2, 5), bool)
    loss = jax.jit(lambda score_BTE: sequence_balance_loss(score_BTE, token_mask_BT, 2))
    assert float(loss(np.full((2, 5, 8), 0.5, np.float32))) == pytest.approx(1.0)
    # Saturated sigmoids are equal too.
    assert float(loss(np.ones((2, 5, 8), np.float32))) == pytest.approx(1.0)
    alike = np.broadcast_to(np.where(np.arange(8) < 2, np.float32(1), np.float32(1e-6)), (2, 5, 8))
    assert float(loss(alike)) == pytest.approx(4.0, rel=1e-4)


def test_a_sequence_without_counted_tokens_adds_nothing() -> None:
    score_BTE = Drawn(CONFIG).scores()
    token_mask_BT = np.broadcast_to([[True], [False]], (2, 9))
    loss = jax.jit(jax.value_and_grad(sequence_balance_loss), static_argnums=2)
    value, gradient = loss(np.float32(score_BTE), token_mask_BT, 3)
    alone = balance_by_sequence(score_BTE[:1], token_mask_BT[:1], 3)
    assert float(value) == pytest.approx(alone / 2, rel=1e-6)
    assert not np.any(gradient[1])


# --- The bias rule ---------------------------------------------------------------------------------------------------


def test_updated_bias() -> None:
    """Down by the speed above the mean, up below it, still at it; layers apart from one another."""
    bias_LE = np.float32([[0.1, -0.2, 0.3, 0.0], [0.0, 0.0, 0.0, 5.0]])
    load_LE = np.float32([[9.0, 4.0, 1.0, 2.0], [6.0, 6.0, 6.0, 6.0]])
    expected = np.float32([[0.1 - 0.01, -0.2, 0.3 + 0.01, 0.01], [0.0, 0.0, 0.0, 5.0]])
    found = np.asarray(jax.jit(updated_bias)(bias_LE, load_LE, 0.01))
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    assert found[0, 1] == bias_LE[0, 1]
    assert found.dtype == jnp.float32


@pytest.mark.parametrize(
    ("load", "expected"),
    [([2.0, 2.0, 2.0], 0.0), ([6.0, 0.0, 0.0], 2.0), ([[4.0, 2.0, 0.0], [3.0, 2.0, 1.0]], 1.0), ([0.0, 0.0], -1.0)],
)
def test_max_violation(load: list, expected: float) -> None:
    """max load / mean - 1, of the layer where it is largest; -1 (and no NaN) where nothing was counted."""
    assert float(max_violation(jnp.array(load))) == expected


ONE_MOE_LAYER = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
SKEWED = Config(
    model=dataclasses.replace(CONFIG, aux_loss_alpha=0.0, **ONE_MOE_LAYER, **ONE_GROUP),
    optimizer=OptimizerConfig(learning_rate=1e-4, final_learning_rate=1e-4, warmup_steps=0, moment_dtype="float32"),
    train=TrainConfig(steps=200, batch_size=16, sequence_length=32, bias_update_speed=0.001),
)


def skewed_state() -> TrainState:
    """A model whose states have a direction in common (a constant in the embedding), and a gate tilted along it.

    That moves the mean score of expert 0 up by about 0.09 and that of the last expert down by as much, three times as
    far as tokens differ. Two biases part by at most 0.4 in 200 steps of 0.001: enough for this tilt, not for a steep one.
    """
    variables = random_variables(SKEWED.model)
    variables["params"]["embed"]["embedding"] += 1
    block = variables["params"]["moe_layers"]
    gate_LDE, D = block["mlp"]["gate"]["kernel"], SKEWED.model.hidden_size
    gate_LDE[...] = 0.15 * gate_LDE + np.linspace(0.5, -0.5, SKEWED.model.n_routed_experts) / D
    block["post_attention_layernorm"]["scale"][...] = 1
    variables["router"] = jax.tree.map(np.zeros_like, variables["router"])
    return state_of(SKEWED, jax.tree.map(jnp.asarray, variables))


@pytest.mark.slow
def test_bias_rule_evens_out_a_skewed_router_in_training(capsys: pytest.CaptureFixture) -> None:
    """200 steps of the real training step at the published gamma; without the rule, the router stays as skewed as it was."""
    step = jax.jit(functools.partial(train_step, config=SKEWED))

    def violations(with_rule: bool) -> np.ndarray:
        state, seen = skewed_state(), []
        for i in range(SKEWED.train.steps):
            tokens = random_tokens(SKEWED.train.batch_size, SKEWED.train.sequence_length + 1, SKEWED.model, seed=i)
            after, metrics, _ = step(state, Batch.of(tokens[:, :-1], tokens[:, 1:]), SKEWED.schedules.at(i))
            state = after if with_rule else after.replace(router=state.router)
            seen.append(float(metrics["max_violation"]))
        return np.array(seen)

    ruled, free = violations(with_rule=True), violations(with_rule=False)
    with capsys.disabled():
        print(f"\nlargest load violation, mean of 10 steps: {ruled[:10].mean():.2f} -> {ruled[-10:].mean():.2f}", end=", ")
        print(f"without the bias rule {free[:10].mean():.2f} -> {free[-10:].mean():.2f}")
    assert ruled[0] == free[0] > 1.0
    assert free[-10:].mean() > 0.9 * free[0]
    assert ruled[-10:].mean() < 0.3
