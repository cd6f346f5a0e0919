"""Block-scaled weights against a reference that looks every element's block up on its own."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.kernels.quantized import QuantizedArray, check_trainable, in_dtype

# Shape, axes of the stack, axes that are inputs, block. Partial blocks at both edges, blocks that begin in one head and end in
# another, blocks larger than the matrix, and a block for each value.
CASES = {
    "a matrix": ((10, 14), 0, 1, (4, 6)),
    "whole blocks": ((8, 12), 0, 1, (4, 6)),
    "heads out of a latent": ((10, 3, 7), 0, 1, (4, 6)),
    "heads contracted, of two layers": ((2, 3, 7, 10), 1, 2, (6, 4)),
    "experts of two layers": ((2, 3, 10, 14), 2, 1, (6, 4)),
    "whole rows of blocks, heads contracted, of two layers": ((2, 3, 8, 10), 1, 2, (6, 4)),
    "whole rows of blocks, heads out of a latent": ((12, 3, 7), 0, 1, (4, 6)),
    "whole rows of blocks, experts of two layers": ((2, 3, 12, 14), 2, 1, (6, 4)),
    "one block": ((3, 5), 0, 1, (128, 128)),
    "no blocks": ((3, 5), 0, 1, (1, 1)),
}


def random_weight(case: str) -> QuantizedArray:
    shape, depth, num_in, block = CASES[case]
    rng = np.random.default_rng(0)
    inputs, outputs = math.prod(shape[depth : depth + num_in]), math.prod(shape[depth + num_in :])
    grid = -(-inputs // block[0]), -(-outputs // block[1])
    values = rng.normal(0, 100, shape).astype(np.float32).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    scale_inv = rng.uniform(1e-4, 1e-2, (*shape[:depth], *grid)).astype(np.float32)
    return QuantizedArray(jnp.asarray(values.view(np.uint8)), jnp.asarray(scale_inv), block, num_in)


def reference(weight: QuantizedArray) -> np.ndarray:
    """value * scale of its block, element by element."""
    depth, shape = weight.depth, weight.shape
    values, scale_inv = np.asarray(weight.values).view(ml_dtypes.float8_e4m3fn), np.asarray(weight.scale_inv)
    wide = np.empty(shape, np.float32)
    for index in np.ndindex(*shape):
        inputs, outputs = index[depth : depth + weight.num_in], index[depth + weight.num_in :]
        i = np.ravel_multi_index(inputs, shape[depth : depth + weight.num_in]) // weight.block[0]
        o = np.ravel_multi_index(outputs, shape[depth + weight.num_in :]) // weight.block[1]
        wide[index] = np.float32(values[index]) * scale_inv[(*index[:depth], i, o)]
    return wide


@pytest.mark.parametrize("case", CASES)
def test_each_element_has_the_scale_of_its_block(case: str) -> None:
    weight = random_weight(case)
    wide, narrow = jax.jit(lambda weight: (weight.astype(jnp.float32), weight.astype("bfloat16")))(weight)
    chex.assert_shape(wide, weight.shape)
    np.testing.assert_array_equal(wide, reference(weight), strict=True)
    np.testing.assert_array_equal(narrow, reference(weight).astype(ml_dtypes.bfloat16))


def test_all_values_of_eight_bits() -> None:
    bits = np.arange(256, dtype=np.uint8)
    weight = QuantizedArray(jnp.asarray(bits[None]), jnp.ones((1, 2)), (128, 128))
    np.testing.assert_array_equal(weight.astype(jnp.float32)[0], bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32))


@pytest.mark.parametrize(("case", "block"), [("heads out of a latent", (2, 3)), ("experts of two layers", (3, 1))])
def test_smaller_blocks_are_the_same_weight(case: str, block: tuple[int, int]) -> None:
    weight = random_weight(case)
    smaller = weight.with_blocks(block)
    chex.assert_shape(
        smaller.scale_inv,
        (*weight.shape[: weight.depth], *(-(-n // b) for n, b in zip((10, 14 if weight.depth else 21), block, strict=True))),
    )
    np.testing.assert_array_equal(jax.jit(lambda weight: weight.astype(jnp.float32))(smaller), reference(weight))


def test_an_element_of_a_stack() -> None:
    weight = random_weight("experts of two layers")
    one, layer = jax.jit(lambda w, i: (w[1][2].astype(jnp.float32), w[i].astype(jnp.float32)))(weight, 1)
    np.testing.assert_array_equal(one, reference(weight)[1, 2])
    np.testing.assert_array_equal(layer, reference(weight)[1])


def test_a_tree_in_a_dtype_leaves_them_as_they_are() -> None:
    weight = random_weight("a matrix")
    tree = in_dtype({"kernel": weight, "norm": jnp.ones(3)}, "bfloat16")
    chex.assert_trees_all_equal(tree, {"kernel": weight, "norm": jnp.ones(3, jnp.bfloat16)}, strict=True)


def test_they_cannot_be_trained() -> None:
    check_trainable({"norm": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"weight \[10, 14\] in FP8 cannot be trained; load the model with keep_fp8=False"):
        check_trainable({"kernel": random_weight("a matrix")})
