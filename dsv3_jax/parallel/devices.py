"""Accelerators: peak figures of chips, compilation cache, compiler options, early deletion, batches onto the mesh."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from dsv3_jax.parallel.sharding import TOKEN_SPEC

# ----------------------------------------------------------------------------------------------------------------------
# Chips: peak compute, memory and network, as their vendors publish them.


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak compute, memory and network figures of one JAX device, which is a chip or one core of it."""

    bf16_flops: float  # Dense bfloat16 FLOP/s.
    hbm_bytes: float  # HBM bytes/s.
    hbm_gib: float  # HBM that a program can use, GiB (2^30 bytes).
    ici_bytes: float  # Bytes/s out of the device over ICI, all links together, one direction.
    dcn_bytes: float  # Bytes/s out of the device over the data-center network: its share of the host's network cards.
    devices_per_chip: int = 1  # 2 where every core of a chip is a device.


# FLOP/s, HBM, ICI and network: system architecture pages of the Cloud TPU documentation (docs.cloud.google.com/tpu/docs: v5p,
# v5e, v6e, tpu7x). They give ICI as the sum of both directions (GB/s a chip: v5p 1200, v5e 400, v6e 800, tpu7x 1200); the
# figures here are half of that, and agree with older pages (v5p 4800 Gbit/s, v5e 1600). The network is given per chip (Gbit/s:
# v5p 50, v6e and tpu7x 100), for v5e per host of 8 chips (200). HBM of v5e is the older page's 819 GB/s; the newer one says
# 800 GiB/s. A chip of tpu7x is two devices. Usable HBM is the limit in the error of the TPU compiler (libtpu 0.0.42) for a
# program that exceeds it.
CHIPS: dict[str, Chip] = {
    "v5p": Chip(459e12, 2765e9, 95.74, 600e9, 6.25e9),
    "v5e": Chip(197e12, 819e9, 15.75, 200e9, 3.125e9),
    "v6e": Chip(918e12, 1638e9, 31.25, 400e9, 12.5e9),
    "tpu7x": Chip(2307e12 / 2, 7380e9 / 2, 94.75, 600e9 / 2, 12.5e9 / 2, devices_per_chip=2),
}

# Keys are JAX's device kinds. TPUs as above; v4 from its page there (275 TFLOP/s a chip, one device). NVIDIA's data sheets give
# tensor cores with sparsity, of which dense is half (TFLOP/s: H100 SXM and H200 SXM 1979, both NVL cards 1671, H100 PCIe 1513).
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
    """Return the peak dense bfloat16 FLOP/s of a JAX device kind; None if not in `PEAK_FLOPS`, as for CPUs."""
    return PEAK_FLOPS.get(device_kind)


# ----------------------------------------------------------------------------------------------------------------------
# Compilation: the persistent cache, and options of the TPU compiler.


TPU_OPTIONS = {
    # Split each ragged all-to-all into a start and a done, to overlap it with the shared expert.
    "xla_tpu_enable_async_ragged_all_to_all": "true"
}
"""Compiler options of the training step on TPUs, set nowhere else. docs/log.md lists the others that were tried."""


def cache_compilations(folder: str) -> None:
    """Set JAX's compilation cache to `folder`/xla, for programs that take 0.5 s to compile; only process 0 writes to it."""
    jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# ----------------------------------------------------------------------------------------------------------------------
# Buffer donation outside jit.


def release(old: Any, made: Any) -> None:
    """If `old` is a jax.Array, wait for all arrays of the tree `made`, then delete it; `made` must not contain it."""
    if isinstance(old, jax.Array):
        jax.block_until_ready(made)
        old.delete()


# ----------------------------------------------------------------------------------------------------------------------
# From host to mesh: batches, of which each process supplies the rows of its devices, and values equal on every process.


class BatchPlacement:
    """Placement of host batches [B, T] on a mesh, split as `TOKEN_SPEC`."""

    def __init__(self, mesh: Mesh, batch_size: int, sequence_length: int) -> None:
        self._shape = batch_size, sequence_length
        self._sharding = NamedSharding(mesh, TOKEN_SPEC)
        held = self._sharding.addressable_devices_indices_map(self._shape)
        self.rows = sorted({row for index in held.values() if index for row in range(*index[0].indices(batch_size))})
        """Indices of the rows of each batch that devices of this process hold, ascending."""

    def place(self, array: np.ndarray) -> jax.Array:
        """Put a batch [B, T], or micro-batches [A, B, T], on the mesh; `array` holds all B rows, or only `rows` of each.

        Raises ValueError if the array has neither number of rows, or not T columns.
        """
        batch_size, length = self._shape
        leading = array.shape[:-2]
        rows = list(range(batch_size)) if array.shape[-2] == batch_size else self.rows
        if array.shape[-2:] != (len(rows), length):
            raise ValueError(f"a batch of {array.shape} must end in ({len(self.rows)} or {batch_size} rows, {length} tokens)")
        position = {row: i for i, row in enumerate(rows)}

        def part(index: Any) -> np.ndarray:
            wanted = [position[row] for row in range(*index[-2].indices(batch_size))]
            return array[..., wanted, index[-1]]

        sharding = NamedSharding(self._sharding.mesh, PartitionSpec(*(None for _ in leading), *TOKEN_SPEC))
        return jax.make_array_from_callback((*leading, *self._shape), sharding, part)


def replicate(tree: Any, sharding: Sharding) -> Any:
    """Put a tree of arrays, equal on every process, on devices as `sharding` says (replicated or split); return it.

    Their equality is not checked; `jax.device_put` would do so, with a collective for each array.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def place(array: Any) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree)
