"""Model FLOPs utilisation worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_jax.config import Config, ModelConfig, TrainConfig
from dsv3_jax.train.logging import speed

PUBLISHED = Config(
    model=dataclasses.replace(ModelConfig(), num_nextn_predict_layers=0, max_position_embeddings=8192),
    train=TrainConfig(sequence_length=4096),
)


def model_flops(config: Config, tokens_per_second: float) -> float:
    return speed(config, tokens_per_second, 1, "cpu")["model_flops_per_second"]


def mfu(num_devices: int, device_kind: str) -> float:
    return speed(PUBLISHED, 1e6, num_devices, device_kind)["mfu"]


def test_the_published_model_by_hand() -> None:
    """Section 4.2's parameters and causal attention of 61 layers, 128 heads of 192 and 128, on 2048 of H100's tensor cores."""
    per_token = 6 * 36.6e9 + 6 * 61 * 128 * (192 + 128) * 4097 / 2
    assert model_flops(PUBLISHED, 1e6) == pytest.approx(1e6 * per_token, rel=2e-3)
    found = mfu(2048, "NVIDIA H100 80GB HBM3")
    assert found == pytest.approx(1e6 * per_token / (2048 * 989.5e12), rel=2e-3)
    assert found == pytest.approx(2 * mfu(4096, "NVIDIA H200"))


def test_a_longer_sequence_costs_more_attention_and_nothing_else() -> None:
    longer = dataclasses.replace(PUBLISHED, train=TrainConfig(sequence_length=8192))
    more = 6 * 61 * 128 * (192 + 128) * (8193 - 4097) / 2
    assert model_flops(longer, 1.0) - model_flops(PUBLISHED, 1.0) == pytest.approx(more)


def test_nothing_recomputed_is_counted() -> None:
    again = dataclasses.replace(PUBLISHED, model=dataclasses.replace(PUBLISHED.model, remat="full"))
    assert PUBLISHED.model.remat == "none"
    assert model_flops(again, 1.0) == model_flops(PUBLISHED, 1.0)


def test_a_row_says_what_is_known() -> None:
    unknown = speed(PUBLISHED, 10.0, 1, "cpu")
    assert unknown == {"tokens_per_second": 10.0, "model_flops_per_second": model_flops(PUBLISHED, 10.0)}
    known = speed(PUBLISHED, 10.0, 4, "TPU v5")
    assert known.keys() == {"tokens_per_second", "mfu"}
    assert known["tokens_per_second"] == 10.0
    assert known["mfu"] == pytest.approx(model_flops(PUBLISHED, 10.0) / (4 * 459e12))
