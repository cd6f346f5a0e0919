"""What every Pallas TPU kernel here has to know of the machine: how arrays lie in its memory, and how much of it there is."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

MIB = 2**20
LANES = 128
"""Columns of a register: the grain of a block's last dimension."""
RESERVED_BYTES = 6 * MIB
"""Fast memory left to the compiler by a kernel that fills the rest."""


class Machine(NamedTuple):
    """One device."""

    cores: int
    """TensorCores that share it: they divide the first dimension of a grid among them."""
    vmem_bytes: int
    """Fast memory of each."""


def sublanes(dtype: Any) -> int:
    """Rows that share a register's sublanes: the grain of a block's last but one dimension, and of where a slice may start."""
    return 32 // jnp.dtype(dtype).itemsize


def round_up(size: int, multiple: int) -> int:
    """The least multiple that is no less."""
    return -(-size // multiple) * multiple


def next_power(size: int) -> int:
    """The least power of two that is no less."""
    return 1 << (size - 1).bit_length()


def shared(size: int, length: int, cores: int) -> int:
    """`size`, or the next smaller whole number of lanes in which `length` makes a number of tiles that all cores share."""
    smaller = range((size - 1) // LANES * LANES, 0, -LANES)
    return next((s for s in (size, *smaller) if -(-length // s) % cores == 0), size)


def check_dtype(what: str, dtype: Any, remedy: str) -> None:
    """Raises ValueError for a dtype that the kernels are not written for."""
    if jnp.dtype(dtype).name not in ("float32", "bfloat16"):
        raise ValueError(f"{what} got {jnp.dtype(dtype).name}; it takes float32 and bfloat16, or use {remedy}")


def compiler_params(*dimensions: Any, machine: Machine) -> pltpu.CompilerParams:
    """All of the fast memory but a little, and which dimensions of the grid the cores share."""
    return pltpu.CompilerParams(dimension_semantics=dimensions, vmem_limit_bytes=machine.vmem_bytes - MIB)


def estimate(flops: int, *arrays: Any) -> pl.CostEstimate:
    """What XLA may count with: the arithmetic, and every array moved once."""
    moved = sum(array.size * array.dtype.itemsize for array in arrays)
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)
