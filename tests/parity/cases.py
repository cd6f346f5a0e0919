"""The small models on which `dsv3_jax` is compared with transformers: each a published `config.json` in miniature.

Between them they cover every choice that the architecture leaves to its configuration, and each is drawn so that
getting one of them wrong shows: YaRN bends the frequencies within the context, temperatures differ from one, widths
share no factor, biases drown scores.
"""

from __future__ import annotations

import dataclasses
from typing import Any

LENGTHS = 1, 7, 300
"""Of the sequences, in tokens."""
GREEDY_TOKENS = 32
"""How far greedy decoding is followed."""

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

# A softmax temperature of its own, and amplitudes of the rotation other than one.
YARN_UNEQUAL = {**YARN, "factor": 8, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.2}
# As other models' files have it: no softmax temperature, and the default amplitude.
YARN_WITHOUT_TEMPERATURES = {key: value for key, value in YARN.items() if not key.startswith("mscale")}

# The published file, key by key, at a size that a test can afford.
PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "kv_lora_rank": 32,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 24,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "float32",
    "use_cache": True,
    "v_head_dim": 16,
    "vocab_size": 96,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration, and what its random checkpoint is drawn from."""

    name: str
    config: dict[str, Any]
    seed: int = 0
    """Of weights and tokens; such that no choice is a near tie and no greedy text ends early, which the tests check."""
    bias_shift: float = 0.0
    """Added to every router bias: -2 makes all biased scores negative."""


def _case(name: str, seed: int = 0, bias_shift: float = 0.0, **changes: Any) -> Case:
    assert changes.keys() <= PUBLISHED.keys(), changes
    heads = changes.get("num_attention_heads", PUBLISHED["num_attention_heads"])
    return Case(name, {**PUBLISHED, "num_key_value_heads": heads, **changes}, seed, bias_shift)


LIVE = (
    _case("published"),
    _case("all_biases_negative", seed=1, bias_shift=-2.0, num_experts_per_tok=6, rope_scaling=YARN_WITHOUT_TEMPERATURES),
    _case(
        "moonlight",
        q_lora_rank=None,
        rope_scaling=None,
        rope_theta=50000.0,
        n_group=1,
        topk_group=1,
        n_routed_experts=12,
        num_experts_per_tok=3,
        n_shared_experts=2,
        routed_scaling_factor=2.446,
        rms_norm_eps=1e-5,
        num_nextn_predict_layers=0,
    ),
    _case(
        "odd_dims",
        seed=2,
        hidden_size=60,
        num_attention_heads=3,
        q_lora_rank=28,
        kv_lora_rank=36,
        qk_nope_head_dim=20,
        qk_rope_head_dim=12,
        v_head_dim=24,
        intermediate_size=52,
        moe_intermediate_size=20,
        n_routed_experts=15,
        n_group=3,
        num_experts_per_tok=5,
        n_shared_experts=2,
        vocab_size=97,
    ),
    _case(
        "raw_gate",
        seed=3,
        norm_topk_prob=False,
        routed_scaling_factor=1.5,
        first_k_dense_replace=0,
        q_lora_rank=None,
        num_hidden_layers=2,
        rope_scaling=YARN_UNEQUAL,
    ),
    _case("two_mtp_depths", num_nextn_predict_layers=2, rope_scaling=None, num_hidden_layers=2),
    _case("all_dense", first_k_dense_replace=2, num_hidden_layers=2, num_nextn_predict_layers=0),
)

# Widths past 128 that are no multiple of it, so that blocks of FP8 scales are cut at both edges.
FP8 = _case(
    "fp8",
    hidden_size=136,
    kv_lora_rank=120,
    q_lora_rank=130,
    moe_intermediate_size=140,
    intermediate_size=150,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=2,
    num_hidden_layers=2,
    vocab_size=64,
)

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "kv_lora_rank": 16,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "num_attention_heads": 2,
    "num_experts_per_tok": 3,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "vocab_size": 64,
}

# What is committed under tests/fixtures: the same choices, fewer numbers.
COMMITTED = (
    _case("published", **_SMALL),
    _case("all_biases_negative", seed=3, bias_shift=-2.0, **_SMALL),
    _case(
        "odd_dims_no_q_lora_one_group",
        seed=2,
        **_SMALL
        | {
            "hidden_size": 30,
            "num_attention_heads": 3,
            "q_lora_rank": None,
            "kv_lora_rank": 18,
            "qk_nope_head_dim": 10,
            "qk_rope_head_dim": 6,
            "v_head_dim": 14,
            "n_routed_experts": 7,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "rope_scaling": None,
            "rope_theta": 50000.0,
            "num_nextn_predict_layers": 0,
            "vocab_size": 61,
        },
    ),
    _case(
        "raw_gate_two_mtp_depths",
        **_SMALL
        | {
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
            "first_k_dense_replace": 0,
            "num_hidden_layers": 2,
            "num_nextn_predict_layers": 2,
            "rope_scaling": YARN_UNEQUAL,
        },
    ),
)
