"""Loads summed between logs, and kept in expert_load.npz."""

from __future__ import annotations

import pathlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import MeshConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.train.report import ExpertLoad

L, E = 3, 8


def loads(steps: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)

    def counts(*shape: int) -> np.ndarray:
        return rng.integers(0, 50, shape).astype(np.float32)

    return [{"moe_layers": counts(L, E), "mtp_0": counts(E)} for _ in range(steps)]


def relative(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Layer by layer, expert by expert."""
    sums = {name: sum(np.float64(part[name]) for part in parts) for name in parts[0]}
    moe = [[layer[e] * E / layer.sum() for e in range(E)] for layer in sums["moe_layers"]]
    return {"moe_layers": np.float32(moe), "mtp_0": np.float32(sums["mtp_0"] * E / sums["mtp_0"].sum())}


@pytest.fixture
def run(tmp_path: pathlib.Path) -> RunDirectory:
    return RunDirectory(str(tmp_path))


def test_the_last_interval_is_kept(run: RunDirectory) -> None:
    load, parts = ExpertLoad(run), loads(5)
    assert ExpertLoad.read(run) == {}
    for interval in (parts[:3], parts[3:]):
        for part in interval:
            load.accumulate(jax.tree.map(jnp.asarray, part))
        written = load.write()
        chex.assert_trees_all_close(written, relative(interval), rtol=1e-6)
        chex.assert_trees_all_equal(ExpertLoad.read(run), written)
        chex.assert_tree_shape_prefix({"a": written["moe_layers"]}, (L, E))
        chex.assert_type(list(written.values()), np.float32)
    assert [path.name for path in pathlib.Path(run.path).iterdir()] == ["expert_load.npz"]
    # Without a step in between nothing is overwritten.
    before = run.expert_load_file.read_bytes()
    assert load.write() == {}
    assert run.expert_load_file.read_bytes() == before


def test_loads_of_a_mesh_stay_on_it_until_they_are_written(run: RunDirectory) -> None:
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    load, parts = ExpertLoad(run), loads(2)
    with jax.set_mesh(mesh), jax.transfer_guard_device_to_host("disallow"):
        for part in parts:
            load.accumulate(jax.device_put(part, NamedSharding(mesh, PartitionSpec())))
    assert all(array.is_fully_replicated for array in load._sums.values())
    chex.assert_trees_all_close(load.write(), relative(parts), rtol=1e-6)


def test_only_the_process_that_writes_leaves_a_file(run: RunDirectory) -> None:
    load, (first, second) = ExpertLoad(run, writes=False), loads(2)
    load.accumulate(first)
    load.write()
    load.accumulate(second)
    chex.assert_trees_all_close(load.write(), relative([second]), rtol=1e-6)
    assert not run.expert_load_file.exists()


def test_a_dense_model_writes_nothing(run: RunDirectory) -> None:
    load = ExpertLoad(run)
    load.accumulate({})
    assert load.write() == {}
    assert not run.expert_load_file.exists()


def test_a_layer_without_tokens_is_zero(run: RunDirectory) -> None:
    load = ExpertLoad(run)
    load.accumulate({"moe_layers": np.array([[0.0, 0.0], [1.0, 3.0]], np.float32)})
    np.testing.assert_array_equal(load.write()["moe_layers"], [[0.0, 0.0], [0.5, 1.5]])


def test_a_write_that_fails_keeps_the_file_before(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    load, (first, second) = ExpertLoad(run), loads(2)
    load.accumulate(first)
    load.write()

    def cut_short(path: Any, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[:20])
        raise OSError("No space left on device")

    monkeypatch.setattr(type(run.path), "write_bytes", cut_short)
    load.accumulate(second)
    with pytest.raises(OSError, match="No space"):
        load.write()
    chex.assert_trees_all_close(ExpertLoad.read(run), relative([first]), rtol=1e-6)


def test_a_damaged_file_is_named(run: RunDirectory) -> None:
    run.expert_load_file.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"expert_load.npz cannot be read \(.*\); remove it"):
        ExpertLoad.read(run)
