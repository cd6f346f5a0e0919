"""Block-scaled FP8 checkpoints, and what their numbers are, one element at a time.

transformers' own dequantiser spreads the scales evenly over a matrix and so misreads one whose edge cuts a block:
the published `kv_a_proj_with_mqa`, 576 rows under five rows of scales, is such a matrix.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

from tests.parity.cases import Case
from tests.parity.reference_checkpoints import random_tensors

BLOCK = 128


def write_fp8_checkpoint(case: Case, folder: Path, eh_proj: bool) -> dict[str, np.ndarray]:
    """Writes a checkpoint whose matrices are FP8 where the published one's are; returns the float32 weights it holds.

    Args:
      eh_proj: whether the MTP projection is FP8 too; published files differ in it.
    """
    stored, meant = {}, {}
    rng = np.random.default_rng(case.seed)
    for name, tensor in random_tensors(case).items():
        stored[name] = meant[name] = tensor
        if _is_fp8(name, eh_proj):
            scale = rng.uniform(0.5, 2, [-(-size // BLOCK) for size in tensor.shape]).astype(np.float32) / 256
            stored[name] = (tensor / _spread(scale, tensor.shape)).astype(ml_dtypes.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
            meant[name] = dequantised(stored[name], scale)
    folder.mkdir(parents=True, exist_ok=True)
    quantization = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (folder / "config.json").write_text(json.dumps({**case.config, "quantization_config": quantization}))
    _save(stored, folder / "model.safetensors")
    return meant


def dequantised(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """weight[i, j] * scale[i // 128, j // 128]."""
    return weight.astype(np.float32) * _spread(scale, weight.shape)


def _spread(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    rows, columns = np.indices(shape)
    return scale[rows // BLOCK, columns // BLOCK]


def _is_fp8(name: str, eh_proj: bool) -> bool:
    kept = "embed_tokens", "lm_head", "shared_head", "norm", "mlp.gate.", *(() if eh_proj else ("eh_proj",))
    return not any(part in name for part in kept)


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes a safetensors file by hand, for `safetensors.numpy` cannot name float8."""
    header, start = {}, 0
    for name, array in tensors.items():
        dtype = {"float8_e4m3fn": "F8_E4M3", "float32": "F32"}[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [start, start + array.nbytes]}
        start += array.nbytes
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"".join(array.tobytes() for array in tensors.values()))
