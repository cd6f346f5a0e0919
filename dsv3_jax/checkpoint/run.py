"""Checkpoints of a run, through Orbax: saved asynchronously and atomically, verified whenever one is read.

A checkpoint has three items: `variables` (params and router biases) and `optimizer`, apart so that inference need not read the
latter, and `progress`, the record of what it is and of the checksums of its arrays. Its step is its name. What lies beside them
under `checkpoints/` is no checkpoint: `9.orbax-checkpoint-tmp` was cut short, `6.damaged` was found damaged and set aside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import operator
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dsv3_jax.checkpoint.faults import io_reason, is_of_the_machine, late_reads_keep_quiet, one_line, orbax_keeps_quiet
from dsv3_jax.checkpoint.multihost import Barrier
from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import CheckpointConfig, Config
from dsv3_jax.model import abstract_variables
from dsv3_jax.model.sharding import variable_shardings
from dsv3_jax.parallel.multihost import by_first_process, check_agreement, is_first_process, on_every_process

_UNFINISHED = ".orbax-checkpoint-tmp"


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read."""

    record: Record
    """Its step, tokens, config and the trainer's counters."""
    items: dict[str, Any]
    """What was asked for, by item."""


class Checkpoints:
    """The checkpoints of one run; use as a context manager, so that the last save is finished on leaving.

    A save that fails for its disk (full, read-only, gone) ends no run: a line on stderr says so, the run goes on, and the next
    save tries again. Whatever else goes wrong is raised, by the save itself or by what is called after it.

    Every process of a run makes the same calls, and comes to the same results.
    """

    failed: str | None
    """Why the last save that has ended failed, in one line; None if it did not."""

    def __init__(self, run: RunDirectory, config: CheckpointConfig | None = None) -> None:
        """Args: config: to save, too; leftovers of saves that were cut short are then removed."""
        # Orbax takes absolute paths only; to etils, gs:// is one.
        self._folder = run.checkpoints if run.checkpoints.is_absolute() else run.checkpoints.resolve()
        self._run_config = run.config() if config is not None else None
        self._pending: int | None = None
        self.failed = None
        self._quiet = contextlib.ExitStack()
        if config is not None:
            by_first_process(lambda: self._remove_unfinished(says=True))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep if config else None,
            keep_period=config.keep_every if config else None,
            create=config is not None,
            async_options=_async_options(),
        )
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in ("variables", "optimizer")}
        handlers[RECORD] = ocp.JsonCheckpointHandler()
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def __enter__(self) -> Checkpoints:
        self._quiet.enter_context(orbax_keeps_quiet())
        return self

    def __exit__(self, *_: object) -> None:
        with self._quiet:
            self.wait()
            if self.failed:
                by_first_process(self._remove_unfinished)
            self._manager.close()

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, variables: dict[str, Any], optimizer: Any, counters: dict[str, Any] | None = None) -> None:
        """Starts saving; arrays may be donated or overwritten as soon as this returns. Waits for the save before to end.

        Args:
          step: how many steps were taken; no checkpoint must be of it yet.
          variables: the model's.
          optimizer: the optimizer's state.
          counters: plain values that the trainer wants back.
        """
        assert self._run_config is not None, "these checkpoints are only read"
        self.wait()
        items = {"variables": variables, "optimizer": optimizer}
        record = Record.of(step, self._run_config, counters or {}, items)
        args: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args[RECORD] = ocp.args.JsonSave(record.to_json())
        try:
            by_first_process(self._try_folder)
        except ValueError as error:
            self._end(step, OSError(str(error)))
            return
        try:
            started = self._manager.save(step, args=ocp.args.Composite(**args))
        except Exception as error:
            self._end(step, error)
            return
        if not started:
            raise RuntimeError(f"Orbax does not save step {step}; its newest checkpoint is of step {self.latest_step()}")
        self._pending = step

    def poll(self) -> None:
        """Says how the last save ended, if it has ended since; never waits, and needs no other process."""
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until what is being saved is a checkpoint, or has failed."""
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._end(step, error)
            return
        if self.failed:
            _warn(f"step {step} is saved; saving works again")
        self.failed = None

    def check_saved(self) -> None:
        """Raises ValueError if the last save failed: for the end of a run, when none is left to try again."""
        self.wait()
        if self.failed:
            raise ValueError(f"{self.failed}; make room, and go on with --resume")

    def restore(self, step: int, **like: Any) -> dict[str, Any]:
        """Restores the named items onto the shapes, dtypes and shardings of `like`, verified.

        Raises:
          ValueError: naming the folder, if the checkpoint is damaged or of another model.
        """
        folder = self._folder / str(step)
        try:
            return read_items(folder, read_record(folder), like)
        except DamagedError as error:
            raise ValueError(f"{folder} is damaged: {error}; remove it to go on from the checkpoint before") from error

    def restore_newest(self, **like: Any) -> Restored | None:
        """Restores the named items of the newest checkpoint that is whole, or gives None if there is no checkpoint.

        Where a newer one is damaged, a line on stderr says which and why. If these checkpoints are not only read, it is set
        aside as `<step>.damaged`, for the run will save that step again. (On gs:// that is a copy; it has not been tried.)

        Raises:
          ValueError: naming all, if none is whole; if one is of another model, or cannot be read for reasons of this machine.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        check_agreement({"checkpoints": steps})
        damage: dict[int, str] = {}
        for step in steps:
            folder = self._folder / str(step)
            try:
                record = read_record(folder)
                items = read_items(folder, record, like)
            except DamagedError as error:
                damage[step] = f"{folder} is damaged ({error})"
                continue
            if damage:
                gc.collect()  # What Orbax has to say about the reads that were under way, it says now, in silence.
            for each, why in damage.items():
                _warn(f"{why}; step {step} is used instead{self._set_aside(each)}")
            return Restored(record, items)
        if damage:
            gc.collect()
            raise ValueError(f"no checkpoint is whole: {'; '.join(damage.values())}; restore one, or name another --run-dir")
        return None

    def _set_aside(self, step: int) -> str:
        """Moves a damaged checkpoint out of the way, if this run saves any, and says where to."""
        if self._run_config is None:
            return ""
        source = self._folder / str(step)
        names = (f"{step}.damaged{f'.{number}' if number else ''}" for number in range(10**6))
        target = next(target for target in map(self._folder.joinpath, names) if not target.exists())

        def move() -> None:
            try:
                source.rename(target)
            except OSError as error:
                raise ValueError(f"{source} is damaged and cannot be moved to {target.name} ({io_reason(error)})") from error

        by_first_process(move)
        self._manager.reload()
        return f", and it is now {target.name}"

    def _end(self, step: int, error: Exception) -> None:
        """Takes note of a save that raised `error`; raises it if it is no fault of the disk."""
        reason = io_reason(error)
        if reason is None:
            raise error
        gc.collect()  # What Orbax has to say about the writes that were under way, it says now, in silence.
        self._manager.reload()  # Orbax has already forgotten what it would have removed after this save.
        newest = self._manager.latest_step()
        if newest == step:  # It failed to remove an older one.
            self.failed = None
            _warn(f"step {step} is saved, but an older checkpoint could not be removed ({reason})")
            return
        there = f"the newest checkpoint is of step {newest}" if newest is not None else "there is no checkpoint yet"
        self.failed = f"step {step} could not be saved ({reason}); {there}"
        _warn(f"{self.failed}; the run goes on and tries again at the next save")

    def _try_folder(self) -> None:
        """Raises ValueError where nothing can be written, before the processes depend on each other to write."""
        if self.failed:
            self._remove_unfinished()
        probe = self._folder / f"probe{_UNFINISHED}"
        try:
            probe.mkdir(parents=True, exist_ok=True)
            probe.rmtree()
        except OSError as error:
            raise ValueError(io_reason(error)) from error

    def _remove_unfinished(self, *, says: bool = False) -> None:
        """Removes what saves left that were cut short or failed, as far as that can be done."""
        with contextlib.suppress(OSError):
            left = [path for path in self._folder.iterdir() if _UNFINISHED in path.name] if self._folder.exists() else []
            for path in left:
                with contextlib.suppress(OSError):
                    path.rmtree()
            removed = [str(path) for path in left if not path.exists()]
            if says and removed:
                _warn(f"{', '.join(removed)} was left by a save that was cut short; it is removed")


def _async_options() -> ocp.AsyncOptions:
    """How saves run in the background.

    If Orbax makes a save's folder in the background and cannot, the threads that would have written into it wait for it for
    five minutes, even after the end of the program. One process makes it at once. Several cannot: one would fail alone.
    """
    if jax.process_count() == 1:
        return ocp.AsyncOptions(create_directories_asynchronously=False)
    return ocp.AsyncOptions(barrier_sync_fn=Barrier())


def _warn(text: str) -> None:
    if is_first_process():
        print(f"warning: {text}", file=sys.stderr, flush=True)


def load_run(path: str, dtype: Any = None, mesh: jax.sharding.Mesh | None = None) -> tuple[Config, dict[str, Any], int]:
    """Loads the newest checkpoint of a run directory for inference or conversion; the optimizer is not read.

    If it is damaged, a line on stderr says so, and the one before is loaded.

    Args:
      path: the run directory.
      dtype: dtype to compute and store in; None keeps the run's own.
      mesh: what to lay the variables out over; None puts them on the first device.

    Returns:
      The run's config (its model in `dtype`), the variables, and the step they are of.

    Raises:
      ValueError: if `path` holds no run, no checkpoint yet, none that is whole, or one of another model.
    """
    run = RunDirectory.existing(path)
    config = run.config()
    if dtype is not None:
        config = dataclasses.replace(config, model=config.model.with_dtype(dtype))
    if not run.checkpoints.exists():
        raise ValueError(f"{path} holds no checkpoint yet; let the run reach its first (checkpoint.every steps)")
    with Checkpoints(run) as checkpoints:
        like = abstract_variables(config.model)
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda _: first, like) if mesh is None else variable_shardings(config.model, mesh)
        like = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), like, places)
        restored = checkpoints.restore_newest(variables=like)
        if restored is None:
            raise ValueError(f"{path} holds no complete checkpoint yet; let the run reach its first (checkpoint.every steps)")
        return config, restored.items["variables"], restored.record.step


# ----------------------------------------------------------------------------------------------------------------------
# The record that goes into every checkpoint beside its arrays: what it is of, and by what to tell that it is whole.


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array as it was saved."""

    dtype: str
    shape: tuple[int, ...]
    checksum: int


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint says about itself."""

    step: int
    """Optimizer steps taken."""
    tokens: int
    """Tokens seen in them."""
    config: dict[str, Any]
    """The resolved config, as plain values."""
    counters: dict[str, Any]
    """Whatever else the trainer keeps, as plain values."""
    arrays: dict[str, dict[str, Stored]]
    """Every array, by item and path."""

    @classmethod
    def of(cls, step: int, config: Config, counters: dict[str, Any], items: dict[str, Any]) -> Record:
        """The record of `items`, trees of arrays by name; every process has to call this (see `checksums`)."""
        arrays = {}
        for name, tree in items.items():
            sums = checksums(tree)
            arrays[name] = {
                path: Stored(array.dtype.name, tuple(array.shape), sums[path]) for path, array in by_path(tree).items()
            }
        return cls(step, config.schedules.tokens_before(step), dataclasses.asdict(config), counters, arrays)

    def to_json(self) -> dict[str, Any]:
        """As JSON values, with a digest of them all."""
        values = dataclasses.asdict(self)
        return {"record": values, "sha256": _digest(values)}

    @classmethod
    def from_json(cls, values: Any) -> Record:
        """Reads what `to_json` gave.

        Raises:
          ValueError: if it is anything else.
        """
        if not isinstance(values, dict) or _digest(values.get("record")) != values.get("sha256"):
            raise ValueError("its record does not match its own digest")
        record = dict(values["record"])
        record["arrays"] = {
            name: {path: Stored(one["dtype"], tuple(one["shape"]), one["checksum"]) for path, one in arrays.items()}
            for name, arrays in record["arrays"].items()
        }
        return cls(**record)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# One number per array, by which a checkpoint that is read is told to be the one that was saved.


def checksums(tree: Any) -> dict[str, int]:
    """The checksum of every array of `tree`, by its path; every process of a run has to call this, and gets all of them.

    Raises:
      ValueError: naming the array, if its dtype has elements of more than 32 bits.
    """
    arrays = by_path(tree)
    for path, array in arrays.items():
        if array.dtype.itemsize > 4:
            raise ValueError(f"{path} is {array.dtype.name}; a checkpoint holds arrays of 32 bits an element at most")
    # Moments share the shapes of their parameters: a program for each kind of array is compiled far sooner than one for all.
    # Each is waited for: on a CPU, programs that do not depend on each other, in flight together, can take all threads and
    # wait for each other's sums for ever.
    return {path: int(_checksum(array)) for path, array in arrays.items()}


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        bits = array.astype(jnp.uint32)
    else:
        unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    # An odd factor for each axis, in place of strides, which would wrap around in arrays of more than 2^32 elements.
    factors = [(0x9E3779B9 * (axis + 1) ^ 0x85EBCA6B) % 2**32 | 1 for axis in range(array.ndim)]
    places = [
        jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(factor) for axis, factor in enumerate(factors)
    ]
    return jnp.sum(_mix(bits ^ functools.reduce(operator.add, places, jnp.uint32(0))), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: one to one, and each bit of `x` changes half of the bits of the result."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


# ----------------------------------------------------------------------------------------------------------------------
# Reading one checkpoint: onto any mesh, in any dtype, and never without holding it to its checksums.


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
        _check_same_model(f"{folder}/{name}", record.arrays[name], by_path(tree))
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


def _check_same_model(where: str, stored: dict[str, Stored], wanted: dict[str, Any]) -> None:
    for path in (*wanted, *stored):
        there = list(stored[path].shape) if path in stored else "nothing"
        here = list(wanted[path].shape) if path in wanted else "nothing"
        if there != here:
            raise ValueError(
                f"{where} holds another model than config.json describes: {path} is {there} there and {here} here; restore "
                "the config.json of the run"
            )


# ----------------------------------------------------------------------------------------------------------------------
# The arrays of a tree by their paths, whatever containers hold them.


def by_path(tree: Any) -> dict[str, Any]:
    """Every leaf of `tree` under its path, such as `params/embed/weight`, in the order of the tree."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
