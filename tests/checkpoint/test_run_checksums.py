"""One number per array: the same on any mesh, another after any change."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.checkpoint.run import _checksum, checksums
from dsv3_jax.plan.topology import tpu_devices
from tests.checkpoint.tiny import MESHES, make_mesh

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint32, jnp.int8, jnp.uint8]


def values(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> np.ndarray:
    """Random bits: negative zeros, denormals, infinities and NaNs of all kinds are among them."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(np.random.default_rng(seed).bytes(size), dtype).reshape(shape).copy()


def of(array: Any) -> int:
    (number,) = checksums({"a": array}).values()
    return number


@np.errstate(over="ignore")
def mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*(((3, 5, 8), dtype) for dtype in DTYPES), ((), jnp.float32), ((1,), jnp.bfloat16), ((17,), jnp.int8)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_is_a_sum_of_hashed_bits_and_places(shape: tuple[int, ...], dtype: Any) -> None:
    array = values(shape, dtype)
    bits = array.view(f"uint{8 * array.dtype.itemsize}").astype(np.uint32)
    place = np.zeros(shape, np.uint32)
    for axis, index in enumerate(np.indices(shape, np.uint32)):
        place = place + index * np.uint32((0x9E3779B9 * (axis + 1) ^ 0x85EBCA6B) % 2**32 | 1)
    assert of(array) == int(mixed(bits ^ place).sum(dtype=np.uint32))


SPLIT = PartitionSpec(None, "fsdp", ("expert", "tensor"))


@pytest.mark.parametrize(
    ("mesh", "spec"),
    [*((mesh, SPLIT) for mesh in MESHES), ("fsdp 2, expert 4", PartitionSpec("expert")), ("expert 8", PartitionSpec())],
    ids=str,
)
def test_does_not_depend_on_the_mesh(mesh: str, spec: PartitionSpec) -> None:
    """Of one type but on the first mesh: what a type changes happens within a device."""
    for dtype in (jnp.float32, jnp.bfloat16) if mesh == "fsdp 2, expert 2, tensor 2" else (jnp.bfloat16,):
        array = values((8, 16, 24), dtype)
        assert of(jax.device_put(array, NamedSharding(make_mesh(**MESHES[mesh]), spec))) == of(array)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_any_bit_and_any_exchange_changes_it(dtype: Any) -> None:
    array = values((6, 7), dtype)
    seen = {of(array)}
    bits = array.view(f"uint{8 * array.dtype.itemsize}")
    for bit in range(8 * array.dtype.itemsize):
        changed = bits.copy()
        changed[3, 4] ^= bits.dtype.type(1) << bits.dtype.type(bit)
        seen.add(of(changed.view(dtype)))
    others = [np.roll(array, 1, 0), np.roll(array, 1, 1), np.flip(array, 0), np.flip(array, 1), np.zeros_like(array)]
    seen |= {of(other) for other in others}
    assert len(seen) == 1 + 8 * array.dtype.itemsize + len(others)


def test_signs_of_zero_differ() -> None:
    assert of(np.float32([0.0])) != of(np.float32([-0.0]))


def compiled(devices: list[Any], shape: tuple[int, ...], dtype: Any) -> Any:
    mesh = Mesh(np.array(devices), ("fsdp",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    return _checksum.lower(jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)).compile()


def test_nothing_is_gathered() -> None:
    """(XLA writes the hashes of a shard down on CPUs, before it adds them.)"""
    program = compiled(jax.devices(), (64, 512, 512), jnp.float32)
    assert "all-gather" not in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 1.01 * 64 * 512 * 512 * 4 / 8


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.nightly), jnp.bfloat16])
def test_no_copy_is_made_of_arrays_of_more_than_4_billion_elements(tpu_compiler: str, dtype: Any) -> None:
    """The experts of the published model, on eight chips."""
    program = compiled(tpu_devices("v5p:2x2x2"), (58, 256, 2048, 1024), dtype)
    assert "all-gather" not in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 2**20


def test_more_than_32_bits_an_element_are_refused() -> None:
    with pytest.raises(ValueError, match="params/w is float64; a checkpoint holds arrays of 32 bits an element at most"):
        checksums({"params": {"w": np.zeros(3)}})
