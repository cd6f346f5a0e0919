"""The schedules of a run against the published breakpoints, and against what adding up step by step gives."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest

from dsv3_jax.config import Config, OptimizerConfig, TrainConfig
from dsv3_jax.config.cli import load_config
from dsv3_jax.config.run import Schedules

PUBLISHED = load_config("configs/v3_671b.py")
TRILLION = 10**12


def schedules(optimizer: dict[str, Any], train: dict[str, Any], alpha: float = 1e-4) -> Schedules:
    return Config(
        model=dataclasses.replace(Config().model, aux_loss_alpha=alpha),
        optimizer=OptimizerConfig(**optimizer),
        train=TrainConfig(**{"batch_size": 4, "sequence_length": 10, "steps": 100, **train}),
    ).schedules


def step_at(tokens: float) -> int:
    """The first published step that begins with at least so many tokens seen."""
    return PUBLISHED.schedules.steps_for(tokens)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, 2.2e-4 / 2000),
        (1 * TRILLION, 2.2e-4),
        (9.9999 * TRILLION, 2.2e-4),
        (10 * TRILLION, 2.2e-4),
        (10 * TRILLION + 4.3 * TRILLION / 2, (2.2e-4 + 2.2e-5) / 2),
        (10 * TRILLION + 4.3 * TRILLION / 4, 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi / 4)) / 2),
        (14.3 * TRILLION, 2.2e-5),
        (14.632 * TRILLION, 2.2e-5),
        (14.633 * TRILLION, 7.3e-6),
        (14.7999 * TRILLION, 7.3e-6),
    ],
)
def test_the_published_learning_rate(tokens: float, expected: float) -> None:
    np.testing.assert_allclose(PUBLISHED.schedules.learning_rate(step_at(tokens)), expected, rtol=2e-4)


def test_the_published_warm_up_takes_2000_steps() -> None:
    rates = [PUBLISHED.schedules.learning_rate(step) for step in (0, 999, 1999, 2000)]
    np.testing.assert_allclose(rates, [2.2e-4 / 2000, 1.1e-4, 2.2e-4, 2.2e-4], rtol=1e-12)


def test_the_published_batches() -> None:
    of_run = PUBLISHED.schedules
    assert of_run.batch_size(0) == 3072
    end = step_at(469e9)
    assert of_run.batch_size(end) == of_run.batch_size(end + 10**5) == 15360
    assert 15360 - 2 * PUBLISHED.train.batch_ramp_unit <= of_run.batch_size(end - 1) < 15360
    half = of_run.batch_size(step_at(469e9 / 2))
    assert abs(half - (3072 + 15360) / 2) <= PUBLISHED.train.batch_ramp_unit
    sizes = [of_run.batch_size(step) for step in range(end + 1)]
    assert all(later >= earlier for earlier, later in itertools.pairwise(sizes))
    assert of_run.tokens_before(PUBLISHED.train.steps - 1) < 14.8 * TRILLION <= of_run.tokens_before(PUBLISHED.train.steps)


@pytest.mark.parametrize(
    ("tokens", "gamma", "lambda_"),
    [(0, 0.001, 0.3), (9.99 * TRILLION, 0.001, 0.3), (10 * TRILLION, 0.001, 0.1), (14.29 * TRILLION, 0.001, 0.1),
     (14.3 * TRILLION, 0.0, 0.1), (14.79 * TRILLION, 0.0, 0.1)],
)  # fmt: skip
def test_the_published_gamma_and_lambda(tokens: float, gamma: float, lambda_: float) -> None:
    values = PUBLISHED.schedules.at(step_at(tokens))
    assert values.bias_update_speed == np.float32(gamma)
    assert values.mtp_loss_weight == np.float32(lambda_)
    assert values.aux_loss_alpha == np.float32(1e-4)
    assert {array.dtype for array in values[:4]} == {np.dtype(np.float32)}
    assert values.micro_batches.dtype == np.int32


def test_rows_and_tokens_add_up_step_by_step() -> None:
    train = {
        "batch_size": 20,
        "initial_batch_size": 4,
        "micro_batch_size": 2,
        "batch_ramp_tokens": 3000,
        "batch_ramp_unit": 4,
        "steps": 60,
    }
    of_run = schedules({}, train)
    rows = 0
    for step in range(60):
        done = min(rows * 10 / 3000, 1)
        expected = 20 if done >= 1 else 4 + math.floor(16 * done / 4) * 4
        assert of_run.batch_size(step) == expected
        assert of_run.rows_before(step) == rows
        assert of_run.tokens_before(step) == rows * 10
        assert of_run.at(step).micro_batches == expected // 2
        rows += expected
    assert {of_run.batch_size(step) for step in range(60)} == {4, 8, 12, 16, 20}
    for tokens in range(0, 5000, 37):
        steps = of_run.steps_for(tokens)
        assert of_run.tokens_before(steps) >= tokens
        assert steps == 0 or of_run.tokens_before(steps - 1) < tokens


def test_a_plain_run_is_a_warm_up_and_one_cosine_to_its_end() -> None:
    of_run = schedules({"learning_rate": 1.0, "final_learning_rate": 0.1, "warmup_steps": 20}, {"steps": 100})
    rates = [of_run.learning_rate(step) for step in range(100)]
    expected = [
        (step + 1) / 20 if step < 20 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step + 1 - 20) / 80)) / 2 for step in range(100)
    ]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)
    assert rates[-1] == pytest.approx(0.1)


def test_a_run_no_longer_than_its_warm_up_ends_within_it() -> None:
    of_run = schedules({"learning_rate": 1.0, "warmup_steps": 200, "final_learning_rate": 0.1}, {"steps": 100})
    assert of_run.learning_rate(99) == 0.5


def test_later_values_hold_from_their_tokens_on() -> None:
    after = {"mtp_loss_weight_after": ((80, 0.2), (200, 0.0)), "aux_loss_alpha_after": ((41, 0.5),)}
    of_run = schedules({"learning_rate_after": ((120, 7e-6),)}, after, alpha=0.25)
    values = [of_run.at(step) for step in range(6)]  # 40 tokens a step
    assert [float(value.mtp_loss_weight) for value in values] == pytest.approx([0.3, 0.3, 0.2, 0.2, 0.2, 0.0])
    assert [float(value.aux_loss_alpha) for value in values] == pytest.approx([0.25, 0.25, 0.5, 0.5, 0.5, 0.5])
    assert [float(value.learning_rate) == np.float32(7e-6) for value in values] == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"micro_batch_size": 3}, r"train.batch_size is 4, no multiple of train.micro_batch_size \(3\)"),
        ({"micro_batch_size": 8}, r"train.micro_batch_size is 8; it must lie in 1..train.batch_size \(4\)"),
        ({"initial_batch_size": 2}, "a ramp of the batch takes both"),
        ({"batch_ramp_tokens": 2}, "a ramp of the batch takes both"),
        ({"initial_batch_size": 2, "batch_ramp_tokens": 9}, r"train.initial_batch_size is 2, no multiple of train.micro_batch"),
        ({"mtp_loss_weight_after": ((20, 0.1), (10, 0.2))}, "write pairs of tokens and value, the tokens growing"),
        ({"bias_update_speed_after": ((20, -0.1),)}, "its values cannot be negative"),
    ],
)
def test_contradictions_are_refused(train: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"batch_size": 4, **train})


def test_later_values_come_back_from_json_and_hash_alike() -> None:
    config = dataclasses.replace(PUBLISHED)
    again = Config.from_json(config.to_json())
    assert again == config
    assert hash(again.train) == hash(config.train)
