"""Reading one checkpoint: onto any mesh, in any dtype, and never without holding it to its checksums.

Every process reads the parts its devices hold. Nothing here waits for another process but the checksums, which each of them
has to reach: so what one cannot read is told to all before, and all of them come to the same end.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dsv3_jax.checkpoint.checksums import checksums
from dsv3_jax.checkpoint.faults import io_reason, is_of_the_machine, late_reads_keep_quiet, one_line, orbax_keeps_quiet
from dsv3_jax.checkpoint.paths import by_path
from dsv3_jax.checkpoint.record import Record, Stored
from dsv3_jax.parallel.multihost import on_every_process

RECORD = "progress"
_CAST_BYTES = 2**32
"""Arrays that change their dtype are read, verified and cast so many bytes at a time, for both copies are there meanwhile."""


class DamagedError(ValueError):
    """A checkpoint that is not what was saved."""


def read_record(folder: epath.Path) -> Record:
    """The record of a checkpoint.

    Raises:
      DamagedError: if there is none that is whole; on every process.
    """

    def read() -> Record:
        if not (folder / RECORD).exists():
            raise DamagedError(f"it lacks {RECORD}, without which nothing in it can be verified")
        return Record.from_json(ocp.JsonCheckpointHandler().restore(folder / RECORD))

    record = _read(folder, read)
    if str(record.step) != folder.name:
        raise DamagedError(f"it is of step {record.step}")
    return record


def read_items(folder: epath.Path, record: Record, like: dict[str, Any]) -> dict[str, Any]:
    """Reads items of a checkpoint and verifies them.

    Args:
      folder: the checkpoint.
      record: its record.
      like: trees by item, of arrays or of `jax.ShapeDtypeStruct`s with a sharding: what to read, onto what, and cast to what.

    Returns:
      The trees, with the arrays.

    Raises:
      DamagedError: if an item is missing, or is not what was saved; on every process.
      ValueError: if the arrays are not those of `like`, but another model's.
    """
    for name, tree in like.items():
        if name not in record.arrays:
            raise DamagedError(f"it was saved without {name}")
        _require_same_model(f"{folder}/{name}", record.arrays[name], by_path(tree))
    return {name: _read_item(folder / name, record.arrays[name], tree) for name, tree in like.items()}


def _read_item(folder: epath.Path, stored: dict[str, Stored], like: Any) -> Any:
    wanted, found = by_path(like), {}
    for paths in _portions(stored, wanted):
        as_stored = {path: _abstract(wanted[path], stored[path].dtype) for path in paths}
        part = jax.tree.unflatten(jax.tree.structure(like), [as_stored.get(path, ocp.PLACEHOLDER) for path in wanted])
        restored = by_path(_read(folder, functools.partial(_restore, folder, part)))
        arrays = {path: restored[path] for path in paths}
        del restored
        changed = [path for path, number in checksums(arrays).items() if number != stored[path].checksum]
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise DamagedError(f"{folder.name}/{changed[0]}{more} does not match its checksum")
        while arrays:  # So that each is freed when it is cast.
            path, array = arrays.popitem()
            found[path] = array.astype(wanted[path].dtype)
    return jax.tree.unflatten(jax.tree.structure(like), [found[path] for path in wanted])


def _portions(stored: dict[str, Stored], wanted: dict[str, Any]) -> list[list[str]]:
    """What is read at once: all that keeps its dtype, and the rest bit by bit. On every process in the same order."""
    portions = [[path for path, leaf in wanted.items() if leaf.dtype == stored[path].dtype]]
    room = 0
    for path, leaf in wanted.items():
        if leaf.dtype != stored[path].dtype:
            nbytes = int(np.prod(leaf.shape, dtype=np.int64)) * jnp.dtype(stored[path].dtype).itemsize
            if room < nbytes:
                portions.append([])
                room = _CAST_BYTES
            portions[-1].append(path)
            room -= nbytes
    return [portion for portion in portions if portion]


def _abstract(leaf: Any, dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding)


def _restore(folder: epath.Path, part: Any) -> Any:
    if not folder.exists():
        raise DamagedError(f"it lacks {folder.name}")
    places = jax.tree.map(
        lambda leaf: (
            ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=True)
            if leaf is not ocp.PLACEHOLDER
            else ocp.RestoreArgs()
        ),
        part,
    )
    restored = ocp.PyTreeCheckpointHandler().restore(folder, args=ocp.args.PyTreeRestore(item=part, restore_args=places))
    jax.block_until_ready([leaf for leaf in jax.tree.leaves(restored) if leaf is not ocp.PLACEHOLDER])
    return restored


def _read(folder: epath.Path, read: Callable[[], Any]) -> Any:
    """`read()`; whatever it raises about the checkpoint is a DamagedError, on every process if on one."""

    def attempt() -> tuple[Any, str]:
        with orbax_keeps_quiet():
            try:
                return read(), ""
            except (jax.errors.JaxRuntimeError, MemoryError):  # Of the devices, which may be too small.
                raise
            except DamagedError as error:
                return None, str(error)
            except Exception as error:  # Orbax raises a dozen kinds.
                if is_of_the_machine(error):
                    reason = io_reason(error)
                    raise ValueError(f"{folder} cannot be read ({reason}); make it readable, and start again") from error
                cause: BaseException = error
                while cause.__cause__ is not None:
                    cause = cause.__cause__
                damage = f"{type(cause).__name__}: {one_line(cause)}"
                del cause
            gc.collect(1)  # The reads that have ended say so here, in silence.
            late_reads_keep_quiet()
        return None, damage

    result, damage = on_every_process(attempt)

    def complain() -> None:
        if damage:
            raise DamagedError(damage)

    try:
        on_every_process(complain)
    except ValueError as error:
        raise DamagedError(str(error)) from None
    return result


def _require_same_model(where: str, stored: dict[str, Stored], wanted: dict[str, Any]) -> None:
    for path in (*wanted, *stored):
        there = list(stored[path].shape) if path in stored else "nothing"
        here = list(wanted[path].shape) if path in wanted else "nothing"
        if there != here:
            raise ValueError(
                f"{where} holds another model than config.json describes: {path} is {there} there and {here} here; restore "
                "the config.json of the run"
            )
