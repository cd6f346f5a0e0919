"""FLOPs a token against the shapes of the parameters."""

from __future__ import annotations

import dataclasses
import math

import jax
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.flops import flops_per_token
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
