"""A small published-style checkpoint to read, break and write: every width different, MTP, partial FP8 blocks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
from jax.sharding import Mesh
from safetensors.numpy import save_file

from tests.parity.cases import PUBLISHED
from tests.parity.reference_checkpoints import tensor_shapes

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BIAS = "e_score_correction_bias"
BLOCK = (16, 24)
_DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BF16, "F8_E4M3": FP8}

CONFIG: dict[str, Any] = {
    **PUBLISHED,
    "vocab_size": 70,
    "hidden_size": 40,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 2,
    "num_nextn_predict_layers": 2,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 3,
    "topk_group": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 20,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 8,
}
"""A config.json. D 40, V 70, N 3, H 10, P 6, W 8, Q 20, C 28, E 6, F 24, dense hidden 56; layers: 2 dense, 2 MoE, 2 MTP."""

SHARDED_CONFIG: dict[str, Any] = {
    **CONFIG,
    "num_nextn_predict_layers": 1,
    "vocab_size": 80,
    "hidden_size": 56,
    "intermediate_size": 72,
    "moe_intermediate_size": 40,
    "n_routed_experts": 8,
    "n_group": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
}
"""The same with one MTP layer and what meshes split a multiple of eight, hardly ever where a block of `BLOCK` ends."""

_AXES = "data", "fsdp", "expert", "context", "tensor"
MESHES: dict[str, dict[str, int]] = {
    "fsdp 2, expert 2, tensor 2": {"fsdp": 2, "expert": 2, "tensor": 2},
    "fsdp 8": {"fsdp": 8},
    "expert 8": {"expert": 8},
    "tensor 8": {"tensor": 8},
    "fsdp 2, expert 4": {"fsdp": 2, "expert": 4},
    "data 2, expert 2, tensor 2": {"data": 2, "expert": 2, "tensor": 2},
    "context 2, expert 2, tensor 2": {"context": 2, "expert": 2, "tensor": 2},
}
"""Sizes of the mesh axes that are not 1; eight devices each."""

Tensors = dict[str, np.ndarray]


def random_tensors(config: Mapping[str, Any] = CONFIG, dtype: np.dtype = BF16, seed: int = 0) -> Tensors:
    """Random tensors under the published names, router biases float32, MTP layers with their copies."""
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.standard_normal(shape, np.float32).astype(np.float32 if name.endswith(BIAS) else dtype)
        for name, shape in tensor_shapes(config)
    }
    for k in range(config["num_nextn_predict_layers"]):
        layer = f"model.layers.{config['num_hidden_layers'] + k}"
        tensors[f"{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors[f"{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].copy()
    return tensors


def write(folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] = CONFIG, files: int = 1) -> Path:
    """Writes a folder as published: one file, or `files` of them with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        shard = {name: tensor for j, (name, tensor) in enumerate(tensors.items()) if j % files == i}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def load(file: Path) -> Tensors:
    """The tensors of a file as the safetensors library parses it (its numpy interface knows no FP8)."""
    return {
        name: np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
        for name, tensor in safetensors.deserialize(file.read_bytes())
    }


def assert_identical(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def may_be_fp8(name: str) -> bool:
    """Whether the published files store this weight in FP8."""
    is_linear = name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight"))
    return is_linear and not name.endswith("eh_proj.weight")


def with_fp8(tensors: Tensors, block: tuple[int, int] = BLOCK, seed: int = 1) -> Tensors:
    """The same names with random FP8 weights and scales where the published files have them."""
    rng = np.random.default_rng(seed)
    quantised = dict(tensors)
    for name, tensor in tensors.items():
        if may_be_fp8(name):
            rows, columns = tensor.shape
            grid = (-(-rows // block[0]), -(-columns // block[1]))
            quantised[name] = rng.normal(0, 100, tensor.shape).astype(np.float32).clip(-448, 448).astype(FP8)
            quantised[f"{name}_scale_inv"] = rng.uniform(1e-4, 1e-2, grid).astype(np.float32)
    return quantised


def quantization_config(block: tuple[int, int] = BLOCK) -> dict[str, Any]:
    """The entry of config.json that goes with `with_fp8`."""
    return {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(block)}


def make_mesh(**sizes: int) -> Mesh:
    """A mesh over all devices."""
    return Mesh(np.array(jax.devices()).reshape([sizes.get(axis, 1) for axis in _AXES]), _AXES)


def run_two(script: str, folder: Path) -> list[tuple[dict[str, Any], str]]:
    """Run a script next to this file as two processes of four devices; return the JSON line and the stderr of each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, str(Path(__file__).with_name(script))]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([*command, str(index), port, str(folder)], env=environment, **pipes) for index in (0, 1)]
    try:
        ended = [child.communicate(timeout=300) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], ended
    return [(json.loads(out.splitlines()[-1]), err) for out, err in ended]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder` with its bytes (None for a folder)."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
