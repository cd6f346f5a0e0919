"""How many devices and hosts a token's experts can live on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.plan.tables import reach


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    process_index: int


@dataclasses.dataclass(frozen=True)
class FakeMesh:
    shape: dict[str, int]
    devices: np.ndarray


def mesh_of(fsdp: int, expert: int, a_host: int) -> FakeMesh:
    devices = [Device(number, number // a_host) for number in range(fsdp * expert)]
    sizes = dict(zip(AXES, (1, fsdp, expert, 1, 1), strict=True))
    return FakeMesh(sizes, np.array(devices).reshape(tuple(sizes.values())))


@pytest.mark.parametrize(
    ("expert", "a_host", "wanted"),
    [
        (8, 4, (4, 2)),  # A group a device, and two hosts in all.
        (64, 4, (8, 8)),  # A group is eight devices on two hosts: eight in all, as many as a token has experts.
        (64, 8, (8, 4)),  # A group a host.
        (2, 1, (2, 2)),  # No more than there are.
        (1, 1, (1, 1)),
    ],
)
def test_published_model(expert: int, a_host: int, wanted: tuple[int, int]) -> None:
    """Eight experts of four out of eight groups."""
    assert reach(ModelConfig(), mesh_of(2, expert, a_host)) == wanted
