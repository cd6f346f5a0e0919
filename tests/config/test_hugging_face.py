"""`ModelConfig` against the `config.json` of the published models, in both spellings, and what it refuses.

The five files are written out below as facts; nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from dsv3_jax.config import ModelConfig, RopeScaling

_FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
_AUTO_MAP = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModel": "modeling_deepseek.DeepseekV3Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}

V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": _AUTO_MAP,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": _FP8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
R1: dict[str, Any] = {**V3, "transformers_version": "4.46.3"}
V3_1: dict[str, Any] = {**V3, "quantization_config": {**_FP8, "scale_fmt": "ue8m0"}, "transformers_version": "4.44.2"}
MOONLIGHT_16B_A3B: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": _AUTO_MAP,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11264,
    "kv_lora_rank": 512,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}
KIMI_K2: dict[str, Any] = {
    **V3,
    "model_type": "kimi_k2",
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "transformers_version": "4.48.3",
    "vocab_size": 163840,
}
PUBLISHED = {"V3": V3, "R1": R1, "V3.1": V3_1, "Moonlight": MOONLIGHT_16B_A3B, "Kimi-K2": KIMI_K2}

_DEEPSEEK_V3 = ModelConfig(
    vocab_size=129280,
    hidden_size=7168,
    num_hidden_layers=61,
    num_nextn_predict_layers=1,
    first_k_dense_replace=3,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    aux_loss_alpha=0.001,
    rope_theta=10000.0,
    rope_scaling=RopeScaling(40.0, 4096, 32.0, 1.0, 1.0, 1.0),
    max_position_embeddings=163840,
    rms_norm_eps=1e-6,
    initializer_range=0.02,
    bos_token_id=0,
    eos_token_id=1,
    dtype="bfloat16",
    param_dtype="bfloat16",
)
_MOONLIGHT = dataclasses.replace(
    _DEEPSEEK_V3,
    vocab_size=163840,
    hidden_size=2048,
    num_hidden_layers=27,
    num_nextn_predict_layers=0,
    first_k_dense_replace=1,
    num_attention_heads=16,
    q_lora_rank=None,
    intermediate_size=11264,
    moe_intermediate_size=1408,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=2.446,
    rope_theta=50000.0,
    rope_scaling=None,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    bos_token_id=163584,
    eos_token_id=163585,
)
_KIMI = dataclasses.replace(
    _DEEPSEEK_V3,
    vocab_size=163840,
    num_nextn_predict_layers=0,
    first_k_dense_replace=1,
    num_attention_heads=64,
    n_routed_experts=384,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=2.827,
    rope_theta=50000.0,
    rope_scaling=RopeScaling(32.0, 4096, 1.0, 1.0, 1.0, 1.0),
    max_position_embeddings=131072,
    bos_token_id=163584,
    eos_token_id=163585,
)


_DEEPSEEK_V3_1 = dataclasses.replace(_DEEPSEEK_V3, scale_fmt="ue8m0")


def _newer_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """The same file as transformers 5 writes it."""
    renamed = {"num_nextn_predict_layers": "num_mtp_layers", "torch_dtype": "dtype"}
    newer = {renamed.get(name, name): value for name, value in config.items() if name not in ("rope_scaling", "rope_theta")}
    scaling = dict(config["rope_scaling"] or {})
    newer["rope_parameters"] = {
        "rope_theta": config["rope_theta"],
        "rope_type": scaling.pop("type", "default"),
        **scaling,
    }
    return newer


@pytest.mark.parametrize(
    ("file", "expected"),
    [(V3, _DEEPSEEK_V3), (R1, _DEEPSEEK_V3), (V3_1, _DEEPSEEK_V3_1), (MOONLIGHT_16B_A3B, _MOONLIGHT), (KIMI_K2, _KIMI)],
    ids=PUBLISHED.keys(),
)
def test_published_files_in_both_spellings(file: dict[str, Any], expected: ModelConfig) -> None:
    from_json = json.loads(json.dumps(file))
    assert ModelConfig.from_hf(from_json) == expected
    assert ModelConfig.from_hf(_newer_spelling(from_json)) == expected
    assert from_json == file, "reading must not change the dict it is given"


@pytest.mark.parametrize("name", PUBLISHED)
def test_writing_gives_back_the_published_file(name: str) -> None:
    file = PUBLISHED[name]
    written = json.loads(json.dumps(ModelConfig.from_hf(file).to_hf()))
    # The format of FP8 scales is part of their description.
    assert ModelConfig.from_hf(written) == dataclasses.replace(ModelConfig.from_hf(file), scale_fmt=None)
    # What our file leaves out: code of the repository, runtime hints, and the description of FP8 tensors.
    left_out = {"auto_map", "ep_size", "pretraining_tp", "transformers_version", "quantization_config"}
    added = {"rope_interleave"}
    assert set(written) - added == set(file) - left_out
    for key in set(written) - added - {"model_type"}:
        assert written[key] == file[key], key
    assert written["model_type"] == "deepseek_v3"
    assert written["architectures"] == ["DeepseekV3ForCausalLM"]


def test_softmax_scale_of_the_published_model() -> None:
    config = ModelConfig.from_hf(V3)
    assert config.softmax_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2, rel=1e-12)
    assert config.softmax_scale == pytest.approx(0.135234, abs=5e-7)


def test_kimi_also_loads_under_the_model_type_its_authors_suggest() -> None:
    assert ModelConfig.from_hf({**KIMI_K2, "model_type": "deepseek_v3"}) == ModelConfig.from_hf(KIMI_K2)


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    """The defaults of transformers 5.23's `DeepseekV3Config`, which is V3 before context extension."""
    expected = dataclasses.replace(
        _DEEPSEEK_V3,
        rope_scaling=None,
        max_position_embeddings=4096,
        aux_loss_alpha=ModelConfig().aux_loss_alpha,
        dtype=ModelConfig().dtype,
        param_dtype=ModelConfig().param_dtype,
    )
    assert ModelConfig.from_hf({"model_type": "deepseek_v3"}) == expected


@pytest.mark.parametrize("rank", [None, 0])
def test_no_query_latent_in_either_spelling(rank: int | None) -> None:
    config = ModelConfig.from_hf({**V3, "q_lora_rank": rank})
    assert config.q_lora_rank is None
    assert config.to_hf()["q_lora_rank"] is None


def test_float_type_and_end_tokens_are_carried() -> None:
    config = ModelConfig.from_hf({**V3, "torch_dtype": "float32", "eos_token_id": [1, 5], "bos_token_id": None})
    assert (config.dtype, config.param_dtype) == ("float32", "float32")
    assert config.eos_token_ids == [1, 5]
    written = config.to_hf()
    assert (written["torch_dtype"], written["eos_token_id"], written["bos_token_id"]) == ("float32", [1, 5], None)


def test_written_dtype_is_that_of_the_parameters() -> None:
    config = dataclasses.replace(_DEEPSEEK_V3, dtype="bfloat16", param_dtype="float32")
    assert config.to_hf()["torch_dtype"] == "float32"


def test_more_dense_layers_than_layers_means_all_dense() -> None:
    config = ModelConfig.from_hf({**V3, "num_hidden_layers": 2})
    assert (config.first_k_dense_replace, config.num_moe_layers) == (2, 0)


def test_yarn_defaults_are_those_of_the_reference() -> None:
    scaling = ModelConfig.from_hf({**V3, "rope_scaling": {"type": "yarn", "factor": 4, "mscale_all_dim": 0}}).rope_scaling
    assert scaling == RopeScaling(4.0, 163840, 32.0, 1.0, mscale=None, mscale_all_dim=None)
    written = ModelConfig.from_hf({**V3, "rope_scaling": {"type": "yarn", "factor": 4}}).to_hf()["rope_scaling"]
    assert written == {
        "type": "yarn",
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 163840,
    }


@pytest.mark.parametrize("scaling", [{"type": "default"}, {"rope_type": "default", "factor": 4}, {}, None])
def test_plain_rotary_embedding(scaling: dict[str, Any] | None) -> None:
    assert ModelConfig.from_hf({**V3, "rope_scaling": scaling}).rope_scaling is None


_YARN = V3["rope_scaling"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": "deepseek_v2"}, "model_type is 'deepseek_v2'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"topk_method": "group_limited_greedy"}, "topk_method is 'group_limited_greedy'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_interleave": False}, "rope_interleave is False"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type is 'linear'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "rope type is 'dynamic'"),
        ({"rope_scaling": {"type": "yarn"}}, "factor is missing"),
        ({"rope_scaling": {**_YARN, "attention_factor": 1.5}}, "attention_factor .* is 1.5"),
        ({"rope_scaling": {**_YARN, "truncate": False}}, "truncate .* is False"),
        ({"rope_scaling": {**_YARN, "factor": "40"}}, "factor is '40'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "full_attention is an object"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 8}}, "factor is 8, but it is also given as 40"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 10000, but .* 500000.0"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
        ({"num_mtp_layers": 2}, "num_nextn_predict_layers is 1 but num_mtp_layers"),
        ({"dtype": "float32"}, "torch_dtype is 'bfloat16' but dtype"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"torch_dtype": 16}, "torch_dtype is 16; use the name of a dtype, such as bfloat16"),
        ({"torch_dtype": {"": "bfloat16"}}, "torch_dtype is .*; use the name of a dtype"),
        ({"routed_scaling_factor": math.inf}, "routed_scaling_factor is inf; use a finite number"),
        ({"rope_theta": math.inf}, "rope_theta is inf; use a finite number"),
        ({"rope_theta": 10**400}, "rope_theta is 10+; use a finite number"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan; use a finite number"),
        ({"eos_token_id": []}, "eos_token_id is empty"),
        ({"hidden_size": "7168"}, "hidden_size is '7168'"),
        ({"n_group": None}, "n_group is None"),
        ({"n_routed_experts": True}, "n_routed_experts is True"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"n_routed_experts": 250}, r"n_routed_experts \(250\) is not a multiple of n_group \(8\)"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**V3, **change})


def test_a_config_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="no model_type"):
        ModelConfig.from_hf({"hidden_size": 7168})
