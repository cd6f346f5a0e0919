"""`ModelConfig` and `RopeScaling`: the published numbers, and refusal of what contradicts itself."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import math
import pathlib
import re
import typing

import jax.numpy as jnp
import pytest

import dsv3_jax.config
from dsv3_jax.config import Config, ModelConfig, RopeScaling
from dsv3_jax.config.cli import parse_run
from dsv3_jax.config.model import AttentionBackend, CacheBackend, ExpertBackend, ExpertExchange, RematPolicy

# Section 4.2 of the report and the published config.json.
PUBLISHED = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
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
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "aux_loss_alpha": 1e-4,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.006,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def test_the_defaults_are_the_published_model():
    config = ModelConfig()
    assert {name: getattr(config, name) for name in PUBLISHED} == PUBLISHED
    assert (config.num_moe_layers, config.qk_head_dim) == (58, 192)


def test_softmax_scale_of_the_published_model():
    """sigma = 192^-1/2 in pre-training; YaRN multiplies it by m^2 = 1.873854, m = 0.1 ln 40 + 1."""
    assert ModelConfig().softmax_scale == pytest.approx(192**-0.5, rel=1e-12)
    published = ModelConfig(rope_scaling=RopeScaling())
    assert published.softmax_scale == pytest.approx(0.135234, abs=5e-7)
    assert published.softmax_scale * 192**0.5 == pytest.approx(1.873854, abs=5e-7)


@pytest.mark.parametrize("mscale_all_dim", [None, 0.0])
def test_softmax_scale_without_mscale_all_dim(mscale_all_dim: float | None):
    config = ModelConfig(rope_scaling=RopeScaling(mscale_all_dim=mscale_all_dim))
    assert config.softmax_scale == pytest.approx(192**-0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("mscale", "expected"), [(1.0, 0.1 * math.log(8.0) + 1), (0.5, 0.05 * math.log(8.0) + 1), (None, 0.1 * math.log(8.0) + 1)]
)
def test_attention_scale(mscale: float | None, expected: float):
    assert RopeScaling(factor=8.0).attention_scale(mscale) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; it must be at least 1"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"attention_chunk": 0}, "attention_chunk is 0"),
        ({"loss_chunk": 0}, "loss_chunk is 0"),
        ({"q_lora_rank": -2}, "q_lora_rank is -2"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63; rotary pairs need an even number"),
        ({"first_k_dense_replace": 62}, "first_k_dense_replace is 62; it must lie in 0..num_hidden_layers"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace is -1"),
        ({"n_shared_experts": -1}, "n_shared_experts is -1"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1"),
        ({"n_group": 7}, "n_routed_experts (256) is not a multiple of n_group (7)"),
        ({"topk_group": 9}, "topk_group (9) exceeds n_group (8)"),
        ({"n_routed_experts": 8}, "n_group (8) leaves 1 expert a group"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok (129) exceeds the 128 experts of topk_group (4) groups"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0; it must be positive"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor is 0.0"),
        ({"initializer_range": float("nan")}, "initializer_range is nan"),
        ({"aux_loss_alpha": -1.0}, "aux_loss_alpha is -1.0"),
        ({"remat": "some"}, "remat is 'some'"),
        ({"expert_backend": "magic"}, "expert_backend is 'magic'"),
        ({"expert_exchange": "local"}, "expert_exchange is 'local'"),
        ({"attention_backend": "flash"}, "attention_backend is 'flash'"),
        ({"cache_backend": "splash"}, "cache_backend is 'splash'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"param_dtype": "float8"}, "param_dtype is 'float8'"),
        ({"bos_token_id": 129280}, "bos_token_id 129280 is outside the vocabulary of 129280"),
        ({"eos_token_id": [1, -1]}, "eos_token_id -1 is outside the vocabulary"),
        ({"eos_token_id": []}, "eos_token_id is empty; name a token id, or use None"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0; use an integer"),
        ({"hidden_size": "64"}, "hidden_size is '64'; use an integer"),
        ({"n_shared_experts": True}, "n_shared_experts is True; use an integer"),
        ({"q_lora_rank": 1.5}, "q_lora_rank is 1.5; use an integer"),
        ({"kv_lora_rank": None}, "kv_lora_rank is None; use an integer"),
        ({"rope_theta": float("inf")}, "rope_theta is inf; use a finite number"),
        ({"routed_scaling_factor": "2.5"}, "routed_scaling_factor is '2.5'; use a finite number"),
        ({"receive_factor": float("inf")}, "receive_factor is inf; use a finite number"),
        ({"dtype": None}, "dtype is None; choose float32"),
        ({"dtype": 5}, "dtype is 5; choose float32"),
        ({"param_dtype": [1]}, "param_dtype is [1]; choose float32"),
    ],
)
def test_contradictions_are_refused_by_name(changes: dict, message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        ModelConfig(**changes)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        dataclasses.replace(ModelConfig(), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 0.5}, "rope_scaling.factor is 0.5"),
        ({"original_max_position_embeddings": 0}, "rope_scaling.original_max_position_embeddings is 0"),
        ({"factor": float("inf")}, "rope_scaling.factor is inf; use a finite number"),
        (
            {"original_max_position_embeddings": 4096.5},
            "rope_scaling.original_max_position_embeddings is 4096.5; use an integer",
        ),
        ({"beta_fast": 0.5}, "rope_scaling.beta_fast (0.5) must be at least beta_slow (1.0)"),
        ({"beta_slow": 0.0}, "rope_scaling.beta_fast (32.0) must be at least beta_slow (0.0), which must be positive"),
    ],
)
def test_contradictions_of_yarn_are_refused_by_name(changes: dict, message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        RopeScaling(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_group": 1, "topk_group": 1},
        {"n_group": 128},
        {"first_k_dense_replace": 61},
        {"first_k_dense_replace": 0},
        {"n_shared_experts": 0, "num_nextn_predict_layers": 0, "aux_loss_alpha": 0.0},
        {"bos_token_id": None, "eos_token_id": None},
        *({"remat": policy} for policy in typing.get_args(RematPolicy)),
        *({"expert_backend": backend} for backend in typing.get_args(ExpertBackend)),
        *({"expert_exchange": exchange} for exchange in typing.get_args(ExpertExchange)),
        *({"attention_backend": backend} for backend in typing.get_args(AttentionBackend)),
        *({"cache_backend": backend} for backend in typing.get_args(CacheBackend)),
    ],
)
def test_what_lies_on_the_border_is_accepted(changes: dict):
    config = ModelConfig(**changes)
    assert {name: getattr(config, name) for name in changes} == changes


def test_on_another_machine_whatever_can_be_auto_is():
    there = ModelConfig(
        expert_backend="tiles", expert_exchange="all_gather", attention_backend="splash", cache_backend="chunked", remat="full"
    )
    assert all(value != "auto" for value in dataclasses.asdict(there).values())
    here = there.with_auto_backends()
    names = [field.name for field in dataclasses.fields(ModelConfig) if field.default == "auto"]
    assert here == dataclasses.replace(there, **dict.fromkeys(names, "auto"))
    assert ModelConfig(remat="full") == here


def test_spellings_are_made_one():
    assert ModelConfig(q_lora_rank=0).q_lora_rank is None
    config = ModelConfig(dtype=jnp.float32, param_dtype=jnp.bfloat16, eos_token_id=[1, 2])
    assert (config.dtype, config.param_dtype, config.eos_token_id) == ("float32", "bfloat16", (1, 2))


def test_the_former_name_of_an_exchange_is_accepted_and_not_kept():
    assert ModelConfig(expert_exchange="ring").expert_exchange == "all_gather"
    arguments = ["--config", "configs/tiny.py", "--model.expert-exchange", "ring"]
    config = parse_run(arguments).config
    assert config.model.expert_exchange == "all_gather"
    written = json.loads(config.to_json())
    assert written["model"]["expert_exchange"] == "all_gather"
    written["model"]["expert_exchange"] = "ring"
    assert Config.from_json(json.dumps(written)) == config


def test_with_dtype_sets_both():
    config = ModelConfig().with_dtype(jnp.float16)
    assert (config.dtype, config.param_dtype) == ("float16", "float16")
    assert config == dataclasses.replace(ModelConfig(), dtype="float16", param_dtype="float16")


@pytest.mark.parametrize(("eos", "ids"), [(None, []), (1, [1]), ((3, 1), [3, 1]), ([3, 1], [3, 1])])
def test_eos_token_ids(eos: int | list[int] | tuple[int, ...] | None, ids: list[int]):
    assert ModelConfig(eos_token_id=eos).eos_token_ids == ids


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().hidden_size = 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        RopeScaling().factor = 8.0


@pytest.mark.parametrize("cls", [getattr(dsv3_jax.config, name) for name in dsv3_jax.config.__all__])
def test_every_field_has_a_docstring(cls: type):
    """A string literal right behind each field: it is the field's `--help`."""
    tree = ast.parse(pathlib.Path(inspect.getfile(cls)).read_text(encoding="utf-8"))
    body = next(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    documented = {
        field.target.id
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
    groups = {field.name for field in dataclasses.fields(cls) if cls is dsv3_jax.config.Config}
    assert documented | groups == {field.name for field in dataclasses.fields(cls)}
