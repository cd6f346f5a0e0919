"""Block-scaled FP8 weights as the published checkpoints store them (section 3.3.2 of the report).

A weight [out, in] in E4M3 comes with `<name>_scale_inv`, one float32 for each block of 128 x 128: multiply to dequantise.
Blocks are counted from the top left, so the last row and column of blocks may be partial: `kv_a_proj_with_mqa` has
576 rows, four blocks and a half.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from dsv3_jax.config.checks import check

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
SCALE_SUFFIX = "_scale_inv"
EXPORT_BLOCK = (128, 128)
EXPORT_CONFIG: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": list(EXPORT_BLOCK),
}
"""`quantization_config` in the config.json of an FP8 export; `save_hf` adds `scale_fmt` if the model has one."""

# A table lookup of the 256 values is four times as fast as converting them.
_VALUES = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)
_LARGEST = float(ml_dtypes.finfo(FP8).max)


def block_size(config: dict[str, Any]) -> tuple[int, int] | None:
    """Return (rows, columns) of an FP8 block from `quantization_config` in a parsed config.json; None if that is not set.

    Raises:
      ValueError: if `quantization_config` names another format than FP8 E4M3 in blocks, or is malformed.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    check(isinstance(quantization, dict), f"quantization_config is {quantization!r}; use an object or null")
    for name, only in (("quant_method", "fp8"), ("fmt", "e4m3")):
        value = quantization.get(name, only)
        check(value == only, f"quantization_config.{name} is {value!r}; only {only!r} is supported: convert the weights")
    block = quantization.get("weight_block_size")
    is_block = isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
    check(is_block, f"quantization_config.weight_block_size is {block!r}; use two positive integers, [rows, columns]")
    return block[0], block[1]


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = EXPORT_BLOCK) -> tuple[int, int]:
    """Return the shape of the scales of a matrix of `shape`: numbers of blocks along its rows and columns, rounded up."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def dequantise(weight: np.ndarray, scale: np.ndarray, block: tuple[int, int], corner: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Return the weight as float32 [out, in], each element multiplied by the scale of its block.

    Args:
      weight: E4M3, a whole matrix or a part of one, which may begin and end within a block.
      scale: of the blocks that `weight` touches: [ceil((corner + out) / block rows), ceil((corner + in) / block columns)].
      block: (rows, columns).
      corner: (row, column) of the first element of `weight` within its first block; (0, 0) for a whole matrix.
    """
    (rows, columns), (top, left) = weight.shape, corner
    assert scale.shape == scale_shape((top + rows, left + columns), block)
    product = _VALUES[weight.view(np.uint8)]
    for i, row_of_scales in enumerate(scale.astype(np.float32)):
        here = slice(max(0, i * block[0] - top), (i + 1) * block[0] - top)
        product[here] *= np.repeat(row_of_scales, block[1])[left : left + columns]
    return product


def quantise(
    weight: np.ndarray, block: tuple[int, int] = EXPORT_BLOCK, scale_fmt: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (E4M3 weight [out, in], float32 scales); the largest magnitude in each block becomes 448, the largest E4M3.

    With `scale_fmt` "ue8m0", scales are rounded up to powers of two, so that it may become less.

    Raises:
      ValueError: if a value is infinite or NaN.
    """
    scaled = weight.astype(np.float32)
    scale = np.zeros(scale_shape(weight.shape, block), np.float32)
    for i in range(scale.shape[0]):
        rows = scaled[i * block[0] : (i + 1) * block[0]]
        largest = np.maximum.reduceat(np.abs(rows).max(axis=0), np.arange(0, rows.shape[1], block[1]))
        check(bool(np.isfinite(largest).all()), "a weight is infinite or NaN, which FP8 cannot hold; export without fp8")
        # A floor keeps an all-zero block from dividing by zero.
        scale[i] = np.maximum(largest / _LARGEST, np.finfo(np.float32).tiny)
        if scale_fmt == "ue8m0":
            mantissa, exponent = np.frexp(scale[i])
            scale[i] = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
        rows /= np.repeat(scale[i], block[1])[: rows.shape[1]]
    return np.clip(scaled, -_LARGEST, _LARGEST).astype(FP8), scale
