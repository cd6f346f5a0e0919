"""Batches onto meshes: each device gets its rows and columns, and a process makes only the rows it holds."""

from __future__ import annotations

import dataclasses
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from dsv3_jax.config import MeshConfig, TrainConfig
from dsv3_jax.parallel.devices import BatchPlacement
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import TOKEN_SPEC

_BATCH_BT = np.arange(8 * 6, dtype=np.int32).reshape(8, 6)
_MESHES = [
    MeshConfig(fsdp=8),
    MeshConfig(fsdp=2, expert=4),
    MeshConfig(data=2, context=2, tensor=2),
    MeshConfig(context=2, tensor=4),
    MeshConfig(tensor=8),
]


def _names(config: MeshConfig) -> str:
    return "-".join(f"{axis}{size}" for axis, size in dataclasses.asdict(config).items() if size > 1)


@pytest.mark.parametrize("config", _MESHES, ids=_names)
def test_every_device_gets_its_part(config: MeshConfig) -> None:
    mesh = make_mesh(config)
    placement = BatchPlacement(mesh, 8, 6)
    placed = placement.place(_BATCH_BT)
    assert placement.rows == list(range(8))
    assert placed.sharding == NamedSharding(mesh, TOKEN_SPEC)
    assert placed.dtype == np.int32
    np.testing.assert_array_equal(placed, _BATCH_BT)
    rows_a_device = 8 // (config.data * config.fsdp * config.expert)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(rows_a_device, 6 // config.context)}


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        (MeshConfig(fsdp=8), [4, 5, 6, 7]),
        (MeshConfig(fsdp=2, expert=4), [4, 5, 6, 7]),
        (MeshConfig(data=2, context=2, tensor=2), [4, 5, 6, 7]),
        # The processes split the sequences, or share them, and so both make every row.
        (MeshConfig(context=2, tensor=4), list(range(8))),
        (MeshConfig(tensor=8), list(range(8))),
    ],
    ids=lambda value: _names(value) if isinstance(value, MeshConfig) else "",
)
def test_a_process_makes_the_rows_of_its_devices(config: MeshConfig, rows: list[int]) -> None:
    """As the second of two processes would: four of the eight devices are its own."""
    mesh = make_mesh(config)
    with _own_devices(mesh.devices.flat[4:]):
        placement = BatchPlacement(mesh, 8, 6)
    assert placement.rows == rows

    made: dict[jax.Device, np.ndarray] = {}

    def make(shape: tuple[int, ...], sharding: NamedSharding, part) -> None:
        made.update({device: part(sharding.devices_indices_map(shape)[device]) for device in mesh.devices.flat[4:]})

    with mock.patch.object(jax, "make_array_from_callback", make):
        placement.place(_BATCH_BT[rows])
    whole = {shard.device: np.asarray(shard.data) for shard in BatchPlacement(mesh, 8, 6).place(_BATCH_BT).addressable_shards}
    for device, part in made.items():
        np.testing.assert_array_equal(part, whole[device])


@pytest.mark.parametrize("shape", [(3, 6), (8, 5), (0, 6)])
def test_a_batch_of_another_shape_is_refused(shape: tuple[int, int]) -> None:
    mesh = make_mesh(MeshConfig(fsdp=8))
    with _own_devices(mesh.devices.flat[4:]):
        placement = BatchPlacement(mesh, 8, 6)
    with pytest.raises(ValueError, match=r"must end in \(4 or 8 rows, 6 tokens\)"):
        placement.place(np.zeros(shape, np.int32))


def test_processes_together_make_each_row_once() -> None:
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    batch_size = TrainConfig().batch_size * 4
    rows: list[int] = []
    for first in range(0, 8, 2):
        with _own_devices(mesh.devices.flat[first : first + 2]):
            rows += BatchPlacement(mesh, batch_size, 6).rows
    assert rows == list(range(batch_size))


def _own_devices(own) -> mock._patch:
    """A context in which only `own` devices belong to this process."""
    return mock.patch.object(
        NamedSharding,
        "addressable_devices_indices_map",
        lambda self, shape: {device: index for device, index in self.devices_indices_map(shape).items() if device in set(own)},
    )
