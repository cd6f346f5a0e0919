"""Checkpoints written by several processes: parts of sharded arrays, all-or-nothing writes, and a barrier for Orbax."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.checkpoint.faults import io_reason, one_line
from dsv3_jax.parallel.multihost import exchange, is_first_process, kv_delete


@contextlib.contextmanager
def all_or_none(processes: int) -> Iterator[None]:
    """Wait at the end of the block until all processes have left it, and raise on all if one failed in it.

    Args:
      processes: number of processes that enter the block; for one, errors pass unchanged.

    Raises:
      RuntimeError: if another process failed; the process that failed raises its own error.
    """
    if processes == 1:
        yield
        return
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = [str(process) for process, message in enumerate(exchange("" if failure is None else "failed")) if message]
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError(f"process {', '.join(failed)} failed, and prints the reason; nothing is kept, so save again")


@contextlib.contextmanager
def first_alone(processes: int) -> Iterator[bool]:
    """`all_or_none` for work that only process 0 does: yield True there, False on the others, which wait at the end."""
    with all_or_none(processes):
        yield processes == 1 or is_first_process()


def same_everywhere(number: int, processes: int) -> int:
    """Return, on every process, the `number` that process 0 passes; all call it together."""
    return number if processes == 1 else int(exchange(str(number))[0])


def take(array: Any, index: tuple[int, ...]) -> Any:
    """Return array[index] on this process; all processes call it if the array is sharded over them.

    Only that part leaves the devices or travels between them. Parts of jax arrays are unsigned integers with the same bits.
    """
    if not isinstance(array, jax.Array):
        return array[index]
    if array.is_fully_replicated or not isinstance(array.sharding, NamedSharding):
        return _take(array.addressable_data(0) if array.is_fully_replicated else array, index)
    part = _gathering(array.sharding, array.ndim, len(index))(array, index)
    # Waiting keeps the processes in step, so that no more than this part is in flight.
    return jax.block_until_ready(part).addressable_data(0)


@jax.jit
def _take(array: jax.Array, index: tuple[int, ...]) -> jax.Array:
    """Return array[index] as unsigned integers with the same bits; compiled once for all indices."""
    # Converted to integers first: XLA may widen floats on the way, which changes some NaNs.
    return jax.lax.bitcast_convert_type(array, _unsigned(array.dtype.itemsize))[index]


@functools.cache
def _gathering(sharding: NamedSharding, ndim: int, depth: int) -> Callable[[jax.Array, tuple[int, ...]], jax.Array]:
    """Return a jitted function of (array, index into its first `depth` axes): the bits of array[index], on every device.

    Indexing a sharded axis under plain jit gathers all of it first. Here the shard that has the part adds it to the zeros of
    the others: as integers, which keeps every bit, and of at least 32 bits, which every backend can add.
    """
    axes = [(a,) if isinstance(a, str) else tuple(a or ()) for a in (*sharding.spec, *[None] * (ndim - len(sharding.spec)))]
    stack_axes = tuple(axis for dim in axes[:depth] for axis in dim)

    def local(shard: jax.Array, index: tuple[int, ...]) -> jax.Array:
        held = jnp.bool_(True)
        for i, size, dim in zip(index, shard.shape, axes, strict=False):
            if dim:
                held &= jax.lax.axis_index(dim) == i // size
        shard_bits = jax.lax.bitcast_convert_type(shard, _unsigned(shard.dtype.itemsize))
        bits = shard_bits[tuple(i % size for i, size in zip(index, shard.shape, strict=False))]
        if not stack_axes:
            return bits
        wide_bits = jnp.where(held, bits, 0).astype(_unsigned(max(4, bits.dtype.itemsize)))
        return jax.lax.psum(wide_bits, stack_axes).astype(bits.dtype)

    specs = PartitionSpec(*sharding.spec), PartitionSpec()
    part_bits = jax.shard_map(local, mesh=sharding.mesh, in_specs=specs, out_specs=PartitionSpec(*axes[depth:]))
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.jit(part_bits, out_shardings=everywhere)


def _unsigned(nbytes: int) -> np.dtype:
    return np.dtype(f"uint{8 * nbytes}")


# ----------------------------------------------------------------------------------------------------------------------
# Barrier of the threads that save a checkpoint.


class FailedElsewhere(OSError):
    """A write that failed on another process, and did not fail on this one."""


class Barrier:
    """`barrier_sync_fn` for Orbax that raises a failure of one process on the others too; for one thread at a time."""

    def __init__(self) -> None:
        # One for each Checkpoints; every process makes them in the same order.
        self._name = f"dsv3_jax/barrier/{next(_made)}"
        self._turns = itertools.count()

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Wait until all processes are at barrier `key`, without a time limit: `timeout_ms` would limit the time of their work.

        Raises:
          FailedElsewhere: if another process could not write, and this one could.
          RuntimeError: if another process failed for another reason than a write, or waits at another barrier.
        """
        error = sys.exc_info()[1]  # Orbax also calls this while it handles an error.
        reason = io_reason(error) if error is not None else None
        text = None if error is None else reason or one_line(error)
        message = {"at": key, "reason": text, "expected": error is None or reason is not None}
        while True:
            turn = next(self._turns)
            everyone = [json.loads(text) for text in exchange(json.dumps(message), f"{self._name}/{turn}")]
            if turn and is_first_process():
                kv_delete(f"{self._name}/{turn - 1}/")  # All have read it, or they would not have come to this turn.
            if all(theirs["at"] == key for theirs in everyone):
                return
            # A process that failed is at a later barrier, and waits until the others come there too.
            if error is None:
                failed = {process: theirs for process, theirs in enumerate(everyone) if theirs["reason"] is not None}
                text = "; ".join(f"process {process}: {theirs['reason']}" for process, theirs in failed.items())
                expected = all(theirs["expected"] for theirs in failed.values())
                raise FailedElsewhere(text) if failed and expected else RuntimeError(text or f"barriers differ: {everyone}")


_made = itertools.count()
