"""Random checkpoints as DeepSeek publishes them: one safetensors file of named [out, in] tensors, and a config.json.

The weights are drawn so that everything matters: unit-scale activations, logits of standard deviation about 2, norms
that differ from one another, router biases as large as the scores and, for one expert in four, far larger.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.parity.cases import Case
from tests.reference_model import Config


def write_checkpoint(case: Case, folder: Path) -> dict[str, np.ndarray]:
    """Writes the folder that `load_hf` and transformers read; returns its tensors."""
    tensors = random_tensors(case)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case.config, indent=2, sort_keys=True) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def random_tensors(case: Case) -> dict[str, np.ndarray]:
    """The float32 tensors of a checkpoint; every MTP layer carries its copies of the embedding and the head."""
    rng = np.random.default_rng(case.seed)
    tensors = {name: _draw(rng, name, shape, case.bias_shift) for name, shape in tensor_shapes(case.config)}
    for k in range(case.config["num_nextn_predict_layers"]):
        layer = f"model.layers.{case.config['num_hidden_layers'] + k}"
        tensors[f"{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors[f"{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].copy()
    return tensors


def random_tokens(case: Case, batch: int, length: int) -> np.ndarray:
    """Token ids [batch, length]; a shorter length is a prefix of a longer one."""
    rng = np.random.default_rng([case.seed, batch])
    return rng.integers(0, case.config["vocab_size"], size=(length, batch)).T


def tensor_shapes(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of the checkpoint but the copies in its MTP layers."""
    D, V = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (V, D)
    yield "model.norm.weight", (D,)
    yield "lm_head.weight", (V, D)
    for i in range(config["num_hidden_layers"] + config["num_nextn_predict_layers"]):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (D,)
        yield f"{layer}.post_attention_layernorm.weight", (D,)
        yield from _attention_shapes(config, f"{layer}.self_attn")
        yield from _ffn_shapes(config, f"{layer}.mlp", is_moe=i >= config["first_k_dense_replace"])
        if i >= config["num_hidden_layers"]:
            yield f"{layer}.enorm.weight", (D,)
            yield f"{layer}.hnorm.weight", (D,)
            yield f"{layer}.eh_proj.weight", (D, 2 * D)
            yield f"{layer}.shared_head.norm.weight", (D,)


def _attention_shapes(config: Config, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, N, C, Q = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"], config["q_lora_rank"]
    H, P, W = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    if Q:
        yield f"{name}.q_a_proj.weight", (Q, D)
        yield f"{name}.q_a_layernorm.weight", (Q,)
        yield f"{name}.q_b_proj.weight", (N * (H + P), Q)
    else:
        yield f"{name}.q_proj.weight", (N * (H + P), D)
    yield f"{name}.kv_a_proj_with_mqa.weight", (C + P, D)
    yield f"{name}.kv_a_layernorm.weight", (C,)
    yield f"{name}.kv_b_proj.weight", (N * (H + W), C)
    yield f"{name}.o_proj.weight", (D, N * W)


def _ffn_shapes(config: Config, name: str, is_moe: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, E, F = config["hidden_size"], config["n_routed_experts"], config["moe_intermediate_size"]
    widths = {name: config["intermediate_size"]}
    if is_moe:
        yield f"{name}.gate.weight", (E, D)
        yield f"{name}.gate.e_score_correction_bias", (E,)
        widths = {f"{name}.experts.{e}": F for e in range(E)} | {f"{name}.shared_experts": F * config["n_shared_experts"]}
    for mlp, width in widths.items():
        yield f"{mlp}.gate_proj.weight", (width, D)
        yield f"{mlp}.up_proj.weight", (width, D)
        yield f"{mlp}.down_proj.weight", (D, width)


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...], bias_shift: float) -> np.ndarray:
    if name.endswith("e_score_correction_bias"):
        bias = rng.normal(0, 0.2, shape)
        bias[1::4] = -3.0 + rng.normal(0, 0.2, bias[1::4].shape)
        return (bias + bias_shift).astype(np.float32)
    if name.endswith("norm.weight"):
        return rng.uniform(0.6, 1.4, shape).astype(np.float32)
    scale = 1.0 if name == "model.embed_tokens.weight" else shape[-1] ** -0.5
    if name == "lm_head.weight":
        scale *= 2
    return rng.normal(0, scale, shape).astype(np.float32)
