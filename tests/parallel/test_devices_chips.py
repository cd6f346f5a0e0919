"""Peaks of the chips against the vendors' sheets."""

from __future__ import annotations

import pytest
from jax._src.pallas.mosaic.tpu_info import chip_version_from_device_kind

from dsv3_jax.parallel.devices import CHIPS, PEAK_FLOPS, peak_flops


def test_chips_are_what_the_vendor_states() -> None:
    """Ratios of the data sheets, a whole chip at a time: TFLOP/s, HBM and both directions of ICI in GB/s, network in Gbit/s."""
    sheets = {
        "v5p": (459, 2765, 1200, 50),
        "v5e": (197, 819, 400, 25),
        "v6e": (918, 1638, 800, 100),
        "tpu7x": (2307, 7380, 1200, 100),
    }
    assert CHIPS.keys() == sheets.keys()
    for name, chip in CHIPS.items():
        n = chip.devices_per_chip
        stated = (
            n * chip.bf16_flops / 1e12,
            n * chip.hbm_bytes / 1e9,
            2 * n * chip.ici_bytes / 1e9,
            8 * n * chip.dcn_bytes / 1e9,
        )
        assert stated == pytest.approx(sheets[name])
    assert {name: chip.hbm_gib for name, chip in CHIPS.items()} == {"v5p": 95.74, "v5e": 15.75, "v6e": 31.25, "tpu7x": 94.75}


@pytest.mark.parametrize(
    ("device_kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5", 459),
        ("TPU v5 lite", 197),
        ("TPU v6 lite", 918),
        ("TPU7x", 2307 / 2),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H200", 989.5),
        ("cpu", None),
        ("NVIDIA A100-SXM4-80GB", None),
        ("TPU v4 lite", None),
    ],
)
def test_peaks_by_the_name_of_the_device(device_kind: str, teraflops: float | None) -> None:
    found = peak_flops(device_kind)
    assert found == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_the_names_are_those_that_jax_knows() -> None:
    tpus = [name for name in PEAK_FLOPS if name.startswith("TPU")]
    assert [name for name in tpus if chip_version_from_device_kind(name) is None] == []
