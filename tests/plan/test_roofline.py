"""FLOPs against the shapes of the parameters, and a roofline worked out by hand."""

from __future__ import annotations

import dataclasses
import math

import jax
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.plan.collectives import Collective
from dsv3_jax.plan.roofline import CHIPS, Chip, Roofline, flops_per_token, roofline
from tests.model.tiny import CONFIG, DENSE_ONLY, MOE_ONLY, abstract_variables

PUBLISHED = ModelConfig()


def multiplied_parameters(config: ModelConfig) -> float:
    """Parameters that a token is multiplied with, from the shapes of the variables: each matrix once, the head again
    for every MTP depth, of the routed experts the chosen share."""
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_variables(config)["params"]):
        names = [key.key for key in path]
        used = 1.0
        if names[0] == "embed" or names[-1] == "scale":
            used = 0.0
        elif names[0] == "lm_head":
            used = 1.0 + config.num_nextn_predict_layers
        elif "experts" in names:
            used = config.num_experts_per_tok / config.n_routed_experts
        total += used * math.prod(leaf.shape)
    return total


@pytest.mark.parametrize(
    "config",
    [
        PUBLISHED,
        CONFIG,
        DENSE_ONLY,
        MOE_ONLY,
        dataclasses.replace(CONFIG, q_lora_rank=None, n_shared_experts=0),
        dataclasses.replace(CONFIG, n_shared_experts=2, num_nextn_predict_layers=0),
    ],
)
def test_flops_are_six_a_parameter_and_attention(config: ModelConfig) -> None:
    """Attention is counted here pair by pair: a score and a weighted value for each head, query and key."""
    T = 5
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    pair = 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    seen = sum(1 for query in range(T) for key in range(T) if key <= query)
    found = flops_per_token(config, T)
    products = 6 * multiplied_parameters(config)
    assert found.causal == pytest.approx(products + 3 * layers * pair * seen / T, rel=1e-12)
    assert found.non_causal == pytest.approx(products + 3 * layers * pair * T, rel=1e-12)


def test_flops_of_the_published_model() -> None:
    """Section 4.2's 37B activated parameters, less an embedding that is not multiplied; attention multiplied out."""
    main = dataclasses.replace(PUBLISHED, num_nextn_predict_layers=0)
    found = flops_per_token(main, 4096)
    attention = 6 * 61 * 128 * (192 + 128) * 4096
    assert found.non_causal - attention == pytest.approx(6 * 36.6e9, rel=2e-3)
    assert found.causal == pytest.approx(6 * 36.6e9 + attention / 2, rel=2e-3)
    # An MTP depth adds a block (187,105,280 of attention, 1,835,008 of router, 9 experts), eh_proj, and the head again.
    depth = 187_105_280 + 1_835_008 + 9 * 3 * 7168 * 2048 + 2 * 7168**2 + 129280 * 7168
    assert flops_per_token(PUBLISHED, 1).causal - flops_per_token(main, 1).causal == 6 * (depth + 128 * 320)


CHIP = Chip(bf16_flops=1000.0, hbm_bytes=100.0, hbm_gib=1.0, ici_bytes=10.0, dcn_bytes=2.0)
SENT = [
    Collective("all-gather", "fsdp", 30, 1, False),
    Collective("all-reduce", "data", 8, 1, False),
    Collective("ragged-all-to-all", "expert", 15, 2, True),
    Collective("all-reduce", "data+fsdp", 2, 1, False),
    Collective("all-gather", "?", 5, 1, False),
]


def worked(**changes: object) -> Roofline:
    arguments = {"flops_per_token": 60.0, "tokens_per_device": 50.0, "remat": "none", "hbm_bytes": 250.0, "collectives": SENT}
    return roofline(**{**arguments, "chip": CHIP, **changes})  # type: ignore[arg-type]


def test_roofline_by_hand() -> None:
    """3000 FLOPs at 1000, 250 bytes at 100, and 60 bytes at 10: the links are the limit."""
    assert worked() == Roofline(compute_seconds=3.0, hbm_seconds=2.5, link_seconds=6.0, step_seconds=6.0)


def test_slices_send_along_the_data_axis_over_the_network() -> None:
    """50 bytes stay on ICI, and 10 go at 2; with less on it the network is not the limit."""
    assert worked(dcn_axis="data").link_seconds == 5.0
    assert worked(dcn_axis="data", collectives=SENT[1:4]).link_seconds == 5.0
    assert worked(dcn_axis="data", collectives=SENT[:1] + SENT[3:]).link_seconds == 3.5
    assert worked(collectives=[]).link_seconds == 0.0


@pytest.mark.parametrize(("remat", "seconds"), [("none", 3.0), ("save_latents", 4.0), ("full", 4.0)])
def test_recomputing_adds_a_forward(remat: str, seconds: float) -> None:
    assert worked(remat=remat).compute_seconds == pytest.approx(seconds)


@pytest.mark.parametrize(("changes", "limit"), [({"flops_per_token": 600.0}, 30.0), ({"hbm_bytes": 2500.0}, 25.0)])
def test_the_slowest_is_the_step(changes: dict[str, float], limit: float) -> None:
    assert worked(**changes).step_seconds == limit


def test_chips_are_what_the_vendor_states() -> None:
    """Ratios of the data sheets, a whole chip at a time: TFLOP/s, HBM and both directions of ICI in GB/s, network in Gbit/s."""
    sheets = {
        "v5p": (459, 2765, 1200, 50),
        "v5e": (197, 819, 400, 25),
        "v6e": (918, 1638, 800, 100),
        "tpu7x": (2307, 7380, 1200, 100),
    }
    assert CHIPS.keys() == sheets.keys()
    for name, chip in CHIPS.items():
        n = chip.devices_per_chip
        stated = (
            n * chip.bf16_flops / 1e12,
            n * chip.hbm_bytes / 1e9,
            2 * n * chip.ici_bytes / 1e9,
            8 * n * chip.dcn_bytes / 1e9,
        )
        assert stated == pytest.approx(sheets[name])
    assert {name: chip.hbm_gib for name, chip in CHIPS.items()} == {"v5p": 95.74, "v5e": 15.75, "v6e": 31.25, "tpu7x": 94.75}
