"""The fields of `ModelConfig` read from, and written as, the dict of a Hugging Face `config.json`.

The published models (section 4.2 of the report gives V3's numbers) and transformers spell some fields differently,
and both spellings are read: `rope_theta` + `rope_scaling` or `rope_parameters`, `torch_dtype` or `dtype`,
`num_nextn_predict_layers` or `num_mtp_layers`. The first of each is written: every reader knows it. A key that is
absent gets the default of transformers' `DeepseekV3Config`; a value the architecture here does not have is refused.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from etils import epath

from dsv3_jax.config.checks import check
from dsv3_jax.config.model import ModelConfig, RopeScaling
from dsv3_jax.config.run import Config

ARCHITECTURE = "DeepseekV3ForCausalLM"
# kimi_k2 is deepseek_v3 under a second name: the same fields, the same tensors, the same architecture.
_MODEL_TYPES = ("deepseek_v3", "kimi_k2")

_INTEGERS = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "max_position_embeddings": 4096,
}
_NUMBERS = {"routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6, "initializer_range": 0.02}

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


def fields_from_hf(config: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `ModelConfig` for the dict of a `config.json`.

    Raises:
      ValueError: naming the field, where the file asks for what is not implemented, states one field twice with
        different values, or lacks one that has no default.
    """
    _check_supported(config)
    fields: dict[str, Any] = {name: _integer(config, name, default) for name, default in _INTEGERS.items()}
    fields |= {name: _number(config, name, default) for name, default in _NUMBERS.items()}
    if "aux_loss_alpha" in config:
        fields["aux_loss_alpha"] = _number(config, "aux_loss_alpha")

    # Asking for more dense layers than there are layers means that all of them are dense.
    fields["first_k_dense_replace"] = min(fields["first_k_dense_replace"], fields["num_hidden_layers"])
    heads, kv_heads = fields["num_attention_heads"], config.get("num_key_value_heads")
    check(
        kv_heads is None or kv_heads == heads,
        f"num_key_value_heads is {kv_heads!r}; latent attention has as many as num_attention_heads ({heads})",
    )
    queries_are_direct = "q_lora_rank" in config and config["q_lora_rank"] is None
    fields["q_lora_rank"] = None if queries_are_direct else _integer(config, "q_lora_rank", 1536)
    depths = {"num_nextn_predict_layers": _one_value(config, "num_nextn_predict_layers", "num_mtp_layers", default=1)}
    fields["num_nextn_predict_layers"] = _integer(depths, "num_nextn_predict_layers")

    norm_topk_prob = config.get("norm_topk_prob", True)
    check(isinstance(norm_topk_prob, bool), f"norm_topk_prob is {norm_topk_prob!r}; use true or false")
    fields["norm_topk_prob"] = norm_topk_prob
    fields["bos_token_id"] = _token_id("bos_token_id", config.get("bos_token_id", 0))
    eos = config.get("eos_token_id", 1)
    fields["eos_token_id"] = (
        [_token_id("eos_token_id", token) for token in eos] if isinstance(eos, list) else _token_id("eos_token_id", eos)
    )
    fields["rope_theta"], fields["rope_scaling"] = _rope(config, fields["max_position_embeddings"])
    dtype = _one_value(config, "torch_dtype", "dtype")
    if dtype is not None:
        check(isinstance(dtype, str), f"torch_dtype is {dtype!r}; use the name of a dtype, such as bfloat16")
        fields["dtype"] = fields["param_dtype"] = dtype
    return fields


def fields_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The whole `config.json` of `config`, in the spelling of the published files; `torch_dtype` is `param_dtype`."""
    copied = (*_INTEGERS, *_NUMBERS, "q_lora_rank", "num_nextn_predict_layers", "norm_topk_prob", "aux_loss_alpha")
    written = {name: getattr(config, name) for name in (*copied, "bos_token_id", "rope_theta")}
    written |= {name: value for name, value in _ONLY.items() if name != "partial_rotary_factor"}
    written |= {
        "architectures": [ARCHITECTURE],
        "eos_token_id": list(config.eos_token_id) if isinstance(config.eos_token_id, tuple) else config.eos_token_id,
        "model_type": "deepseek_v3",
        "num_key_value_heads": config.num_attention_heads,
        "rope_scaling": None if config.rope_scaling is None else _yarn_to_hf(config.rope_scaling),
        "seq_aux": True,
        "torch_dtype": config.param_dtype,
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


def _rope(config: dict[str, Any], max_position_embeddings: int) -> tuple[float, RopeScaling | None]:
    """(rope_theta, YaRN or None) of a config in either spelling."""
    merged: dict[str, Any] = {}
    for spelling in ("rope_scaling", "rope_parameters"):
        stated = config.get(spelling) or {}
        check(isinstance(stated, dict), f"{spelling} is {stated!r}; use an object or null")
        for key, value in stated.items():
            if value is None:
                continue
            check(not isinstance(value, dict), f"{spelling}.{key} is an object; parameters per layer type are not supported")
            key = "rope_type" if key == "type" else key
            check(
                merged.get(key, value) == value,
                f"{spelling}.{key} is {value!r}, but it is also given as {merged.get(key)!r}; keep one of the two",
            )
            merged[key] = value
    for key in ("rope_theta", "original_max_position_embeddings"):
        if config.get(key) is not None:
            check(
                merged.get(key, config[key]) == config[key],
                f"{key} is {config[key]!r}, but the rotary parameters give it as {merged.get(key)!r}; keep one of the two",
            )
            merged[key] = config[key]

    theta = _number(merged, "rope_theta", 10000.0)
    rope_type = merged.get("rope_type") or "default"
    check(rope_type in ("default", "yarn"), f"rope type is {rope_type!r}; only 'default' and 'yarn' are supported")
    return theta, None if rope_type == "default" else _yarn(merged, max_position_embeddings)


def _yarn(parameters: dict[str, Any], max_position_embeddings: int) -> RopeScaling:
    for name, only in _ONLY_YARN.items():
        value = parameters.get(name, only)
        check(value == only, f"{name} of the rotary parameters is {value!r}; only {only!r} is supported")
    # As in the reference, a zero or null here means "not given".
    mscale, mscale_all_dim = parameters.get("mscale") or None, parameters.get("mscale_all_dim") or None
    return RopeScaling(
        factor=_number(parameters, "factor"),
        original_max_position_embeddings=_integer(parameters, "original_max_position_embeddings", max_position_embeddings),
        beta_fast=_number(parameters, "beta_fast", 32.0),
        beta_slow=_number(parameters, "beta_slow", 1.0),
        mscale=None if mscale is None else _number(parameters, "mscale"),
        mscale_all_dim=None if mscale_all_dim is None else _number(parameters, "mscale_all_dim"),
    )


def _yarn_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    written = {
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "factor": scaling.factor,
        "mscale": scaling.mscale,
        "mscale_all_dim": scaling.mscale_all_dim,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
        "type": "yarn",
    }
    return {name: value for name, value in written.items() if value is not None}


def _one_value(config: dict[str, Any], name: str, alias: str, default: Any = None) -> Any:
    """The value under `name` or `alias`, two spellings of one field."""
    stated = {key: config[key] for key in (name, alias) if config.get(key) is not None}
    check(
        len(stated) < 2 or stated[name] == stated[alias],
        f"{name} is {stated.get(name)!r} but {alias}, the same field, is {stated.get(alias)!r}; keep one of the two",
    )
    return next(iter(stated.values()), default)


def _integer(config: dict[str, Any], name: str, default: int | None = None) -> int:
    value: Any = config.get(name, default)
    check(name in config or default is not None, f"{name} is missing, and it has no default")
    check(isinstance(value, int) and not isinstance(value, bool), f"{name} is {value!r}; use an integer")
    return value


def _number(config: dict[str, Any], name: str, default: float | None = None) -> float:
    value: Any = config.get(name, default)
    check(name in config or default is not None, f"{name} is missing, and it has no default")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    check(is_number and abs(value) <= sys.float_info.max, f"{name} is {value!r}; use a finite number")
    return float(value)


def _token_id(name: str, value: Any) -> int | None:
    is_id = isinstance(value, int) and not isinstance(value, bool)
    check(value is None or is_id, f"{name} is {value!r}; use a token id or null")
    return value


# ----------------------------------------------------------------------------------------------------------------------
# The model of a checkpoint, read from its config.json: of a run directory of train.py, or a Hugging Face folder.


def is_hugging_face(path: str) -> bool:
    """Whether `path` is a Hugging Face folder (True) or a run directory (False), told by its config.json.

    Raises:
      ValueError: if it is neither.
    """
    return "model_type" in _read(path)


def read_model(path: str) -> ModelConfig:
    """The model of either kind of folder; backends that a run names, which are those of its machine, are "auto" again.

    Raises:
      ValueError: if it is neither, or a model that is not implemented.
    """
    content = _read(path)
    try:
        model = ModelConfig.from_hf(content) if "model_type" in content else Config.from_json(json.dumps(content)).model
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{epath.Path(path) / 'config.json'}: {error}") from error
    return model.with_auto_backends()


def model_to_train(path: str) -> ModelConfig:
    """The same as a run that starts from it takes it: with float32 parameters. Raises as `read_model`."""
    return dataclasses.replace(read_model(path), param_dtype="float32")


def with_generation_config(model: ModelConfig, path: str) -> ModelConfig:
    """A Hugging Face folder's model with the end-of-text tokens that its generation_config.json names besides its own.

    Raises:
      ValueError: if that file cannot be read, or names what is no token.
    """
    file = epath.Path(path) / "generation_config.json"
    if not file.exists():
        return model
    try:
        content = json.loads(file.read_text())
        named = content.get("eos_token_id")
        more = named if isinstance(named, list) else [] if named is None else [named]
        ids = dict.fromkeys([*model.eos_token_ids, *more])
        known = len(ids) == len(model.eos_token_ids)
        return model if known else dataclasses.replace(model, eos_token_id=tuple(ids))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: {error}; copy it from the checkpoint again") from error


def _read(path: str) -> dict[str, Any]:
    file = epath.Path(path) / "config.json"
    if not file.exists():
        raise ValueError(f"{path} holds no config.json; name a run directory of train.py or a Hugging Face folder")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if isinstance(content, dict) and ("model_type" in content or isinstance(content.get("model"), dict)):
        return content
    raise ValueError(f"{file} is neither a run's config nor a Hugging Face one (no model_type); name another folder")
