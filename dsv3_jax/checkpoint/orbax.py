"""Checkpoints of a run, through Orbax: saved asynchronously and atomically, the newest kept.

A checkpoint has two items, so that inference need not read the optimizer: `variables` (params and router biases) and
`optimizer`. Its step is its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import CheckpointConfig, Config
from dsv3_jax.model import init_variables


class Checkpoints:
    """The checkpoints of one run; use as a context manager, so that the last save is finished on leaving."""

    def __init__(self, run: RunDirectory, config: CheckpointConfig | None = None) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=config.keep if config else None, create=config is not None)
        # Orbax takes absolute paths only; to etils, gs:// is one.
        folder = run.checkpoints if run.checkpoints.is_absolute() else run.checkpoints.resolve()
        handlers = {name: ocp.StandardCheckpointHandler() for name in ("variables", "optimizer")}
        self._manager = ocp.CheckpointManager(folder, options=options, item_handlers=handlers)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, variables: dict[str, Any], optimizer: Any) -> None:
        """Starts saving; arrays may be donated or overwritten as soon as this returns."""
        items = {"variables": ocp.args.StandardSave(variables), "optimizer": ocp.args.StandardSave(optimizer)}
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step: int, **like: Any) -> dict[str, Any]:
        """Restores the named items onto the shapes, dtypes and shardings of `like`.

        Raises:
          ValueError: naming the folder, if the checkpoint is damaged or of another model.
        """
        folder = self._manager.directory / str(step)
        with _damage_named(folder):
            stored = self._manager.item_metadata(step)
        for name, tree in like.items():
            if name not in stored or stored[name] is None:
                raise ValueError(f"{folder} lacks {name}; remove it to go on from the checkpoint before")
            _require_same_shapes(f"{folder}/{name}", _shapes(stored[name]), _shapes(tree))
        items = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        with _damage_named(folder):
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            return {name: restored[name] for name in like}


@contextlib.contextmanager
def _damage_named(folder: epath.Path) -> Iterator[None]:
    """Makes whatever Orbax raises a ValueError of one line."""
    report = sys.unraisablehook
    # When one read fails, those under way still report to the event loop that Orbax has closed, a traceback each.
    sys.unraisablehook = lambda late: None if str(late.exc_value) == "Event loop is closed" else report(late)
    try:
        yield
        sys.unraisablehook = report
    except Exception as error:  # It raises a dozen kinds.
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(
            f"{folder} cannot be read ({reason:.200}); if it is damaged, remove it to go on from the checkpoint before"
        ) from error


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every array by its path, whatever containers hold it."""
    leaves = jax.tree_util.tree_leaves_with_path(getattr(tree, "tree", tree))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def _require_same_shapes(where: str, stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    for path in (*wanted, *stored):
        there, here = (list(shapes[path]) if path in shapes else "nothing" for shapes in (stored, wanted))
        if there != here:
            raise ValueError(
                f"{where} holds another model than config.json describes: {path} is {there} there and {here} here; restore "
                "the config.json of the run"
            )


def load_run(path: str, dtype: Any = None) -> tuple[Config, dict[str, Any], int]:
    """Loads the newest checkpoint of a run directory for inference or conversion; the optimizer is not read.

    Args:
      path: the run directory.
      dtype: dtype to compute and store in; None keeps the run's own.

    Returns:
      The run's config (its model in `dtype`), the variables, and the step they are of.

    Raises:
      ValueError: if `path` holds no run, no checkpoint yet, or one that is damaged or of another model.
    """
    run = RunDirectory.existing(path)
    config = run.config()
    if dtype is not None:
        config = dataclasses.replace(config, model=config.model.with_dtype(dtype))
    if not run.checkpoints.exists():
        raise ValueError(f"{path} holds no checkpoint yet; let the run reach its first (checkpoint.every steps)")
    with Checkpoints(run) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise ValueError(f"{path} holds no complete checkpoint yet; let the run reach its first (checkpoint.every steps)")
        # Cast while reading, so that no second copy is held.
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.eval_shape(lambda: init_variables(config.model, jax.random.key(0)))
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), like)
        return config, checkpoints.restore(step, variables=like)["variables"], step
