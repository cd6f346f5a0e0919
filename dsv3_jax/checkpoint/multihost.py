"""Several processes writing one checkpoint: parts of arrays travel between them, and all succeed or none does."""

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
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.checkpoint.faults import io_reason, one_line
from dsv3_jax.parallel.multihost import is_first_process, kv_delete, kv_get, kv_set


@contextlib.contextmanager
def all_or_none(processes: int) -> Iterator[None]:
    """If what one process does in the block fails, all of them raise when all have left it.

    Args:
      processes: how many there are; with one, an error simply passes.

    Raises:
      RuntimeError: if it failed elsewhere. The process where it failed raises what it was.
    """
    if processes == 1:
        yield
        return
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = multihost_utils.process_allgather(np.array(failure is not None))
    if failure is not None:
        raise failure
    if failed.any():
        raise RuntimeError(f"process {', '.join(map(str, np.flatnonzero(failed)))} failed, and says why; nothing is kept")


@contextlib.contextmanager
def first_alone(processes: int) -> Iterator[bool]:
    """`all_or_none` for what process 0 does while the others wait: whether this is the one."""
    with all_or_none(processes):
        yield processes == 1 or jax.process_index() == 0


def same_everywhere(number: int, processes: int) -> int:
    """`number` of process 0."""
    return number if processes == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def take(array: Any, index: tuple[int, ...]) -> Any:
    """array[index] on this process; if devices share the array out, all processes that hold it must call this.

    Only that part leaves the devices, or travels between them; it comes as the unsigned integers of its bits.
    """
    if not isinstance(array, jax.Array):
        return array[index]
    if array.is_fully_replicated or not isinstance(array.sharding, NamedSharding):
        local = array.addressable_data(0) if array.is_fully_replicated else array
        return _take(local, index)
    part = _gathering(array.sharding, array.ndim, len(index))(array, index)
    # Waiting keeps the processes in step, so that no more than this part is in flight.
    return jax.block_until_ready(part).addressable_data(0)


@jax.jit
def _take(array: jax.Array, index: tuple[int, ...]) -> jax.Array:
    """The bits of array[index], compiled once for all indices."""
    # Integers before anything is done with them: XLA may widen floats on the way, which changes some NaNs.
    return jax.lax.bitcast_convert_type(array, _unsigned(array.dtype.itemsize))[index]


@functools.cache
def _gathering(sharding: NamedSharding, ndim: int, depth: int) -> Callable[[jax.Array, tuple[int, ...]], jax.Array]:
    """A compiled function from an array and an index into its first `depth` axes to that part, on every device.

    Indexing a sharded axis under plain jit would gather all of it first. Here the shard that has the part adds it to
    the zeros of the others: as integers, which keeps every bit, of 32 bits or more, which every backend can add.
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
# Barriers of the threads in which several processes save a checkpoint, at which all learn that one of them has failed.


class FailedElsewhere(OSError):
    """Another process of the run could not write its part."""


class Barrier:
    """A `barrier_sync_fn` for Orbax; called by one thread at a time, and by all processes equally often."""

    def __init__(self) -> None:
        # One for each Checkpoints, all of which every process makes in the same order.
        self._name = f"dsv3_jax/roll_call/{next(_made)}"
        self._turns = itertools.count()

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits for the others; as long as it takes, for Orbax limits the time of what they do.

        Raises:
          FailedElsewhere: if another process has failed to write, and this one has not.
          RuntimeError: if it has failed in another way.
        """
        error = sys.exc_info()[1]  # Orbax comes here on the way out, too.
        reason = io_reason(error) if error is not None else None
        expected = error is None or reason is not None
        said = {"at": key, "reason": reason if error is None or expected else one_line(error), "expected": expected}
        while True:
            everyone = self._exchange(json.dumps(said))
            if all(one["at"] == key for one in everyone):
                return
            # Who has failed is ahead of the others, and waits until they come there too.
            if error is None:
                failed = {process: one for process, one in enumerate(everyone) if one["reason"] is not None}
                text = "; ".join(f"process {process}: {one['reason']}" for process, one in failed.items())
                expected = all(one["expected"] for one in failed.values())
                raise FailedElsewhere(text) if failed and expected else RuntimeError(text or f"processes wait at {everyone}")

    def _exchange(self, said: str) -> list[dict[str, object]]:
        """What each process says, on each."""
        turn = next(self._turns)
        folder = f"{self._name}/{turn}"
        if not is_first_process():
            kv_set(f"{folder}/{jax.process_index()}", said)
            return json.loads(kv_get(f"{folder}/all"))
        everyone = [said, *(kv_get(f"{folder}/{process}") for process in range(1, jax.process_count()))]
        kv_set(f"{folder}/all", f"[{', '.join(everyone)}]")
        if turn:
            kv_delete(f"{self._name}/{turn - 1}/")  # Whoever is here has heard it.
        return [json.loads(one) for one in everyone]


_made = itertools.count()
