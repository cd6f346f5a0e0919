"""Checkpoints of a run, through Orbax: saved asynchronously and atomically, the newest kept.

A checkpoint has two items, so that inference need not read the optimizer: `variables` (params and router biases) and
`optimizer`. Its step is its name.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import orbax.checkpoint as ocp

from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import CheckpointConfig, Config
from dsv3_jax.model import init_variables


class Checkpoints:
    """The checkpoints of one run; use as a context manager, so that the last save is finished on leaving."""

    def __init__(self, run: RunDirectory, config: CheckpointConfig | None = None) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=config.keep if config else None, create=config is not None)
        # Orbax takes absolute paths only; to etils, gs:// is one.
        folder = run.checkpoints if run.checkpoints.is_absolute() else run.checkpoints.resolve()
        self._manager = ocp.CheckpointManager(folder, options=options)

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
        """Restores the named items onto the shapes, dtypes and shardings of `like`."""
        items = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {name: restored[name] for name in like}


def load_run(path: str, dtype: Any = None) -> tuple[Config, dict[str, Any], int]:
    """Loads the newest checkpoint of a run directory for inference or conversion; the optimizer is not read.

    Args:
      path: the run directory.
      dtype: dtype to compute and store in; None keeps the run's own.

    Returns:
      The run's config (its model in `dtype`), the variables, and the step they are of.

    Raises:
      ValueError: if `path` holds no run, or no checkpoint yet.
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
