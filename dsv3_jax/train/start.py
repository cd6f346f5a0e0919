"""Where a run starts: from random parameters, or from the model of a checkpoint (`train.init_from`)."""

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
from dsv3_jax.config.hugging_face import is_hugging_face, model_to_train
from dsv3_jax.model import abstract_variables
from dsv3_jax.train.state import TrainState, init_state, state_of, state_shardings

_HOW_IT_IS_COMPUTED = {*FREE_FIELDS["model"], "dtype", "param_dtype"}


def resume_config(config: Config, run_dir: str, *, resume: bool) -> Config:
    """The config; of a run that is resumed, with the run's own tokenizer: where it came from may be gone by now."""
    run = RunDirectory(run_dir)
    if not resume or run.steps_saved is None or config.data.tokenizer is None or not run.tokenizer_file.exists():
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=run_dir))


def check_start(config: Config, run_dir: str, *, resume: bool) -> list[str]:
    """Looks at the checkpoint that a run is to start from; one that goes on from its own needs it no more.

    Returns:
      Lines to print: how the config's model differs from that of the checkpoint, in what no shape tells.

    Raises:
      ValueError: if `train.init_from` is no checkpoint, or of a model with other parameters.
    """
    source = config.train.init_from
    if source is None or (resume and RunDirectory(run_dir).steps_saved is not None):
        return []
    model = model_to_train(source)
    there, here = (_shapes(each) for each in (model, config.model))
    for name in (*there, *here):
        if there.get(name) != here.get(name):
            found, wanted = (shapes.get(name, "nothing") for shapes in (there, here))
            raise ValueError(
                f"train.init_from {source!r} has another model than the config: {name} is {found} there and {wanted} here; "
                "let the config file take the model from the checkpoint, or name another"
            )
    fields = [field.name for field in dataclasses.fields(model) if field.name not in _HOW_IT_IS_COMPUTED]
    changed = [name for name in fields if getattr(model, name) != getattr(config.model, name)]
    return [
        f"starting from {source}, but with {name} {getattr(config.model, name)!r} instead of {getattr(model, name)!r}"
        for name in changed
    ]


def init_or_restore(config: Config, mesh: Mesh, checkpoints: Checkpoints) -> tuple[TrainState, Restored | None]:
    """The state that a run goes on from, laid out over the mesh; `check_start` has been passed.

    Returns:
      The state, and the checkpoint that it was read from; None if it is that of step 0.

    Raises:
      ValueError: as `Checkpoints.restore_newest`.
    """
    shardings = state_shardings(config, mesh)
    shapes = jax.eval_shape(lambda: init_state(config))
    like = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings)
    saved = checkpoints.restore_newest(variables=like.variables, optimizer=like.optimizer)
    if saved is not None:
        step = jax.device_put(jnp.int32(saved.record.step), shardings.step)
        return TrainState(step, **saved.items["variables"], optimizer=saved.items["optimizer"]), saved
    source = config.train.init_from
    if source is None:
        return jax.jit(functools.partial(init_state, config), out_shardings=shardings)(), None
    dtype = config.model.param_dtype
    variables = load_hf(source, dtype, mesh)[1] if is_hugging_face(source) else load_run(source, dtype, mesh)[1]
    return jax.jit(functools.partial(state_of, config), out_shardings=shardings, donate_argnums=0)(variables), None


def _shapes(model: ModelConfig) -> dict[str, Any]:
    tree = abstract_variables(model)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape) for path, leaf in leaves}


def save_run_start(path: str, config: Config, variables: dict[str, Any]) -> None:
    """Makes a run directory at step 0 around given variables, for train.py to continue with --resume.

    Raises:
      ValueError: if `path` already holds something, or the state cannot be saved there.
    """
    run = RunDirectory.create_or_resume(path, config, resume=False)
    with Checkpoints(run, config.checkpoint) as checkpoints:
        checkpoints.save(0, variables, state_of(config, variables).optimizer)
    run.unlock()
    if checkpoints.failed:
        raise ValueError(checkpoints.failed)
