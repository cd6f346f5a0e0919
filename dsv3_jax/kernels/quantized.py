"""FP8 weights: E4M3 values with a float32 scale for each block (section 3.3.2 of the report), for inference only.

A value is one byte; a block of 128 x 128 of them shares a scale, and value times scale is the weight. A weight is dequantized
only where it is multiplied: in float32 and then rounded to the computation dtype, as `load_hf` does when it reads such a
file, so the products are the same to the bit. Nothing here has a gradient.

The values are kept as uint8. On a platform without arithmetic for floats of 8 bits, such as a CPU, XLA would convert an array
of them before slicing it: all experts, to read one.

Axes: I and O number the blocks along the inputs and the outputs of the matrix.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct

Tree = TypeVar("Tree")


@struct.dataclass
class QuantizedArray:
    """FP8 weight of shape [stack..., inputs..., outputs...]: a matrix for each index of the stack axes."""

    # Flax compares the shape of a parameter's first leaf with the declared one, so the values come first.
    values: jax.Array
    """uint8, the bits of E4M3, shaped as the weight."""
    scale_inv: jax.Array
    """float32 [stack..., I, O]: the scale of each block. The last blocks may be partial."""
    block: tuple[int, int] = struct.field(pytree_node=False)
    """(inputs, outputs) of a block; the matrix has all input axes flattened to rows, all output axes to columns."""
    num_in: int = struct.field(pytree_node=False, default=1)
    """Number of input axes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the weight, stack axes included."""
        return self.values.ndim

    @property
    def dtype(self) -> Any:
        """Dtype of the stored values: uint8."""
        return self.values.dtype

    @property
    def depth(self) -> int:
        """Number of stack axes, the leading ones."""
        return self.scale_inv.ndim - 2

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(inputs, outputs) of each matrix of the stack."""
        first_out = self.depth + self.num_in
        return math.prod(self.shape[self.depth : first_out]), math.prod(self.shape[first_out:])

    def __getitem__(self, index: Any) -> QuantizedArray:
        """Index the stack axes of values and scales: return one weight, or a smaller stack."""
        return dataclasses.replace(self, values=self.values[index], scale_inv=self.scale_inv[index])

    def astype(self, dtype: Any) -> jax.Array:
        """Return the dequantized weight as an array of `shape`: value times scale in float32, rounded to `dtype`."""
        (rows, columns), (height, width) = self.matrix_shape, self.block
        if rows % height:
            scales = _repeated(self.scale_inv, self.block, (rows, columns)).reshape(self.shape)
            return _scaled(self.values, scales, dtype)
        outputs = self.shape[self.depth + self.num_in :]
        blocks = *self.shape[: self.depth], rows // height
        scales = _repeated(self.scale_inv, (1, width), (rows // height, columns)).reshape(*blocks, 1, *outputs)
        # Only in this shape does XLA on a TPU multiply in one pass; without barriers it first writes a scale for each value.
        values = jax.lax.optimization_barrier(self.values.reshape(*blocks, height, *outputs))
        return jax.lax.optimization_barrier(_scaled(values, scales, dtype)).reshape(self.shape)

    def with_blocks(self, block: tuple[int, int]) -> QuantizedArray:
        """Return the weight with the same values in smaller blocks, whose size divides the present one: scales are repeated."""
        times = self.block[0] // block[0], self.block[1] // block[1]
        assert (block[0] * times[0], block[1] * times[1]) == self.block
        inputs, outputs = self.matrix_shape
        grid = -(-inputs // block[0]), -(-outputs // block[1])
        return dataclasses.replace(self, scale_inv=_repeated(self.scale_inv, times, grid), block=block)


def _scaled(values: jax.Array, scales: jax.Array, dtype: Any) -> jax.Array:
    return (jax.lax.bitcast_convert_type(values, jnp.float8_e4m3fn).astype(jnp.float32) * scales).astype(dtype)


def _repeated(scale: jax.Array, times: tuple[int, int], sizes: tuple[int, int]) -> jax.Array:
    """Repeat each scale `times` along the last two axes, and cut the result to `sizes`: [..., I, O] to [..., *sizes]."""
    for axis, (count, size) in enumerate(zip(times, sizes, strict=True), scale.ndim - 2):
        if count > 1:
            scale = jax.lax.slice_in_dim(jnp.repeat(scale, count, axis), 0, size, axis=axis)
    return scale


def check_trainable(weights: Any) -> None:
    """Raise ValueError if a tree of weights holds a `QuantizedArray`; weights in FP8 have no gradient."""
    for weight in jax.tree.leaves(weights, is_leaf=is_quantized):
        if is_quantized(weight):
            raise ValueError(f"a weight {list(weight.shape)} in FP8 cannot be trained; load the model with keep_fp8=False")


def in_dtype(weights: Tree, dtype: Any) -> Tree:
    """Return the tree with its arrays cast to `dtype`; a `QuantizedArray` stays as it is."""

    def convert(weight: Any) -> Any:
        return weight if is_quantized(weight) or weight.dtype == dtype else weight.astype(dtype)

    return jax.tree.map(convert, weights, is_leaf=is_quantized)


def is_quantized(weight: Any) -> bool:
    """Return True if `weight` is a `QuantizedArray`. Serves as `is_leaf` of `jax.tree` functions."""
    return isinstance(weight, QuantizedArray)
