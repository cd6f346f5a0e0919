"""Topologies by name, and the TPU compiler that may be missing."""

from __future__ import annotations

import pytest

from dsv3_jax.parallel.devices import CHIPS
from dsv3_jax.plan import topology


def test_chips() -> None:
    assert topology.chip_of("v5p:8x8x8") is CHIPS["v5p"]
    assert topology.chip_of("v6e:16x16") is CHIPS["v6e"]


@pytest.mark.parametrize("name", ["v5p", "v4:2x2x1", "v5p:", "v5p:8xA", "v5p:0x2x2", "v5p:²x2x2", "8x8x8"])
def test_a_name_of_no_topology(name: str) -> None:
    with pytest.raises(ValueError, match=r"is not chip:AxBxC with a chip of v5p, v5e, v6e, tpu7x"):
        topology.chip_of(name)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "find_tpu_compiler", lambda: None)
    with pytest.raises(ValueError, match=r"takes the TPU compiler, which is not found; .*--devices N compiles for N CPU"):
        topology.tpu_devices("v5p:2x2x1")


def test_devices(tpu_compiler: str) -> None:
    assert len(topology.tpu_devices("v5p:2x2x2")) == 8
    two = topology.tpu_devices("v5p:2x2x1", 2)
    assert sorted(device.slice_index for device in two) == [0, 0, 0, 0, 1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"topology v5p:3x5x7 is refused by the TPU compiler"):
        topology.tpu_devices("v5p:3x5x7")


def test_more_cpu_devices_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"9 CPU devices are asked for where JAX runs on 8 already"):
        topology.use_cpu_devices(9)
