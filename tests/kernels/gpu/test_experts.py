"""The GPU kernels of the expert FFN in Pallas' interpreter against the reference, and lowered for CUDA."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.kernels import expert_ffn
from dsv3_jax.kernels.experts import choose_backend
from dsv3_jax.kernels.gpu import hopper
from dsv3_jax.kernels.gpu.experts import Hopper, expert_ffn_on, expert_ffn_pallas_gpu
from dsv3_jax.kernels.grouped import KERNELS, Epilogue
from tests.h100 import h100_devices
from tests.kernels.gpu_interpreter import INTERPRETED, assert_no_race, assert_no_spills, gpu_interpreter
from tests.kernels.test_experts import value_and_gradients
from tests.tolerances import TOLERANCE

__all__ = ["gpu_interpreter"]

# By rows, hidden size, expert hidden size and experts. Rows past the sum of the sizes are poisoned with NaN.
SIZES = {
    # Widths of a tile and a half, the second tile moved back; of three strips one warpgroup zeroes two.
    (400, 192, 192, 6): {
        # Of 400 rows: poisoned ones follow.
        "around a tile and its halves": [129, 0, 63, 1, 127, 65],
        "one expert has everything": [0, 400, 0, 0, 0, 0],
        "all rows in the last expert": [0, 0, 0, 0, 0, 400],
        "rows past the last group": [5, 0, 128, 192, 0, 0],
        "no rows at all": [0, 0, 0, 0, 0, 0],
    },
    # Fewer rows than a tile, in pieces of every power of two, and widths that are padded.
    (78, 40, 24, 4): {"small groups": [5, 31, 0, 33]},
    (91, 40, 24, 7): {"more small groups": [1, 2, 31, 4, 0, 33, 7]},
    (30, 128, 128, 256): {"256 experts": [(i % 19 == 0) * (1 + i % 3) for i in range(256)]},
    (140, 128, 128, 1): {"one expert": [139]},
}
CASES = {case: (shape, sizes) for shape, cases in SIZES.items() for case, sizes in cases.items()}


class OneByOne(Hopper):
    """Each kernel is a program of its own: several interpreted ones in one program wait for one another's threads."""

    @functools.partial(jax.jit, static_argnums=(0, 1, 2), static_argnames=("num_outputs", "transposed"))
    def grouped_matmul(
        self, kernel: str, epilogue: Epilogue, *arrays: Any, num_outputs: int, transposed: bool
    ) -> list[jax.Array]:
        return super().grouped_matmul(kernel, epilogue, *arrays, num_outputs=num_outputs, transposed=transposed)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def grouped_matmul_dw(self, kernel: str, *arrays: Any) -> list[jax.Array]:
        return super().grouped_matmul_dw(kernel, *arrays)


def make_inputs(shape: Sequence[int], sizes: Sequence[int]) -> tuple[jax.Array, ...]:
    """x, weights, group sizes and the gradient of y: values and gradients are of about unit size."""
    num_rows, hidden, expert_hidden, num_experts = shape
    rng = np.random.default_rng(0)

    def normal(*axes: int, scale: float) -> np.ndarray:
        return (rng.standard_normal(axes) * scale).astype(jnp.bfloat16)

    widths = (hidden, expert_hidden), (hidden, expert_hidden), (expert_hidden, hidden)
    x_RD, *weights = normal(num_rows, hidden, scale=1.0), *(normal(num_experts, *w, scale=w[0] ** -0.5) for w in widths)
    dy_RD = normal(num_rows, hidden, scale=max(*sizes, 1) ** -0.5)
    x_RD[sum(sizes) :] = dy_RD[sum(sizes) :] = np.nan
    return tuple(map(jnp.asarray, (x_RD, *weights, np.asarray(sizes, np.int32), dy_RD)))


def interpreted(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, dy_RD, num_blocks: int = 1) -> dict[str, jax.Array]:
    """On one multiprocessor, which has all tiles, or several: the interpreter compiles a kernel anew for each."""

    def ffn(*differentiated: jax.Array) -> jax.Array:
        return expert_ffn_on(*differentiated, group_sizes_E, OneByOne(num_blocks, INTERPRETED))

    y_RD, gradient = jax.vjp(ffn, x_RD, w_gate_EDF, w_up_EDF, w_down_EFD)
    return {"y": y_RD} | dict(zip(("dx", "dw_gate", "dw_up", "dw_down"), gradient(dy_RD), strict=True))


@pytest.mark.usefixtures("gpu_interpreter")
@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c == "small groups" else pytest.mark.nightly) for c in CASES])
def test_kernels_match_reference(case: str) -> None:
    """Memory is NaN until it is written, as is what a copy reads beyond an array."""
    inputs = make_inputs(*CASES[case])
    found = interpreted(*inputs, num_blocks=2 if case == "rows past the last group" else 1)
    want = value_and_gradients(*inputs, backend="reference")
    chex.assert_trees_all_equal_shapes_and_dtypes(found, want)
    chex.assert_trees_all_close(found, want, **TOLERANCE["bfloat16"])
    used = int(inputs[-2].sum())
    for name in ("y", "dx"):
        np.testing.assert_array_equal(np.asarray(found[name])[used:], 0)
    assert_no_race()


@pytest.mark.slow
@pytest.mark.usefixtures("gpu_interpreter")
def test_poisoned_rows_of_one_group_stay_in_it() -> None:
    """Tiles reach into the next group, in the products of rows and in those of weights.

    Two multiprocessors, a group of more than a tile and one of no rows, widths of a tile and a half, rows past the groups.
    """
    x_RD, *others = make_inputs((208, 192, 192, 4), [60, 130, 0, 7])
    mine_R = np.isin(np.arange(208), np.r_[60:190])  # Rows of expert 1.
    found = interpreted(jnp.asarray(np.where(mine_R[:, None], np.nan, x_RD).astype(x_RD.dtype)), *others, num_blocks=2)
    found, want = (jax.tree.map(np.asarray, a) for a in (found, value_and_gradients(x_RD, *others, backend="reference")))
    others_E, others_R = np.arange(4) != 1, ~mine_R
    for name, kept in {"dw_gate": others_E, "dw_up": others_E, "dw_down": others_E, "y": others_R, "dx": others_R}.items():
        chex.assert_trees_all_close(found[name][kept], want[name][kept], **TOLERANCE["bfloat16"])
    assert np.isnan(found["dw_gate"][1].astype(np.float32)).all()
    for name in ("y", "dx"):
        np.testing.assert_array_equal(found[name][197:], 0)
    assert_no_race()


# --- Which machine, which dtype ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype", "chosen"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", "pallas_gpu"),
        ("NVIDIA H200", "bfloat16", "pallas_gpu"),
        ("NVIDIA GH200 480GB", "bfloat16", "pallas_gpu"),
        ("NVIDIA H200", "float32", "tiles"),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", "tiles"),
        ("NVIDIA B200", "bfloat16", "tiles"),
        ("NVIDIA L20", "bfloat16", "tiles"),
    ],
)
def test_auto_on_a_gpu(kind: str, dtype: str, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels on Hopper, what runs everywhere on other GPUs; named, the kernels are refused there."""
    monkeypatch.setattr(hopper, "current_gpu", lambda: hopper.GPU(kind, 132))
    assert choose_backend("auto", dtype, "gpu") == chosen
    if chosen == "tiles":
        with pytest.raises(ValueError, match=f"expert_backend 'pallas_gpu' .*(for {kind}|computes in {dtype}); use .*'tiles'"):
            choose_backend("pallas_gpu", dtype, "gpu")


def test_elsewhere_they_are_refused() -> None:
    inputs = make_inputs((3, 8, 8, 2), [1, 2])[:-1]
    with pytest.raises(ValueError, match=r"cannot run: it is written for Hopper .* this program is for cpu; use .* tiles"):
        expert_ffn(*inputs, backend="pallas_gpu")
    with pytest.raises(ValueError, match="'pallas_gpu' runs on gpu only, and this program is for cpu"):
        choose_backend("pallas_gpu", "bfloat16")


# --- CUDA --------------------------------------------------------------------------------------------------------------

PUBLISHED = 8192, 7168, 2048, 8
NARROW = 45, 13, 7, 6
OTHER = 1030, 2048, 1408, 16


@pytest.mark.parametrize("shape", [NARROW, *(pytest.param(shape, marks=pytest.mark.nightly) for shape in (PUBLISHED, OTHER))])
def test_lowers_for_cuda(shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the program that a GPU's driver would be given, on a machine without one: values and gradients."""
    monkeypatch.setattr(hopper, "current_gpu", lambda: hopper.GPU("NVIDIA H200", 132))
    R, D, F, E = shape

    def abstract(*axes: int, of: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(axes, of)

    arrays = abstract(R, D), abstract(E, D, F), abstract(E, D, F), abstract(E, F, D)

    def both(*arrays: jax.Array) -> Any:
        *arrays, sizes_E, dy_RD = arrays
        y_RD, transpose = jax.vjp(lambda *a: expert_ffn_pallas_gpu(*a, sizes_E), *arrays)
        return y_RD, transpose(dy_RD)

    traced = jax.jit(both).trace(*arrays, abstract(E, of=jnp.int32), abstract(R, D))
    text = traced.lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    assert text.count("@mosaic_gpu_v2") == len(KERNELS)
    for kernel in KERNELS:
        assert f"expert_{kernel}" in text


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(PUBLISHED, marks=pytest.mark.slow),
        *(pytest.param(shape, marks=pytest.mark.nightly) for shape in (NARROW, OTHER)),
    ],
)
def test_compiles_for_an_h100(
    shape: tuple[int, int, int, int], cuda_compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code, inside `jax.shard_map` over two GPUs, by the backend that the platform chooses; no register spilled."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    R, D, F, E = shape
    mesh = Mesh(np.array(h100_devices(2)), ("x",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, P("x"))

    def abstract(*axes: int, of: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2 * axes[0], *axes[1:]), of, sharding=split)

    def local(*arrays: jax.Array) -> jax.Array:
        return expert_ffn(*arrays, backend=choose_backend("auto", jnp.bfloat16, "gpu"))

    def both(*arrays: jax.Array) -> Any:
        *arrays, sizes_E, dy_RD = arrays
        region = jax.shard_map(local, mesh=mesh, in_specs=(P("x"),) * 5, out_specs=P("x"))
        y_RD, transpose = jax.vjp(lambda *a: region(*a, sizes_E), *arrays)
        return y_RD, transpose(dy_RD)

    with jax.set_mesh(mesh):
        arrays = (
            abstract(R, D),
            abstract(E, D, F),
            abstract(E, D, F),
            abstract(E, F, D),
            abstract(E, of=jnp.int32),
            abstract(R, D),
        )
        jax.jit(both).lower(*arrays).compile()
    assert_no_spills(tmp_path, [f"expert_{kernel}" for kernel in KERNELS])
