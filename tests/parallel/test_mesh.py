"""The mesh of a run: one device so far, and no silent use of fewer than were asked for."""

from __future__ import annotations

import re

import jax
import pytest

from dsv3_jax.config import MeshConfig
from dsv3_jax.parallel.mesh import single_device


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(fsdp=-1), MeshConfig(data=1, expert=-1)])
def test_a_mesh_of_one_place_is_the_first_device(config: MeshConfig) -> None:
    assert single_device(config) == jax.devices()[0]
    assert len(jax.devices()) == 8


@pytest.mark.parametrize("sizes", [{"expert": 4}, {"data": 2, "fsdp": -1}, {"fsdp": 8, "tensor": 2}])
def test_a_larger_mesh_is_refused_by_its_axes(sizes: dict[str, int]) -> None:
    larger = {name: size for name, size in sizes.items() if size > 1}
    with pytest.raises(
        NotImplementedError, match=re.escape(f"mesh {larger}: meshes of several devices are not implemented yet")
    ):
        single_device(MeshConfig(**sizes))
