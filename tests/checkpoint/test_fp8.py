"""FP8 blocks against a reference that looks every element's block up on its own."""

from __future__ import annotations

import chex
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.checkpoint.fp8 import EXPORT_CONFIG, FP8, block_size, dequantise, quantise, scale_shape

# Whole blocks; partial at the bottom, at the right, at both; smaller than a block; the published 576-row matrix's shape.
_SHAPES = [(256, 256), (200, 128), (128, 130), (131, 257), (5, 3), (576, 300)]


def _reference(weight: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """weight[i, j] * scale[i // rows, j // columns], element by element."""
    values = np.empty(weight.shape, np.float32)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            values[i, j] = np.float32(weight[i, j]) * scale[i // block[0], j // block[1]]
    return values


@pytest.mark.parametrize("shape", _SHAPES)
@pytest.mark.parametrize("block", [(128, 128), (32, 64)])
def test_dequantise_multiplies_each_element_by_its_blocks_scale(shape: tuple[int, int], block: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 100, shape).astype(np.float32).clip(-448, 448).astype(FP8)
    scale = rng.uniform(1e-4, 1e-2, scale_shape(shape, block)).astype(np.float32)
    values = dequantise(weight, scale, block)
    chex.assert_shape(values, shape)
    chex.assert_type(values, np.float32)
    np.testing.assert_array_equal(values, _reference(weight, scale, block))


@pytest.mark.parametrize("part", [np.s_[0:131, 0:257], np.s_[30:40, 60:70], np.s_[31:131, 64:129], np.s_[128:131, 255:257]])
def test_a_part_of_a_matrix_takes_the_scales_it_touches(part: tuple[slice, slice]) -> None:
    rng, block = np.random.default_rng(0), (32, 64)
    weight = rng.normal(0, 100, (131, 257)).astype(np.float32).clip(-448, 448).astype(FP8)
    scale = rng.uniform(1e-4, 1e-2, scale_shape(weight.shape, block)).astype(np.float32)
    rows, columns = part
    touched = scale[rows.start // 32 : -(-rows.stop // 32), columns.start // 64 : -(-columns.stop // 64)]
    values = dequantise(weight[part], touched, block, (rows.start % 32, columns.start % 64))
    np.testing.assert_array_equal(values, _reference(weight, scale, block)[part], strict=True)


def test_the_published_grid_of_a_partial_matrix() -> None:
    assert scale_shape((576, 7168), (128, 128)) == (5, 56)


@pytest.mark.parametrize("shape", _SHAPES)
def test_quantise_fills_each_block_and_loses_at_most_half_a_step(shape: tuple[int, int]) -> None:
    # Blocks of very different magnitudes, so that a scale taken from another block would show.
    rng = np.random.default_rng(1)
    grid = scale_shape(shape, (128, 128))
    magnitude = np.kron(10.0 ** rng.uniform(-6, 3, grid), np.ones((128, 128)))[: shape[0], : shape[1]]
    weight = (rng.standard_normal(shape) * magnitude).astype(np.float32)
    quantised, scale = quantise(weight)
    chex.assert_shape([quantised, scale], [shape, grid])
    assert (quantised.dtype, scale.dtype) == (FP8, np.float32)
    for i in range(grid[0]):
        for j in range(grid[1]):
            here = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            assert scale[i, j] == pytest.approx(np.abs(weight[here]).max() / 448, rel=1e-6)
            assert np.abs(quantised[here].astype(np.float32)).max() == 448
    # E4M3 has three bits after the point: half a step is 2^-4 of the value, and 2^-10 near zero, where it is even.
    error = np.abs(dequantise(quantised, scale, (128, 128)) - weight)
    bound = np.maximum(np.abs(weight) * 2.0**-4, np.kron(scale, np.ones((128, 128)))[: shape[0], : shape[1]] * 2.0**-10)
    assert (error <= bound * (1 + 1e-5)).all()


def test_quantising_what_was_dequantised_gives_it_back() -> None:
    rng = np.random.default_rng(2)
    weight = rng.normal(0, 150, (300, 200)).astype(np.float32).clip(-448, 448).astype(FP8)
    weight[::128, ::128] = 448  # The largest of each block is the largest of the type, as quantising makes it.
    scale = 2.0 ** rng.integers(-12, -6, (3, 2)).astype(np.float32)
    again, scale_again = quantise(dequantise(weight, scale, (128, 128)))
    np.testing.assert_array_equal(scale_again, scale)
    np.testing.assert_array_equal(again.view(np.uint8), weight.view(np.uint8))


def test_scales_that_are_powers_of_two() -> None:
    """The smallest for which nothing exceeds the largest E4M3; values that have them lose nothing."""
    rng = np.random.default_rng(3)
    weight = (rng.standard_normal((300, 200)) * 2.0 ** rng.integers(-9, 9, (300, 1))).astype(np.float32)
    weight[128:256, :128] *= 448 / np.abs(weight[128:256, :128]).max()
    quantised, scale = quantise(weight, scale_fmt="ue8m0")
    _, exact = quantise(weight)
    assert (np.frexp(scale)[0] == 0.5).all()
    assert ((exact <= scale) & (scale < 2 * exact)).all()
    assert scale[1, 0] == 1
    values = dequantise(quantised, scale, (128, 128))
    again = dequantise(*quantise(values, scale_fmt="ue8m0"), (128, 128))
    np.testing.assert_array_equal(again, values, strict=True)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_zeros_stay_zeros(dtype: type) -> None:
    quantised, scale = quantise(np.zeros((130, 5), dtype))
    assert np.isfinite(scale).all()
    assert not dequantise(quantised, scale, (128, 128)).any()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_fp8_cannot_hold_is_refused(bad: float) -> None:
    weight = np.ones((200, 200), np.float32)
    weight[150, 3] = bad
    with pytest.raises(ValueError, match="infinite or NaN"):
        quantise(weight)


def test_block_size_of_a_config() -> None:
    assert block_size({}) is None
    assert block_size({"quantization_config": None}) is None
    assert block_size({"quantization_config": EXPORT_CONFIG}) == (128, 128)
    published = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    assert published == EXPORT_CONFIG
    assert block_size({"quantization_config": {**published, "scale_fmt": "ue8m0", "weight_block_size": [64, 32]}}) == (64, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "quant_method is 'awq'"),
        ({"fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"weight_block_size": None}, "weight_block_size is None"),
        ({"weight_block_size": [128]}, "weight_block_size is"),
        ({"weight_block_size": [128, 0]}, "weight_block_size is"),
    ],
)
def test_other_quantisations_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_size({"quantization_config": {**EXPORT_CONFIG, **change}})


@pytest.mark.parametrize("quantization", ["fp8", [EXPORT_CONFIG], True])
def test_a_quantisation_that_is_no_object_is_refused(quantization: object) -> None:
    with pytest.raises(ValueError, match=r"quantization_config is .*; use an object or null"):
        block_size({"quantization_config": quantization})
