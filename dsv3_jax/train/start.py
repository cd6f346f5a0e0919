"""Start of a run: random parameters, the model of a checkpoint (`train.init_from`), or the run's own checkpoint."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsv3_jax.checkpoint.hugging_face import load_hf
from dsv3_jax.checkpoint.run import Checkpoints, Restored, load_run
from dsv3_jax.checkpoint.run_directory import FREE_FIELDS, RunDirectory
from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.config.run import is_hugging_face, model_to_train
from dsv3_jax.model import abstract_variables
from dsv3_jax.train.state import TrainState, abstract_state, init_state, state_of, state_shardings

_COMPUTATION_FIELDS = {*FREE_FIELDS["model"], "dtype", "param_dtype"}


def resume_config(config: Config, run_dir: str, *, resume: bool) -> Config:
    """Return the config; if a run resumes, `data.tokenizer`, if set, becomes `run_dir`, which has a copy of it."""
    run = RunDirectory(run_dir)
    if not resume or run.steps_saved is None or config.data.tokenizer is None or not run.tokenizer_file.exists():
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=run_dir))


def check_start(config: Config, run_dir: str, *, resume: bool) -> list[str]:
    """Check that the checkpoint `train.init_from`, if set, fits the config, unless the run resumes from its own.

    Returns:
      Lines to print: differences between the models of the config and of the checkpoint that change no shape.

    Raises:
      ValueError: if `train.init_from` is no checkpoint, or of a model with other parameters.
    """
    source = config.train.init_from
    if source is None or (resume and RunDirectory(run_dir).steps_saved is not None):
        return []
    model = model_to_train(source)
    there, here = _shapes(model), _shapes(config.model)
    for name in (*there, *here):
        if there.get(name) != here.get(name):
            raise ValueError(
                f"train.init_from {source!r} has another model than the config: {name} is {there.get(name, 'nothing')} there "
                f"and {here.get(name, 'nothing')} here; let the config file take the model from the checkpoint, or name another"
            )
    fields = [field.name for field in dataclasses.fields(model) if field.name not in _COMPUTATION_FIELDS]
    values = ((name, getattr(config.model, name), getattr(model, name)) for name in fields)
    return [f"starting from {source}, but with {name} {ours!r} instead of {its!r}" for name, ours, its in values if ours != its]


def _shapes(model: ModelConfig) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(abstract_variables(model))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape) for path, leaf in leaves}


def init_or_restore(config: Config, mesh: Mesh, checkpoints: Checkpoints) -> tuple[TrainState, Restored | None]:
    """Return the first state, on the mesh, and the run's own checkpoint; None if it is random or from `train.init_from`.

    Raises:
      ValueError: as `Checkpoints.restore_newest`. Call `check_start` before.
    """
    shardings = state_shardings(config, mesh)
    like = jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), abstract_state(config), shardings)
    saved = checkpoints.restore_newest(variables=like.variables, optimizer=like.optimizer)
    if saved is not None:
        step = jax.device_put(jnp.int32(saved.record.step), shardings.step)
        return TrainState(step, **saved.items["variables"], optimizer=saved.items["optimizer"]), saved
    source = config.train.init_from
    if source is None:
        return jax.jit(functools.partial(init_state, config), out_shardings=shardings)(), None
    load = load_hf if is_hugging_face(source) else load_run
    variables = load(source, config.model.param_dtype, mesh)[1]
    return jax.jit(functools.partial(state_of, config), out_shardings=shardings, donate_argnums=0)(variables), None


def save_run_start(path: str, config: Config, variables: dict[str, Any]) -> None:
    """Create a run directory with a checkpoint of `variables` at step 0, for train.py to continue with --resume.

    Raises:
      ValueError: if `path` already holds something, or the state cannot be saved there.
    """
    run = RunDirectory.create_or_resume(path, config, resume=False)
    with Checkpoints(run, config.checkpoint) as checkpoints:
        checkpoints.save(0, variables, state_of(config, variables).optimizer)
    run.unlock()
    if checkpoints.failed:
        raise ValueError(checkpoints.failed)
