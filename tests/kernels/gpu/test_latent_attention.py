"""Attention over cached latents by the kernel for Hopper, interpreted on a CPU."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.kernels import latent_attention as contract
from dsv3_jax.kernels.gpu import hopper
from dsv3_jax.kernels.gpu import latent_attention as kernel
from dsv3_jax.kernels.gpu.latent_attention import number_of_splits, past_attention_gpu
from dsv3_jax.kernels.latent_attention import latent_attention, past_attention_chunked
from tests.h100 import h100_devices
from tests.kernels.gpu_interpreter import (
    INTERPRETED,
    assert_no_race,
    assert_no_spills,
    gpu_interpreter,
    needs_accumulator_stores,
)
from tests.kernels.test_latent_attention import SCALE, case
from tests.tolerances import TOLERANCE

__all__ = ["gpu_interpreter"]

C, P = 128, 64
SHORT = 0, 1, 3, 4, 5
ALL = 0, 1, 2, 3, 4, 5
"""Of the sequences of `case`, those with 129, 0, (1000,) 300, 1 and 127 tokens."""


@needs_accumulator_stores
@pytest.mark.usefixtures("gpu_interpreter")
@pytest.mark.parametrize(
    ("new", "page", "splits", "sequences"),
    [
        (1, 16, 3, SHORT),
        (3, None, 1, SHORT),
        pytest.param(1, 64, 18, ALL, marks=pytest.mark.slow),
        *(
            pytest.param(*case, ALL, marks=pytest.mark.nightly)
            for case in ((1, None, 1), (3, None, 4), (1, 16, 3), (3, 128, 2))
        ),
    ],
)
def test_latent_attention(new: int, page: int | None, splits: int, sequences: tuple[int, ...], monkeypatch: Any) -> None:
    """Mixed lengths, around the borders of blocks, and sequences without a past; garbage wherever no token is; empty splits."""
    own, cached, cached_length_B, expected = case(new, "bfloat16", page, (C, P))
    taken = np.array(sequences)
    own, cached_length_B, expected = [a[taken] for a in own], cached_length_B[taken], expected[taken]
    if page is None:
        cached = jax.tree.map(lambda a: a[taken], cached)
    else:
        cached = cached._replace(page_table_BJ=cached.page_table_BJ[taken])
    monkeypatch.setattr(kernel, "number_of_splits", lambda *_: splits)
    monkeypatch.setitem(
        contract._BACKENDS, "interpreted", functools.partial(past_attention_gpu, num_blocks=1, interpret=INTERPRETED)
    )
    own, cached, cached_length_B = jax.tree.map(jnp.asarray, (own, cached, cached_length_B))
    found = latent_attention(*own, cached, cached_length_B, scale=SCALE, backend="interpreted")
    chex.assert_shape(found, expected.shape)
    assert found.dtype == jnp.bfloat16
    chex.assert_trees_all_close(np.asarray(found, np.float64), expected, **TOLERANCE["bfloat16"])
    assert_no_race()


@needs_accumulator_stores
@pytest.mark.usefixtures("gpu_interpreter")
@pytest.mark.parametrize("splits", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_more_rows_than_a_block_has(splits: int, monkeypatch: Any) -> None:
    """80 rows are a whole block and a part of one. Logits are large, and largest in the first block or in the last."""
    rng = np.random.default_rng(0)
    shapes = (3, 2, 40, C), (3, 2, 40, P), (3, 144, C), (3, 144, P)
    q, q_rope, latent, rope = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    rope[0] *= np.linspace(1, 20, 144)[:, None]
    rope[1] *= np.linspace(20, 1, 144)[:, None]
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in (q, q_rope, latent, rope)]
    cached_length_B = jnp.asarray(np.array([144, 136, 0], np.int32))
    monkeypatch.setattr(kernel, "number_of_splits", lambda *_: splits)
    found = past_attention_gpu(*arrays, None, cached_length_B, scale=SCALE, num_blocks=splits, interpret=INTERPRETED)
    wide = [jnp.asarray(np.asarray(a, np.float32)) for a in arrays]
    expected = jax.jit(functools.partial(past_attention_chunked, page_table_BJ=None, scale=SCALE))(
        *wide, cached_length_B=cached_length_B
    )
    chex.assert_trees_all_close(found, expected, **TOLERANCE["bfloat16"])
    assert found[0].dtype == found[1].dtype == jnp.float32
    assert (np.asarray(found[0])[2] == 0).all()
    assert (np.asarray(found[1])[2] == -np.inf).all()
    assert_no_race()


@pytest.mark.parametrize(
    ("tiles", "blocks", "splits"),
    [(256, 64, 1), (16, 64, 8), (2, 64, 64), (2, 2048, 64), (100, 64, 1), (1000, 64, 1), (1, 1, 1)],
)
def test_sequences_are_cut_as_often_as_it_keeps_all_multiprocessors_busy(tiles: int, blocks: int, splits: int) -> None:
    assert number_of_splits(tiles, blocks, num_blocks=132) == splits


@pytest.mark.parametrize(
    ("widths", "page", "dtype", "message"),
    [
        ((512, 64), 64, jnp.float32, "multiplies bfloat16, and got float32"),
        ((512, 64), 64, jnp.float16, "multiplies bfloat16, and got float16"),
        ((192, 64), 64, jnp.bfloat16, "latents of a multiple of 128 values and rotary keys of 64, and got 192 and 64"),
        ((512, 32), 64, jnp.bfloat16, "latents of a multiple of 128 values and rotary keys of 64, and got 512 and 32"),
        ((640, 64), 64, jnp.bfloat16, "room for 576 values a token, 512 of them latent, and got 640 and 64"),
        ((512, 128), 64, jnp.bfloat16, "room for 576 values a token, 512 of them latent, and got 512 and 128"),
        ((512, 64), 24, jnp.bfloat16, r"pages \(or a contiguous cache\) of a multiple of 16 tokens, and got 24"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(widths: tuple[int, int], page: int, dtype: Any, message: str) -> None:
    def shape(*axes: int, of: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(axes, of)

    arrays = [shape(2, 1, 128, width) for width in widths] + [shape(8, page, width) for width in widths]
    attend = functools.partial(past_attention_gpu, scale=SCALE, num_blocks=132)
    with pytest.raises(ValueError, match=f"{message}; use model.cache_backend chunked"):
        jax.eval_shape(attend, *arrays, shape(2, 4, of=jnp.int32), shape(2, of=jnp.int32))


def test_other_gpus_are_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(hopper, "current_gpu", lambda: hopper.GPU("NVIDIA A100-SXM4-80GB", 108))
    arrays = [jnp.zeros(shape, jnp.bfloat16) for shape in ((1, 1, 1, C), (1, 1, 1, P), (1, 64, C), (1, 64, P))]
    with pytest.raises(ValueError, match=r"it is written for Hopper .* for NVIDIA A100.*; use model.cache_backend chunked"):
        past_attention_gpu(*arrays, None, jnp.ones(1, jnp.int32), scale=SCALE)


def published(mesh: Mesh, new: int, page: int | None) -> tuple[Any, list[Any]]:
    """The kernel at the published widths, inside `jax.shard_map` with its checks, and arrays without content."""
    B, S, split = 16, 4096, NamedSharding(mesh, PartitionSpec("x"))
    pool = (B, S) if page is None else (B * S // page, page)
    shapes = (B, new, 128, 512), (B, new, 128, 64), (*pool, 512), (*pool, 64)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=split) for shape in shapes]
    table = None if page is None else jax.ShapeDtypeStruct((B, S // page), jnp.int32, sharding=split)
    length = jax.ShapeDtypeStruct((B,), jnp.int32, sharding=split)
    spec = PartitionSpec("x")
    attend = jax.shard_map(functools.partial(past_attention_gpu, scale=SCALE), mesh=mesh, in_specs=spec, out_specs=spec)
    return jax.jit(attend), [*arrays, table, length]


@pytest.mark.parametrize(("new", "page"), [(3, 16), (1, None), pytest.param(1, 64, marks=pytest.mark.nightly)])
def test_lowers_for_cuda(new: int, page: int | None, monkeypatch: Any) -> None:
    """On a machine without a GPU."""
    monkeypatch.setattr(hopper, "current_gpu", lambda: hopper.GPU("NVIDIA H200", 132))
    attend, arrays = published(Mesh(np.array(jax.devices()[:2]), ("x",)), new, page)
    text = attend.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    assert text.count("@mosaic_gpu_v2") == 1
    assert "latent_attention" in text


@pytest.mark.parametrize(
    ("new", "page"),
    [
        pytest.param(1, 64, marks=pytest.mark.slow),
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in ((1, None), (3, 16))),
    ],
)
def test_compiles_for_an_h100(new: int, page: int | None, cuda_compiler: str, tmp_path: Path, monkeypatch: Any) -> None:
    """To machine code, in which no register is spilled."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    mesh = Mesh(np.array(h100_devices(2)), ("x",))
    attend, arrays = published(mesh, new, page)
    with jax.set_mesh(mesh):
        attend.lower(*arrays).compile()
    assert_no_spills(tmp_path, ["latent_attention"])
