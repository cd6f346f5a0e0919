"""TPU memory, as the Pallas kernels need it: layout of arrays in registers, size of VMEM, cost estimates."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

MIB = 2**20
LANES = 128
"""Columns of a register: the unit of a block's last dimension."""
RESERVED_BYTES = 6 * MIB
"""Bytes of VMEM that a kernel's tiles leave to the compiler."""


class Machine(NamedTuple):
    """Number of TensorCores and size of VMEM of one TPU device."""

    cores: int
    """TensorCores of the device: they divide a grid's first dimension among them."""
    vmem_bytes: int
    """Bytes of VMEM of each core."""


def sublanes(dtype: Any) -> int:
    """Return a register's rows, 8 for float32: the unit of a block's second to last dimension, and of a slice's start."""
    return 32 // jnp.dtype(dtype).itemsize


def round_up(size: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is no less than `size`."""
    return -(-size // multiple) * multiple


def next_power(size: int) -> int:
    """Return the least power of two that is no less than `size`."""
    return 1 << (size - 1).bit_length()


def halved(size: int) -> int:
    """Return half of a number of columns, rounded down to a multiple of LANES, but at least LANES."""
    return max(size // 2 // LANES, 1) * LANES


def shared(size: int, length: int, cores: int) -> int:
    """Return the largest tile, `size` or fewer whole LANES, cutting `length` into a multiple of `cores` tiles; else `size`."""
    smaller = range((size - 1) // LANES * LANES, 0, -LANES)
    return next((s for s in (size, *smaller) if -(-length // s) % cores == 0), size)


def check_dtype(what: str, dtype: Any, remedy: str) -> None:
    """Raise ValueError, naming kernel `what` and `remedy`, unless the dtype is float32 or bfloat16."""
    if jnp.dtype(dtype).name not in ("float32", "bfloat16"):
        raise ValueError(f"{what} got {jnp.dtype(dtype).name}; it takes float32 and bfloat16: use one of these, or {remedy}")


def compiler_params(*dimensions: Any, machine: Machine) -> pltpu.CompilerParams:
    """Return compiler parameters: the semantics of each grid dimension, and a limit of all VMEM but 1 MiB."""
    return pltpu.CompilerParams(dimension_semantics=dimensions, vmem_limit_bytes=machine.vmem_bytes - MIB)


def estimate(flops: int, *arrays: Any) -> pl.CostEstimate:
    """Return the cost estimate for XLA's scheduler: `flops`, and the bytes of all arrays, each moved once."""
    moved = sum(array.size * array.dtype.itemsize for array in arrays)
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)
