"""What the accelerators can do at their peak, by the vendors' own figures."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one device as JAX counts devices."""

    bf16_flops: float
    """Dense bfloat16 FLOP/s."""
    hbm_bytes: float
    """HBM bytes/s."""
    hbm_gib: float
    """HBM that a program can use, GiB (2^30 bytes)."""
    ici_bytes: float
    """Bytes/s out of the device over ICI, all its links together, one way."""
    dcn_bytes: float
    """Bytes/s out of the device over the data-center network, one way: its share of the host's cards."""
    devices_per_chip: int = 1
    """2 where every core of a chip is a device of its own."""


# FLOP/s, HBM, ICI and network: the system architecture pages of the Cloud TPU documentation (docs.cloud.google.com/tpu/docs:
# v5p, v5e, v6e, tpu7x). They state ICI in both directions together (v5p 1200 GB/s a chip, v5e 400, v6e 800, tpu7x
# 1200): one way is half of that, and what older pages give as v5p 4800 and v5e 1600 Gbit/s. The network is stated a chip
# (v5p 50 Gbit/s, v6e and tpu7x 100), for v5e a host of 8 chips (200). HBM of v5e is the 819 GB/s of the older page; the
# newer one says 800 GiB/s. A chip of tpu7x is two devices. Usable HBM is what the TPU compiler (libtpu 0.0.42) names when
# it refuses a program.
CHIPS: dict[str, Chip] = {
    "v5p": Chip(459e12, 2765e9, 95.74, 600e9, 6.25e9),
    "v5e": Chip(197e12, 819e9, 15.75, 200e9, 3.125e9),
    "v6e": Chip(918e12, 1638e9, 31.25, 400e9, 12.5e9),
    "tpu7x": Chip(2307e12 / 2, 7380e9 / 2, 94.75, 600e9 / 2, 12.5e9 / 2, devices_per_chip=2),
}

# By the name that JAX gives a device (`device_kind`). TPUs as above, and v4 as its page there (275 TFLOP/s a chip, which is one
# device). NVIDIA's data sheets state tensor cores with sparsity, and dense is half of that: H100 SXM and H200 SXM 1979 TFLOP/s,
# both NVL cards 1671, H100 PCIe 1513.
PEAK_FLOPS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5": CHIPS["v5p"].bf16_flops,
    "TPU v5p": CHIPS["v5p"].bf16_flops,
    "TPU v5 lite": CHIPS["v5e"].bf16_flops,
    "TPU v5e": CHIPS["v5e"].bf16_flops,
    "TPU v6 lite": CHIPS["v6e"].bf16_flops,
    "TPU v6e": CHIPS["v6e"].bf16_flops,
    "TPU7x": CHIPS["tpu7x"].bf16_flops,
    "NVIDIA H100 80GB HBM3": 1979e12 / 2,
    "NVIDIA H100 NVL": 1671e12 / 2,
    "NVIDIA H100 PCIe": 1513e12 / 2,
    "NVIDIA H200": 1979e12 / 2,
    "NVIDIA H200 NVL": 1671e12 / 2,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device at its peak, by JAX's name for it; None of one without figures here, such as a CPU."""
    return PEAK_FLOPS.get(device_kind)
