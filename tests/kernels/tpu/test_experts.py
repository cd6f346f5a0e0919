"""The TPU kernels of the expert FFN in Pallas' interpreters against the reference, and through the TPU compiler."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.kernels.grouped import KERNELS, expert_ffn_by
from dsv3_jax.kernels.tpu import experts as tpu_experts
from dsv3_jax.kernels.tpu.experts import (
    TILES,
    KernelConfig,
    RowTiles,
    Tiles,
    WeightTiles,
    expert_ffn_pallas_tpu,
    fit_rows,
    fit_weights,
)
from dsv3_jax.kernels.tpu.memory import MIB, Machine
from dsv3_jax.plan.topology import tpu_devices
from tests.kernels.interpreter import TWO_CORES, assert_no_race
from tests.kernels.test_experts import OFTEN, cases_and_dtypes, expected, layers_on_devices, make_inputs, value_and_gradients
from tests.tolerances import TOLERANCE

ROWS, WEIGHTS = RowTiles(block=32, tile=16, remainder=16, columns=128), WeightTiles(block=32, part=16, left=128, right=128)
SMALL = KernelConfig(Tiles(ROWS, ROWS, ROWS, ROWS, WEIGHTS, WEIGHTS), Machine(cores=2, vmem_bytes=64 * MIB), interpret=True)
TPUS = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@functools.partial(jax.jit, static_argnames="how")
def pallas(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, dy_RD, how: KernelConfig = SMALL) -> dict[str, jax.Array]:
    def ffn(*differentiated: jax.Array) -> jax.Array:
        return expert_ffn_by(*differentiated, group_sizes_E, how)

    y_RD, gradient = jax.vjp(ffn, x_RD, w_gate_EDF, w_up_EDF, w_down_EFD)
    return {"y": y_RD} | dict(zip(("dx", "dw_gate", "dw_up", "dw_down"), gradient(dy_RD), strict=True))


@pytest.mark.parametrize(("case", "dtype"), cases_and_dtypes(OFTEN | {620: []}))  # Blocks are the same whatever the rows.
def test_kernels_match_reference(case: str, dtype: str) -> None:
    inputs = make_inputs(case, dtype)
    found = pallas(*inputs)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected(case, dtype))
    chex.assert_trees_all_close(found, expected(case, dtype), **TOLERANCE[dtype])
    used = int(inputs[-2].sum())
    for name in ("y", "dx"):
        np.testing.assert_array_equal(np.asarray(found[name])[used:], 0)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("some", "float32"),
        ("rows past the last group", "bfloat16"),
        ("no rows at all", "float32"),
        ("one expert", "float32"),
    ],
)
def test_no_race_and_nothing_read_before_it_is_written(case: str, dtype: str, capfd: pytest.CaptureFixture) -> None:
    found = pallas(*make_inputs(case, dtype), how=SMALL._replace(interpret=TWO_CORES))
    chex.assert_trees_all_close(found, expected(case, dtype), **TOLERANCE[dtype])
    assert_no_race(capfd)


def several_tiles(dtype: str) -> tuple[jax.Array, ...]:
    """Widths of several column tiles, the last one cut short; an odd and an even number of them. Few rows past the groups."""
    rng = np.random.default_rng(1)
    R, D, F, sizes = 90, 260, 200, [31, 0, 33, 20]
    shapes = (R, D), (len(sizes), D, F), (len(sizes), D, F), (len(sizes), F, D), (R, D)
    scales = 1, D**-0.5, D**-0.5, F**-0.5, 1 / 8
    arrays = [
        (rng.standard_normal(shape) * scale).astype(jnp.dtype(dtype)) for shape, scale in zip(shapes, scales, strict=True)
    ]
    arrays[0][sum(sizes) :] = arrays[-1][sum(sizes) :] = np.nan
    return tuple(map(jnp.asarray, (*arrays[:4], np.array(sizes, np.int32), arrays[-1])))


@pytest.mark.parametrize(("dtype", "thorough"), [("float32", True), pytest.param("bfloat16", False, marks=pytest.mark.slow)])
def test_several_tiles_and_parts(
    dtype: str, thorough: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Widths over several tiles, and the contracted dimension over several parts.

    The thorough interpreter finds no race, and nothing read before it is written.
    """
    monkeypatch.setattr(tpu_experts, "LARGEST_PART", 128)
    inputs = several_tiles(dtype)
    # A size of its own keeps the compiled program apart from those made with parts of another length.
    how = SMALL._replace(machine=Machine(2, 65 * MIB), interpret=TWO_CORES if thorough else True)
    chex.assert_trees_all_close(pallas(*inputs, how=how), value_and_gradients(*inputs, backend="reference"), **TOLERANCE[dtype])
    if thorough:
        assert_no_race(capfd)


def test_poisoned_rows_of_one_group_stay_in_it() -> None:
    """Groups share blocks: what is NaN in one must not reach the weights or the rows of another."""
    x_RD, *others = make_inputs("some", "float32")
    mine_R = np.isin(np.arange(40), np.r_[7:26])  # Rows of expert 3.
    found = pallas(jnp.asarray(np.where(mine_R[:, None], np.nan, x_RD)), *others)
    found, want = (jax.tree.map(np.asarray, tree) for tree in (found, expected("some", "float32")))
    others_E, others_R = np.arange(6) != 3, ~mine_R
    for name, kept in {"dw_gate": others_E, "dw_up": others_E, "dw_down": others_E, "y": others_R, "dx": others_R}.items():
        chex.assert_trees_all_close(found[name][kept], want[name][kept], **TOLERANCE["float32"])
    assert np.isnan(found["dw_gate"][3]).all()


def test_idle_experts_are_never_read() -> None:
    x_RD, *weights, sizes_E, dy_RD = make_inputs("some", "float32")
    idle_E11 = (np.asarray(sizes_E) == 0)[:, None, None]
    poisoned = (jnp.asarray(np.where(idle_E11, np.nan, w)) for w in weights)
    chex.assert_trees_all_close(pallas(x_RD, *poisoned, sizes_E, dy_RD), expected("some", "float32"), **TOLERANCE["float32"])


def test_inside_shard_map_scan_and_checkpoint_weight_gradients_are_summed() -> None:
    """The interpreters cannot follow what varies where; the compiler below can."""
    found, want = layers_on_devices(functools.partial(expert_ffn_by, products=SMALL), check_vma=False)
    chex.assert_trees_all_close(found, want, rtol=1e-5, atol=1e-4)


# --- Sizes ------------------------------------------------------------------------------------------------------------


def test_sizes_shrink_until_they_fit() -> None:
    tiles, machine = TILES["v5p"].gate_up, Machine(2, 64 * MIB)
    assert fit_rows(tiles, (8192, 7168, 2048), 8, (1, 2, 3), jnp.bfloat16, machine, "k") == tiles
    fitted = fit_rows(tiles, (8192, 7168, 2048), 8, (1, 2, 3), jnp.float32, machine, "k")
    assert (fitted.block, fitted.tile, fitted.columns) == (256, 256, 256)
    few = fit_rows(tiles, (40, 64, 7), 6, (1, 2, 1), jnp.bfloat16, machine, "k")
    assert (few.block, few.tile, few.columns) == (48, 48, 7)
    assert fit_rows(tiles, (2048, 7168, 2048), 8, (1, 2, 3), jnp.bfloat16, machine, "k").tile == 256


def test_rows_that_fit_nowhere_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expert_dx: rows of 131072 bfloat16 values do not fit into 64 MiB.*tiles"):
        fit_rows(TILES["v5p"].dx, (8192, 131072, 2048), 8, (2, 2, 1), jnp.bfloat16, Machine(2, 64 * MIB), "expert_dx")


@pytest.mark.parametrize("F", [256, 512, 704, 1408, 2048])
def test_two_cores_share_the_columns(F: int) -> None:
    """Whatever `tensor` leaves of F."""
    tiles, machine = TILES["v5p"], Machine(2, 64 * MIB)
    columns = fit_rows(tiles.gate_up, (8192, 7168, F), 8, (1, 2, 3), jnp.bfloat16, machine, "k").columns
    assert -(-F // columns) % 2 == 0
    left = fit_weights(tiles.dw_down, (8192, F, 7168), 8, 1, jnp.bfloat16, machine).left
    assert -(-F // left) % 2 == 0


def test_other_dtypes_are_refused() -> None:
    arrays = [jnp.ones(shape, jnp.float16) for shape in ((4, 8), (2, 8, 8), (2, 8, 8), (2, 8, 8))]
    with pytest.raises(ValueError, match="float16; it takes float32 and bfloat16"):
        expert_ffn_pallas_tpu(*arrays, jnp.array([1, 3], jnp.int32))


def test_weight_tiles_shrink_until_they_fit() -> None:
    tiles, small = TILES["v6e"].dw_gate_up, Machine(1, 64 * MIB)
    assert fit_weights(tiles, (8192, 7168, 2048), 8, 2, jnp.bfloat16, Machine(1, 128 * MIB)) == tiles
    fitted = fit_weights(tiles, (8192, 7168, 2048), 8, 2, jnp.float32, small)
    assert fitted.left < tiles.left
    assert fitted.left % 128 == 0
    assert fit_weights(tiles, (2048, 7168, 2048), 8, 2, jnp.bfloat16, small).block == 256


# --- The TPU compiler ---------------------------------------------------------------------------------------------------


SHAPES = [(40, 13, 7, 6, "float32"), (40, 13, 7, 6, "bfloat16"), (1000, 384, 200, 5, "bfloat16"), (3, 128, 128, 2, "bfloat16")]
PUBLISHED = 8192, 7168, 2048, 8, "float32"
"""Where the blocks of the table have to shrink to fit."""
OFTEN_COMPILED = ("v5p", SHAPES[2]), ("v6e", SHAPES[1]), ("v6e", SHAPES[3]), ("tpu7x", SHAPES[0])
"""Each chip, and each shape."""


@pytest.mark.parametrize(
    ("chip", "shape_of"),
    [
        *OFTEN_COMPILED,
        pytest.param("tpu7x", PUBLISHED, marks=pytest.mark.slow),
        *(
            pytest.param(chip, shape, marks=pytest.mark.nightly)
            for chip in TPUS
            for shape in SHAPES
            if (chip, shape) not in OFTEN_COMPILED
        ),
    ],
)
def test_compiles_for_tpus(chip: str, shape_of: tuple[int, int, int, int, str], tpu_compiler: str) -> None:
    """Values and gradients, by the backend that the platform chooses, with every kernel named in the program."""
    R, D, F, E, dtype = shape_of
    mesh = Mesh(np.array(tpu_devices(TPUS[chip])[:1]), ("x",), axis_types=(AxisType.Auto,))
    replicated = NamedSharding(mesh, P())

    def shape(*axes: int, of: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(axes, of, sharding=replicated)

    with jax.set_mesh(mesh):
        arguments = shape(R, D), shape(E, D, F), shape(E, D, F), shape(E, F, D), shape(E, of="int32"), shape(R, D)
        text = value_and_gradients.lower(*arguments, backend="pallas_tpu").compile().as_text()
    for kernel in KERNELS:
        assert f"expert_{kernel}" in text
