"""The device mesh: its sizes, its axes, what is traced on it, and what does not divide."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import Config, MeshConfig, TrainConfig
from dsv3_jax.parallel.mesh import AXES, check_fits, current_mesh, current_platform, describe, make_mesh, without_mesh
from tests.model.tiny import CONFIG, DENSE_ONLY

RUN = Config(model=CONFIG, train=TrainConfig(batch_size=8, sequence_length=24))


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"fsdp": 8}, (1, 8, 1, 1, 1)),
        ({"data": 2, "expert": -1}, (2, 1, 4, 1, 1)),
        ({"context": 2, "expert": 2, "tensor": -1}, (1, 1, 2, 2, 2)),
    ],
)
def test_sizes_and_order(sizes: dict[str, int], shape: tuple[int, ...]) -> None:
    """Every device once, the last axes between neighbours."""
    mesh = make_mesh(MeshConfig(**sizes))
    assert mesh.axis_names == AXES == ("data", "fsdp", "expert", "context", "tensor")
    assert mesh.devices.shape == shape
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    assert mesh.are_all_axes_auto


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 16}, {"data": 3}, {"data": 3, "fsdp": -1}])
def test_sizes_that_do_not_multiply_to_the_devices(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="8 devices"):
        make_mesh(MeshConfig(**sizes))


class _Chip:
    """A device of one of several TPU slices, all in a row."""

    platform = "tpu"
    device_kind = "TPU v5"

    def __init__(self, number: int, slices: int, a_slice: int) -> None:
        self.id, self.slice_index, self.process_index = number, number // a_slice, number // a_slice
        self.coords, self.core_on_chip = (number % a_slice, 0, 0), 0
        assert self.slice_index < slices


def test_only_the_data_axis_crosses_slices() -> None:
    chips = [_Chip(number, 2, 4) for number in range(8)]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2), chips)
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    assert slices[0].max() == 0
    assert slices[1].min() == 1
    with pytest.raises(ValueError, match=r"mesh\.data is 1; it must be a multiple of the 2 slices"):
        make_mesh(MeshConfig(fsdp=8), chips)


def test_the_mesh_of_what_is_traced() -> None:
    """Of several devices only, and not where nothing will be computed."""
    seen: list[Any] = []

    def look(x: jax.Array) -> jax.Array:
        mesh = current_mesh()
        seen.append(None if mesh is None else dict(mesh.shape))
        with without_mesh():
            assert current_mesh() is None
        return x

    jax.jit(look)(jnp.ones(3))
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        jax.jit(look)(jnp.ones(4))
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=8))):
        jax.jit(look)(jnp.ones(5))
    assert seen == [None, None, {"data": 1, "fsdp": 8, "expert": 1, "context": 1, "tensor": 1}]


def test_platform_and_description() -> None:
    assert current_platform() == "cpu"
    mesh = make_mesh(MeshConfig(fsdp=2, expert=4))
    with jax.set_mesh(mesh):
        assert current_platform() == "cpu"
    assert describe(mesh) == "8 cpu devices (fsdp 2 x expert 4)"


@pytest.mark.parametrize(
    ("sizes", "changes", "complaint"),
    [
        (
            {"data": 2, "expert": 4},
            {"batch_size": 12},
            "train.batch_size is 12, which mesh.data (2) * mesh.fsdp (1) * mesh.expert (4) = 8",
        ),
        ({"context": 8}, {"sequence_length": 20}, "train.sequence_length is 20, which mesh.context (8)"),
        ({"tensor": 8}, {}, "model.num_attention_heads is 3, which mesh.tensor (8)"),
        ({"expert": 8}, {"n_routed_experts": 12}, "model.n_routed_experts is 12, which mesh.expert (8)"),
    ],
)
def test_what_does_not_divide_is_named(sizes: dict[str, int], changes: dict[str, int], complaint: str) -> None:
    run = RUN
    for name, value in changes.items():
        group = "train" if hasattr(run.train, name) else "model"
        run = dataclasses.replace(run, **{group: dataclasses.replace(getattr(run, group), **{name: value})})
    with pytest.raises(ValueError, match=re.escape(complaint)):
        check_fits(run, make_mesh(MeshConfig(**sizes)))


def test_what_divides_passes() -> None:
    check_fits(RUN, make_mesh(MeshConfig(expert=8)))
    dense = dataclasses.replace(RUN, model=dataclasses.replace(DENSE_ONLY, n_routed_experts=12))
    check_fits(dense, make_mesh(MeshConfig(expert=8)))  # No experts, nothing to divide.
