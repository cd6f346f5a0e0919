"""Checkpoints of a run, through Orbax: saved asynchronously and atomically, verified whenever one is read.

A checkpoint has three items: `variables` (params and router biases) and `optimizer`, apart so that inference need not read the
latter, and `progress`, the record of what it is and of the checksums of its arrays. Its step is its name. What lies beside them
under `checkpoints/` is no checkpoint: `9.orbax-checkpoint-tmp` was cut short, `6.damaged` was found damaged and set aside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp

from dsv3_jax.checkpoint.faults import io_reason, orbax_keeps_quiet
from dsv3_jax.checkpoint.reading import RECORD, DamagedError, read_items, read_record
from dsv3_jax.checkpoint.record import Record
from dsv3_jax.checkpoint.roll_call import RollCall
from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import CheckpointConfig, Config
from dsv3_jax.model import abstract_variables
from dsv3_jax.model.sharding import variable_shardings
from dsv3_jax.parallel.multihost import by_first_process, is_first_process, require_agreement

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

    def require_saved(self) -> None:
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
        require_agreement({"checkpoints": steps})
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
    return ocp.AsyncOptions(barrier_sync_fn=RollCall())


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
