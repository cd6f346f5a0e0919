"""FP8 tensors of a checkpoint as they are: 8-bit values and their scales, in place of the arrays they stand for."""

from __future__ import annotations

import dataclasses

import numpy as np
from jax.sharding import NamedSharding

from dsv3_jax.checkpoint.fp8 import SCALE_SUFFIX, scale_shape
from dsv3_jax.checkpoint.loading import Weights, load_array
from dsv3_jax.checkpoint.names import Leaf
from dsv3_jax.kernels.quantized import BlockScaled
from dsv3_jax.model.sharding import scale_sharding


def require_fp8(weights: Weights) -> None:
    """Raises ValueError if the checkpoint has no FP8 blocks to keep."""
    if weights.block is None:
        raise ValueError(f"{weights.folder} holds no FP8 blocks (config.json has no quantization_config); leave keep_fp8 out")


def stays_fp8(weights: Weights, leaf: Leaf) -> bool:
    """Whether an array can be kept: the published recipe quantises it, and so does the file, in all of its layers."""
    return leaf.is_fp8 and all(weights.is_fp8(name) for name in leaf.names)


def load_block_scaled(weights: Weights, leaf: Leaf, sharding: NamedSharding | None) -> BlockScaled:
    """What takes the place of the array of `leaf`; its values are split as that would be, and its scales by experts alone."""
    assert weights.block is not None
    rows, columns = scale_shape(leaf.stored, weights.block)
    scales = dataclasses.replace(
        leaf, names=tuple(name + SCALE_SUFFIX for name in leaf.names), part=(columns, rows), stored=(rows, columns)
    )
    by_experts = None if sharding is None else scale_sharding(sharding, len(leaf.stack))
    return BlockScaled(
        values=load_array(weights, leaf, np.dtype(np.uint8), sharding),
        scale_inv=load_array(weights, scales, np.dtype(np.float32), by_experts),
        block=(weights.block[1], weights.block[0]),
        num_in=leaf.num_in,
    )
