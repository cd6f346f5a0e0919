"""Attention for Hopper GPUs, interpreted on a CPU: against softmax attention spelled out in float64.

What is jitted is one kernel at a time: several of them in one program wait for each other's threads where cores are few.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.kernels.gpu.attention import attention_hopper
from tests.h100 import h100_devices
from tests.kernels.gpu_interpreter import INTERPRETED, assert_no_race, assert_no_spills, gpu_interpreter
from tests.kernels.reference_attention import assert_is_attention, draw, expected_of

__all__ = ["gpu_interpreter"]

pytestmark = pytest.mark.usefixtures("gpu_interpreter")
KERNELS = "attention", "attention_dk_dv", "attention_dq"
SCALE = 0.09
NARROW = 64, 64
PUBLISHED = 192, 128
WIDE_VALUES = 64, 192
"""Keys come in smaller blocks then."""


def value_and_gradients(attend: Callable[..., jax.Array], arrays: Sequence[Any]) -> tuple[jax.Array, tuple]:
    *inputs, do = map(jnp.asarray, arrays)
    o, pullback = jax.vjp(attend, *inputs)
    return o, pullback(do)


def assert_is_softmax_attention(attend: Callable[..., jax.Array], arrays: list[np.ndarray]) -> None:
    """`attend` at SCALE: values and gradients of the whole sequence."""
    assert_is_attention(value_and_gradients(attend, arrays), expected_of(arrays, SCALE), arrays, "bfloat16")
    assert_no_race()


hopper = functools.partial(attention_hopper, scale=SCALE, interpret=INTERPRETED)


@pytest.mark.parametrize(
    ("length", "batch", "heads", "kv_heads", "widths"),
    [
        (1, 2, 1, 1, NARROW),
        pytest.param(127, 2, 1, 1, NARROW, marks=pytest.mark.nightly),
        pytest.param(128, 1, 2, 2, NARROW, marks=pytest.mark.nightly),
        pytest.param(129, 1, 1, 1, WIDE_VALUES, marks=pytest.mark.nightly),
        pytest.param(300, 1, 2, 1, PUBLISHED, marks=pytest.mark.slow),
    ],
)
def test_it_is_softmax_attention(length: int, batch: int, heads: int, kv_heads: int, widths: tuple[int, int]) -> None:
    """Several sequences and heads; heads that share keys and values; up to three tiles, the last ones with padding."""
    assert_is_softmax_attention(hopper, draw(length, kv_heads, "bfloat16", batch=batch, heads=heads, widths=widths))


@pytest.mark.slow
def test_queries_of_a_part_of_the_sequence() -> None:
    """Each part of the queries against all keys, its place known only while the kernels run.

    Blocks of keys after the last query are not read: they are NaN.
    """
    parts, size, length, longer = 2, 100, 200, 300
    q, k, v, do = arrays = draw(length, 1, "bfloat16", batch=1, heads=1, widths=NARROW)
    # Those of the last query's own block are read, and weighted with zero.
    k_long, v_long = (np.concatenate([a, np.zeros_like(a[:, :56]), np.full_like(a[:, :44], np.nan)], axis=1) for a in (k, v))
    assert k_long.shape[1] == longer

    def in_parts(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        starts = [jnp.asarray(part * size, jnp.int32) for part in range(parts)]
        return jnp.concatenate([hopper(q[:, first : first + size], k, v, first=first) for first in starts], axis=1)

    o, (dq, dk, dv) = value_and_gradients(in_parts, (q, k_long, v_long, do))
    assert_is_attention((o, (dq, dk[:, :length], dv[:, :length])), expected_of(arrays, SCALE), arrays, "bfloat16")
    for gradient in (dk, dv):
        np.testing.assert_array_equal(np.asarray(gradient)[:, length:], 0)
    assert_no_race()


@pytest.mark.parametrize(
    ("dtypes", "widths", "heads", "named"),
    [
        (
            ("float32",) * 3,
            NARROW,
            (2, 2),
            "takes bfloat16, and got q, k and v in float32, float32, float32; use model.attention_backend chunked",
        ),
        (("bfloat16", "float32", "bfloat16"), NARROW, (2, 2), "bfloat16, float32, bfloat16"),
        (("bfloat16",) * 3, (96, 64), (2, 2), "multiples of 64 up to 256, together up to 320, and got 96 and 64"),
        (("bfloat16",) * 3, (64, 320), (2, 2), "and got 64 and 320"),
        (("bfloat16",) * 3, (256, 128), (2, 2), "and got 256 and 128"),
        (("bfloat16",) * 3, NARROW, (3, 2), "and got 3 that share 2"),
    ],
)
def test_what_the_kernels_are_not_written_for_is_refused(
    dtypes: tuple[str, ...], widths: tuple[int, int], heads: tuple[int, int], named: str
) -> None:
    shapes = [(1, 8, count, width) for count, width in ((heads[0], widths[0]), (heads[1], widths[0]), (heads[1], widths[1]))]
    with pytest.raises(ValueError, match=named):
        hopper(*(jnp.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)))


# --- CUDA --------------------------------------------------------------------------------------------------------------


def loss(first: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(attention_hopper(q, k, v, scale=SCALE, first=first).astype(jnp.float32)))


def test_lowers_for_cuda() -> None:
    """To the program that a GPU's driver would be given, on a machine without one."""
    shapes = (1, 1000, 16, 192), (1, 1000, 16, 192), (1, 1000, 16, 128)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    traced = jax.jit(jax.grad(loss, (1, 2, 3))).trace(jax.ShapeDtypeStruct((), jnp.int32), *arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    assert text.count("@mosaic_gpu_v2") == len(KERNELS)
    for kernel in KERNELS:
        assert kernel in text


@pytest.mark.parametrize(
    "widths",
    [
        pytest.param(PUBLISHED, marks=pytest.mark.slow),
        *(pytest.param(widths, marks=pytest.mark.nightly) for widths in (NARROW, WIDE_VALUES, (192, 64))),
    ],
)
def test_compiles_for_an_h100(
    widths: tuple[int, int], cuda_compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code, each of two GPUs with its part of the queries; no register spilled."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    mesh = Mesh(np.array(h100_devices(2)), ("x",), axis_types=(AxisType.Auto,))
    parts, whole = P(None, "x"), P()

    def local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention_hopper(q, k, v, scale=SCALE, first=jax.lax.axis_index("x") * q.shape[1])

    def total(*arrays: jax.Array) -> jax.Array:
        region = jax.shard_map(local, mesh=mesh, in_specs=(parts, whole, whole), out_specs=parts)
        return jnp.sum(jnp.square(region(*arrays).astype(jnp.float32)))

    (X, W), T = widths, 4096
    arrays = [
        jax.ShapeDtypeStruct((1, T, 16, width), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for width, spec in ((X, parts), (X, whole), (W, whole))
    ]
    with jax.set_mesh(mesh):
        jax.jit(jax.grad(total, (0, 1, 2))).lower(*arrays).compile()
    assert_no_spills(tmp_path, list(KERNELS))
