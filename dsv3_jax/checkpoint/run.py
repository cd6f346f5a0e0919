"""Checkpoints of a run, through Orbax: saved asynchronously and atomically, verified by checksums whenever one is read.

A checkpoint has three items: `variables` (params and router biases) and `optimizer`, apart so that inference need not read the
latter, and `progress`, the record of its config, step and checksums. Its folder is named by its step. Other folders under
`checkpoints/`: `9.orbax-checkpoint-tmp` of an interrupted save, `6.damaged` of a checkpoint found damaged and moved away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import itertools
import json
import math
import operator
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from dsv3_jax.checkpoint.faults import io_reason, is_of_the_machine, one_line, quiet_orbax
from dsv3_jax.checkpoint.multihost import Barrier
from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import CheckpointConfig, Config
from dsv3_jax.config.checks import check
from dsv3_jax.model import abstract_variables
from dsv3_jax.model.sharding import variable_shardings
from dsv3_jax.parallel.multihost import by_first_process, check_agreement, first_message, is_first_process, on_every_process

_UNFINISHED = ".orbax-checkpoint-tmp"


@dataclasses.dataclass(frozen=True)
class Restored:
    """Record and arrays of a checkpoint that was read and verified."""

    record: Record
    items: dict[str, Any]
    """The trees that were asked for, by item."""


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """The checkpoints of one run; use as a context manager, so that the last save is finished on leaving.

    A save that fails for its disk (full, read-only, gone) prints one line on stderr; the run goes on, and the next save tries
    again. Any other error is raised, by the save itself or by the next call.

    Every process of a run makes the same calls and gets the same results.
    """

    failed: str | None
    """Reason why the last finished save failed, in one line; None if it succeeded."""

    def __init__(self, run: RunDirectory, config: CheckpointConfig | None = None) -> None:
        """Open for reading; with `config` also for saving: make the folder, and remove leftovers of interrupted saves."""
        quiet_orbax()
        # Orbax takes absolute paths only; to etils, gs:// is one.
        self._folder = run.checkpoints if run.checkpoints.is_absolute() else run.checkpoints.resolve()
        self._run_config = run.config() if config is not None else None
        self._pending: int | None = None
        self.failed = None
        if config is not None:
            by_first_process(lambda: self._remove_unfinished(report=True))
        # If Orbax cannot make the folder of a save in the background, the threads that write into it wait five minutes for it,
        # even after the end of the program. One process makes it at once. Several cannot: one would fail alone.
        if jax.process_count() == 1:
            async_options = ocp.AsyncOptions(create_directories_asynchronously=False)
        else:
            async_options = ocp.AsyncOptions(barrier_sync_fn=Barrier())
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep if config else None,
            keep_period=config.keep_every if config else None,
            create=config is not None,
            async_options=async_options,
        )
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in ("variables", "optimizer")}
        handlers[RECORD] = ocp.JsonCheckpointHandler()
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def __exit__(self, *_: object) -> None:
        self.wait()
        if self.failed:
            by_first_process(self._remove_unfinished)
        self._manager.close()

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, None if there is none; it may turn out damaged."""
        return self._manager.latest_step()

    def save(self, step: int, variables: dict[str, Any], optimizer: Any, counters: dict[str, Any] | None = None) -> None:
        """Wait for the save before, then start this one in the background; the arrays may be donated once this returns.

        Args:
          step: optimizer steps taken; no checkpoint of that step may exist.
          variables: the model's.
          optimizer: the optimizer's state.
          counters: plain values of the trainer, to be restored.
        """
        assert self._run_config is not None, "these checkpoints are only read"
        self.wait()
        items = {"variables": variables, "optimizer": optimizer}
        config, arrays = self._run_config, {name: _stored(tree) for name, tree in items.items()}
        record = Record(step, config.schedules.tokens_before(step), dataclasses.asdict(config), counters or {}, arrays)
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
            raise RuntimeError(f"step {step} is not saved, as there is one of step {self.latest_step()}; save a later step")
        self._pending = step

    def poll(self) -> None:
        """If the save in progress has ended, report it as `wait` does, else do nothing. Needs no other process."""
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait for the save in progress, if any; set `failed`, and print a warning if it failed or if saving works again."""
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
        """Wait for the save in progress, and raise ValueError if it, or the last one before, failed for its disk."""
        self.wait()
        check(not self.failed, f"{self.failed}; free space or make it writable, and go on with --resume")

    def restore(self, step: int, **like: Any) -> dict[str, Any]:
        """Read and verify the items of `like` from the checkpoint of `step`; return item -> tree of arrays as in `like`.

        Raises:
          ValueError: naming the folder, if the checkpoint is damaged or of another model.
        """
        try:
            return read_checkpoint(self._folder / str(step), like).items
        except DamagedError as error:
            remedy = "remove it to go on from the checkpoint before"
            raise ValueError(f"{self._folder / str(step)} is damaged: {error}; {remedy}") from error

    def restore_newest(self, **like: Any) -> Restored | None:
        """Read the items of `like`, and the record, of the newest undamaged checkpoint; return None if there is no checkpoint.

        A line on stderr reports every newer one that is damaged. If opened for saving, it is renamed to `<step>.damaged`, for
        the run will save that step again. (On gs:// that is a copy; it has not been tried.)

        Raises:
          ValueError: naming all, if all are damaged; if one is of another model or unreadable here; if processes see others.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        check_agreement({"checkpoints": steps})
        damage: dict[int, str] = {}
        for step in steps:
            folder = self._folder / str(step)
            try:
                restored = read_checkpoint(folder, like)
            except DamagedError as error:
                damage[step] = f"{folder} is damaged ({error})"
            else:
                for damaged_step, reason in damage.items():
                    _warn(f"{reason}; step {step} is used instead{self._set_aside(damaged_step)}")
                return restored
            gc.collect()  # Reference cycles of the failed read may hold arrays.
        all_reasons = "; ".join(damage.values())
        check(not damage, f"no checkpoint is whole: {all_reasons}; restore one, or name another --run-dir")
        return None

    def _set_aside(self, step: int) -> str:
        """Rename a damaged checkpoint, if opened for saving; return the end of the warning that says so, or ""."""
        if self._run_config is None:
            return ""
        source = self._folder / str(step)
        names = (f"{step}.damaged{f'.{number}' if number else ''}" for number in itertools.count())
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
        """Set `failed` and print a warning if the disk made the save of `step` fail; raise any other `error`."""
        reason = io_reason(error)
        if reason is None:
            raise error
        gc.collect()  # Reference cycles of the failed save may hold arrays.
        self._manager.reload()  # Orbax no longer lists checkpoints that it would have removed after this save.
        newest = self._manager.latest_step()
        if newest == step:  # It failed to remove an older one.
            self.failed = None
            _warn(f"step {step} is saved, but an older step cannot be removed ({reason}); remove it")
            return
        state = f"the newest checkpoint is of step {newest}" if newest is not None else "there is no checkpoint yet"
        self.failed = f"step {step} could not be saved ({reason}); {state}"
        _warn(f"{self.failed}; the run goes on and tries again at the next save")

    def _try_folder(self) -> None:
        """Make and remove a folder in `checkpoints/`, after removing a failed save's; raise ValueError if that fails."""
        if self.failed:
            self._remove_unfinished()
        probe = self._folder / f"probe{_UNFINISHED}"
        try:
            probe.mkdir(parents=True, exist_ok=True)
            probe.rmtree()
        except OSError as error:
            raise ValueError(io_reason(error)) from error

    def _remove_unfinished(self, *, report: bool = False) -> None:
        """Remove the folders of interrupted and failed saves, ignoring OSErrors; if `report`, print a warning naming them."""
        with contextlib.suppress(OSError):
            left = [path for path in self._folder.iterdir() if _UNFINISHED in path.name] if self._folder.exists() else []
            for path in left:
                with contextlib.suppress(OSError):
                    path.rmtree()
            removed = [str(path) for path in left if not path.exists()]
            if report and removed:
                _warn(f"{', '.join(removed)} was left by a save that was cut short; it is removed")


def _warn(text: str) -> None:
    if is_first_process():
        print(f"warning: {text}", file=sys.stderr, flush=True)


def load_run(path: str, dtype: Any = None, mesh: jax.sharding.Mesh | None = None) -> tuple[Config, dict[str, Any], int]:
    """Load the newest checkpoint of a run directory for inference or conversion; the optimizer is not read.

    If it is damaged, a line on stderr says so, and the one before is loaded.

    Args:
      path: the run directory.
      dtype: dtype of computation and parameters; None keeps the run's own.
      mesh: devices to shard the variables over; None puts them on the first device.

    Returns:
      The run's config (its model in `dtype`), the variables, and their step.

    Raises:
      ValueError: if `path` holds no run, no checkpoint yet, only damaged ones, or one of another model.
    """
    run = RunDirectory.existing(path)
    config = run.config()
    if dtype is not None:
        config = dataclasses.replace(config, model=config.model.with_dtype(dtype))
    hint = "let the run reach its first (checkpoint.every steps)"
    check(run.checkpoints.exists(), f"{path} holds no checkpoint yet; {hint}")
    like, first = abstract_variables(config.model), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: first, like) if mesh is None else variable_shardings(config.model, mesh)
    with Checkpoints(run) as checkpoints:
        restored = checkpoints.restore_newest(
            variables=jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), like, shardings)
        )
    if restored is None:
        raise ValueError(f"{path} holds no complete checkpoint yet; {hint}")
    return config, restored.items["variables"], restored.record.step


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint metadata: config, step and checksums.


@dataclasses.dataclass(frozen=True)
class Stored:
    """Dtype, shape and checksum of a saved array."""

    dtype: str
    shape: tuple[int, ...]
    checksum: int


@dataclasses.dataclass(frozen=True)
class Record:
    """Metadata of a checkpoint: step, tokens, config, counters, and `Stored` of every array."""

    step: int
    """Optimizer steps taken."""
    tokens: int
    """Tokens seen in them."""
    config: dict[str, Any]
    """The resolved config, as plain values."""
    counters: dict[str, Any]
    """Plain values that the trainer passed to `save`, such as its number of skipped steps."""
    arrays: dict[str, dict[str, Stored]]
    """`Stored` of every array, by item and path."""

    def to_json(self) -> dict[str, Any]:
        """Return {"record": its fields as JSON values, "sha256": their digest}."""
        values = dataclasses.asdict(self)
        return {"record": values, "sha256": _digest(values)}

    @classmethod
    def from_json(cls, values: Any) -> Record:
        """Return the record that `to_json` gave, after checking its digest.

        Raises:
          ValueError: if `values` has not the form or the digest of a record.
        """
        is_whole = isinstance(values, dict) and _digest(values.get("record")) == values.get("sha256")
        check(is_whole, "its record does not match its own digest")
        arrays = {
            name: {path: Stored(one["dtype"], tuple(one["shape"]), one["checksum"]) for path, one in arrays.items()}
            for name, arrays in values["record"]["arrays"].items()
        }
        return cls(**values["record"] | {"arrays": arrays})


def _stored(tree: Any) -> dict[str, Stored]:
    sums = checksums(tree)
    return {path: Stored(array.dtype.name, tuple(array.shape), sums[path]) for path, array in by_path(tree).items()}


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Checksums of arrays, equal on any mesh.


def checksums(tree: Any) -> dict[str, int]:
    """Return the checksum of every array of `tree` by its path; every process calls this, and gets all of them.

    Raises:
      ValueError: naming the array, if its dtype has more than 32 bits.
    """
    arrays = by_path(tree)
    for path, array in arrays.items():
        name = array.dtype.name
        check(array.dtype.itemsize <= 4, f"{path} is {name}; a checkpoint holds arrays of 32 bits an element at most")
    # Moments share the shapes of their parameters: a program for each shape compiles far sooner than one for all arrays.
    # Each is waited for: on a CPU, independent programs in flight together can occupy all threads and deadlock in their sums.
    return {path: int(_checksum(array)) for path, array in arrays.items()}


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        bits = array.astype(jnp.uint32)
    else:
        unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    # An odd factor for each axis instead of strides, which would wrap around in arrays of more than 2^32 elements.
    factors = [(0x9E3779B9 * (axis + 1) ^ 0x85EBCA6B) % 2**32 | 1 for axis in range(array.ndim)]
    places = [
        jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(factor) for axis, factor in enumerate(factors)
    ]
    return jnp.sum(_mix(bits ^ functools.reduce(operator.add, places, jnp.uint32(0))), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """Return MurmurHash3's finaliser of `x`: a bijection in which each bit of `x` changes about half of the bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


# ----------------------------------------------------------------------------------------------------------------------
# Reading one checkpoint, onto any mesh and in any dtype, always verified.


RECORD = "progress"
_CAST_BYTES = 2**32
"""About the bytes of arrays that are read, verified and cast together where the dtype changes: both copies need memory."""


class DamagedError(ValueError):
    """A checkpoint that differs from its record, or cannot be read for another reason than the machine's."""


def read_checkpoint(folder: epath.Path, like: dict[str, Any]) -> Restored:
    """Read the items of `like` from a checkpoint, verify their checksums, and return them with the record.

    Args:
      folder: the checkpoint.
      like: trees by item, of arrays or of `jax.ShapeDtypeStruct`s with a sharding: shape, dtype and sharding of the result.

    Raises:
      DamagedError: if an item or the record is missing or changed; on every process.
      ValueError: if the arrays are another model's than those of `like`, or cannot be read on this machine.
    """
    record = _read(folder, lambda: _read_record(folder))
    for name, tree in like.items():
        if name not in record.arrays:
            raise DamagedError(f"its record has no item {name}; it was saved without it")
        _check_same_model(f"{folder}/{name}", record.arrays[name], by_path(tree))
    return Restored(record, {name: _read_item(folder / name, record.arrays[name], tree) for name, tree in like.items()})


def _read_record(folder: epath.Path) -> Record:
    if not (folder / RECORD).exists():
        raise DamagedError(f"it lacks {RECORD}, without which nothing in it can be verified")
    record = Record.from_json(ocp.JsonCheckpointHandler().restore(folder / RECORD))
    if str(record.step) != folder.name:
        raise DamagedError(f"its record is of step {record.step}")
    return record


def _read_item(folder: epath.Path, stored: dict[str, Stored], like: Any) -> Any:
    wanted, found = by_path(like), {}
    for paths in _portions(stored, wanted):
        as_stored = {
            path: jax.ShapeDtypeStruct(wanted[path].shape, jnp.dtype(stored[path].dtype), sharding=wanted[path].sharding)
            for path in paths
        }
        part = jax.tree.unflatten(jax.tree.structure(like), [as_stored.get(path, ocp.PLACEHOLDER) for path in wanted])
        restored = by_path(_read(folder, functools.partial(_restore, folder, part)))
        arrays = {path: restored[path] for path in paths}
        del restored
        changed = [path for path, number in checksums(arrays).items() if number != stored[path].checksum]
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise DamagedError(f"{folder.name}/{changed[0]}{more} does not match its checksum")
        while arrays:  # Each is freed once it is cast.
            path, array = arrays.popitem()
            found[path] = array.astype(wanted[path].dtype)
    return jax.tree.unflatten(jax.tree.structure(like), [found[path] for path in wanted])


def _portions(stored: dict[str, Stored], wanted: dict[str, Any]) -> list[list[str]]:
    """Split `wanted` into lists of paths to read together: all that keep their dtype, and about `_CAST_BYTES` of the others."""
    portions: dict[int, list[str]] = {}
    cast_bytes = 0
    for path, leaf in wanted.items():
        portion = -1
        if leaf.dtype != stored[path].dtype:
            portion = cast_bytes // _CAST_BYTES
            cast_bytes += math.prod(leaf.shape) * jnp.dtype(stored[path].dtype).itemsize
        portions.setdefault(portion, []).append(path)
    return list(portions.values())


def _restore(folder: epath.Path, part: Any) -> Any:
    if not folder.exists():
        raise DamagedError(f"it lacks {folder.name}")
    args = ocp.args.PyTreeRestore(item=part, restore_args=ocp.checkpoint_utils.construct_restore_args(part))
    return jax.block_until_ready(ocp.PyTreeCheckpointHandler().restore(folder, args=args))


def _read(folder: epath.Path, read: Callable[[], Any]) -> Any:
    """Return `read()`. If it fails, all processes raise ValueError for the machine's errors, else DamagedError; JAX's pass."""

    def attempt() -> tuple[Any, str]:
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
            return None, f"{type(cause).__name__}: {one_line(cause)}"

    result, damage = on_every_process(attempt)
    damage = first_message(damage)
    if damage:
        raise DamagedError(damage)
    return result


def _check_same_model(where: str, stored: dict[str, Stored], wanted: dict[str, Any]) -> None:
    for path in (*wanted, *stored):
        saved = list(stored[path].shape) if path in stored else "nothing"
        expected = list(wanted[path].shape) if path in wanted else "nothing"
        check(
            saved == expected,
            f"{where} holds another model than config.json describes: {path} is {saved} there and {expected} here; restore the "
            "config.json of the run",
        )


def by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves of `tree` by path, such as `params/embed/embedding`, in the order of the tree."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
