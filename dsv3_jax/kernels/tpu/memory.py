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
"""VMEM left to the compiler by a kernel that fills the rest."""


class Machine(NamedTuple):
    """One device."""

    cores: int
    """TensorCores that share it: they divide the first dimension of a grid among them."""
    vmem_bytes: int
    """VMEM of each."""


def sublanes(dtype: Any) -> int:
    """Return the rows of a register: the unit of a block's second to last dimension, and of the start of a slice."""
    return 32 // jnp.dtype(dtype).itemsize


def round_up(size: int, multiple: int) -> int:
    """Return the least multiple that is no less than `size`."""
    return -(-size // multiple) * multiple


def next_power(size: int) -> int:
    """Return the least power of two that is no less than `size`."""
    return 1 << (size - 1).bit_length()


def halved(size: int) -> int:
    """Return about half of a number of columns, in whole lanes."""
    return max(size // 2 // LANES, 1) * LANES


def shared(size: int, length: int, cores: int) -> int:
    """Return the largest tile of `size`, or of fewer whole lanes, of which `length` has a multiple of `cores`."""
    smaller = range((size - 1) // LANES * LANES, 0, -LANES)
    return next((s for s in (size, *smaller) if -(-length // s) % cores == 0), size)


def check_dtype(what: str, dtype: Any, remedy: str) -> None:
    """Raise ValueError for a dtype that the kernels do not support."""
    if jnp.dtype(dtype).name not in ("float32", "bfloat16"):
        raise ValueError(f"{what} got {jnp.dtype(dtype).name}; it takes float32 and bfloat16, or use {remedy}")


def compiler_params(*dimensions: Any, machine: Machine) -> pltpu.CompilerParams:
    """Return parameters with nearly all of VMEM, and the semantics of the grid's dimensions."""
    return pltpu.CompilerParams(dimension_semantics=dimensions, vmem_limit_bytes=machine.vmem_bytes - MIB)


def estimate(flops: int, *arrays: Any) -> pl.CostEstimate:
    """Return the cost that XLA schedules with: the arithmetic, and every array moved once."""
    moved = sum(array.size * array.dtype.itemsize for array in arrays)
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)
