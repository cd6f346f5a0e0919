"""What the accelerators can do at their peak, by the vendors' own figures."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from dsv3_jax.parallel.sharding import TOKEN_SPEC


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


# ----------------------------------------------------------------------------------------------------------------------
# How programs are compiled: the persistent cache, and what the TPU compiler is asked for by name.


TPU_OPTIONS = {
    # Splits each ragged all-to-all into a start and a done, so that the shared expert is computed while rows travel.
    "xla_tpu_enable_async_ragged_all_to_all": "true",
}
"""Options of the training step's program on TPUs; the only place they are set. docs/log.md says what others were tried."""


def cache_compilations(folder: str) -> None:
    """Keeps compiled programs under `folder`/xla, so that one is compiled once on a machine and read back at the next start.

    Of several processes JAX has only the first write it.
    """
    jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# ----------------------------------------------------------------------------------------------------------------------
# Arrays that make way for what is made of them, outside of jitted programs.


def release(old: Any, made: Any) -> None:
    """Deletes `old`, if it is an array on a device, once everything in the tree `made` is there; nothing in it may be `old`."""
    if isinstance(old, jax.Array):
        jax.block_until_ready(made)
        old.delete()


# ----------------------------------------------------------------------------------------------------------------------
# From the host onto the mesh: batches, of which each process makes the rows that its devices hold, and what all hold
# alike.


class BatchPlacement:
    """Where the rows of [B, T] batches go."""

    def __init__(self, mesh: Mesh, batch_size: int, sequence_length: int) -> None:
        self._shape = batch_size, sequence_length
        self._sharding = NamedSharding(mesh, TOKEN_SPEC)
        held = self._sharding.addressable_devices_indices_map(self._shape)
        self.rows = sorted({row for index in held.values() if index for row in range(*index[0].indices(batch_size))})
        """The rows of each batch that devices of this process hold."""

    def place(self, array: np.ndarray) -> jax.Array:
        """A whole batch [B, T], or micro-batches [A, B, T], on the mesh, from this process's rows of each, or all rows.

        Raises:
          ValueError: if the array has neither as many rows as this process holds, nor as many as the batch.
        """
        batch_size, length = self._shape
        leading = array.shape[:-2]
        rows = list(range(batch_size)) if array.shape[-2] == batch_size else self.rows
        if array.shape[-2:] != (len(rows), length):
            raise ValueError(f"a batch of shape {array.shape} has neither the {len(self.rows)} rows of this process nor all")
        place = {row: i for i, row in enumerate(rows)}

        def part(index: Any) -> np.ndarray:
            wanted = [place[row] for row in range(*index[-2].indices(batch_size))]
            return array[..., wanted, index[-1]]

        sharding = NamedSharding(self._sharding.mesh, PartitionSpec(*(None for _ in leading), *TOKEN_SPEC))
        return jax.make_array_from_callback((*leading, *self._shape), sharding, part)


def replicate(tree: Any, sharding: Sharding) -> Any:
    """Arrays that every process holds alike, onto the devices of `sharding`.

    `jax.device_put` would have the processes compare what they hold, which takes a collective for each array.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda array: _place_alike(np.asarray(array), sharding), tree)


def _place_alike(array: np.ndarray, sharding: Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
