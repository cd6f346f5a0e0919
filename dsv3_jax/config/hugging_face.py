"""Fields of `ModelConfig` read from, and written as, the dict of a Hugging Face `config.json`.

The published models and transformers spell some fields differently, and both spellings are read: `rope_theta` +
`rope_scaling` or `rope_parameters`, `torch_dtype` or `dtype`, `num_nextn_predict_layers` or `num_mtp_layers`. The first
of each is written: every reader knows it. An absent key gets the default of transformers' `DeepseekV3Config`; a value that
the architecture here does not have is refused.
"""

from __future__ import annotations

from typing import Any

from dsv3_jax.config.checks import check, check_value

ARCHITECTURE = "DeepseekV3ForCausalLM"
# kimi_k2 is deepseek_v3 under a second name: the same fields, the same tensors, the same architecture.
_MODEL_TYPES = ("deepseek_v3", "kimi_k2")

_INTEGERS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "first_k_dense_replace", "num_attention_heads", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "intermediate_size", "moe_intermediate_size", "n_routed_experts",
    "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "max_position_embeddings",
)  # fmt: skip
_NUMBERS = "routed_scaling_factor", "rms_norm_eps", "initializer_range"

# Fields that change the model and of which one value is implemented.
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "partial_rotary_factor": 1.0,
}
_ONLY_YARN = {"attention_factor": None, "truncate": True, "partial_rotary_factor": 1.0}


def fields_from_hf(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of `ModelConfig` for the dict of a `config.json`; `rope_scaling` as a dict for `RopeScaling`, or None.

    Args:
      config: the dict of the file.
      defaults: values for keys that the file lacks, by field; for `initializer_range` 0.02 is taken, as in transformers.

    Raises:
      ValueError: naming the field, if its value is not implemented, if two spellings of it disagree, or if it is missing
        and has no default.
    """
    _check_supported(config)
    defaults = defaults | {"initializer_range": 0.02}
    fields = {name: _read(config, name, int, defaults[name]) for name in _INTEGERS}
    fields |= {name: _read(config, name, float, defaults[name]) for name in _NUMBERS}
    fields["norm_topk_prob"] = _read(config, "norm_topk_prob", bool, True)
    if "aux_loss_alpha" in config:
        fields["aux_loss_alpha"] = _read(config, "aux_loss_alpha", float)

    # More dense layers than layers: all are dense.
    fields["first_k_dense_replace"] = min(fields["first_k_dense_replace"], fields["num_hidden_layers"])
    heads, kv_heads = fields["num_attention_heads"], config.get("num_key_value_heads")
    check(
        kv_heads is None or kv_heads == heads,
        f"num_key_value_heads is {kv_heads!r}; latent attention has as many as num_attention_heads ({heads})",
    )
    fields["q_lora_rank"] = config.get("q_lora_rank", defaults["q_lora_rank"])
    fields["num_nextn_predict_layers"] = _one_value(config, "num_nextn_predict_layers", "num_mtp_layers", default=1)
    fields["bos_token_id"], fields["eos_token_id"] = config.get("bos_token_id", 0), config.get("eos_token_id", 1)
    fields["rope_theta"], fields["rope_scaling"] = _rope(config, fields["max_position_embeddings"])
    quantization = config.get("quantization_config")
    fields["scale_fmt"] = quantization.get("scale_fmt") if isinstance(quantization, dict) else None
    dtype = _one_value(config, "torch_dtype", "dtype")
    if dtype is not None:
        check(isinstance(dtype, str), f"torch_dtype is {dtype!r}; use the name of a dtype, such as bfloat16")
        fields["dtype"] = fields["param_dtype"] = dtype
    return fields


def fields_to_hf(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the dict of a `config.json` for the fields of a `ModelConfig`, as published; `torch_dtype` is `param_dtype`."""
    copied = (*_INTEGERS, *_NUMBERS, "q_lora_rank", "num_nextn_predict_layers", "norm_topk_prob", "aux_loss_alpha")
    written = {name: fields[name] for name in (*copied, "bos_token_id", "rope_theta")}
    written |= {name: value for name, value in _ONLY.items() if name != "partial_rotary_factor"}
    yarn, ends = fields["rope_scaling"] and {**fields["rope_scaling"], "type": "yarn"}, fields["eos_token_id"]
    written |= {
        "architectures": [ARCHITECTURE],
        "eos_token_id": list(ends) if isinstance(ends, tuple) else ends,
        "model_type": "deepseek_v3",
        "num_key_value_heads": fields["num_attention_heads"],
        "rope_scaling": yarn and {name: value for name, value in sorted(yarn.items()) if value is not None},
        "seq_aux": True,
        "torch_dtype": fields["param_dtype"],
        "use_cache": True,
    }
    return dict(sorted(written.items()))


def _check_supported(config: dict[str, Any]) -> None:
    check("model_type" in config, "the config has no model_type; it is not the config.json of a Hugging Face model")
    model_type = config["model_type"]
    check(model_type in _MODEL_TYPES, f"model_type is {model_type!r}; only {' and '.join(_MODEL_TYPES)} are supported")
    for name, only in _ONLY.items():
        value = config.get(name)
        check(value is None or value == only, f"{name} is {value!r}; only {only!r} is supported")


def _rope(config: dict[str, Any], max_position_embeddings: int) -> tuple[float, dict[str, Any] | None]:
    """Return (rope_theta, arguments of `RopeScaling` or None) of a config in either spelling; ValueError if they disagree."""
    above = {key: config.get(key) for key in ("rope_theta", "original_max_position_embeddings")}
    merged: dict[str, Any] = {}
    for group in ("rope_scaling", "rope_parameters", ""):
        stated = config.get(group) if group else above
        check(not stated or isinstance(stated, dict), f"{group} is {stated!r}; use an object or null")
        for key, value in (stated or {}).items():
            name = f"{group}.{key}".lstrip(".")
            check(not isinstance(value, dict), f"{name} is an object; parameters per layer type are not supported")
            if value is not None:
                known = merged.setdefault("rope_type" if key == "type" else key, value)
                check(known == value, f"{name} is {value!r}, but it is also given as {known!r}; keep one of the two")
    theta = _read(merged, "rope_theta", float, 10000.0)
    rope_type = merged.get("rope_type") or "default"
    check(rope_type in ("default", "yarn"), f"rope type is {rope_type!r}; only 'default' and 'yarn' are supported")
    return theta, None if rope_type == "default" else _yarn(merged, max_position_embeddings)


def _yarn(parameters: dict[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    for name, only in _ONLY_YARN.items():
        value = parameters.get(name, only)
        check(value == only, f"{name} of the rotary parameters is {value!r}; only {only!r} is supported")
    return {
        "factor": _read(parameters, "factor", float),
        "original_max_position_embeddings": _read(parameters, "original_max_position_embeddings", int, max_position_embeddings),
        "beta_fast": _read(parameters, "beta_fast", float, 32.0),
        "beta_slow": _read(parameters, "beta_slow", float, 1.0),
        # As in the reference, a zero here means "not given".
        "mscale": _read(parameters, "mscale", float, 0.0) or None,
        "mscale_all_dim": _read(parameters, "mscale_all_dim", float, 0.0) or None,
    }


def _read(config: dict[str, Any], name: str, kind: Any, default: Any = None) -> Any:
    """Return `config[name]`, else `default`, as `kind` (int, float, bool); ValueError for another type or neither."""
    check(name in config or default is not None, f"{name} is missing, and it has no default; add it to config.json")
    value = config.get(name, default)
    check_value(name, value, kind)
    return kind(value)


def _one_value(config: dict[str, Any], name: str, alias: str, default: Any = None) -> Any:
    """Return the value under `name` or `alias`, two spellings of one field; else `default`. ValueError if the two differ."""
    stated = {key: config[key] for key in (name, alias) if config.get(key) is not None}
    check(
        len(stated) < 2 or stated[name] == stated[alias],
        f"{name} is {stated.get(name)!r} but {alias}, the same field, is {stated.get(alias)!r}; keep one of the two",
    )
    return next(iter(stated.values()), default)
