"""The state of a run at its start."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv3_jax.checkpoint.orbax import Checkpoints, load_run
from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import Config, TrainConfig
from dsv3_jax.model import init_variables
from dsv3_jax.train.state import init_state, save_run_start, state_of
from tests.model.tiny import CONFIG, random_variables

RUN = Config(model=CONFIG, train=TrainConfig(steps=3, sequence_length=16, seed=5))


def test_a_fresh_state_is_that_of_the_seed() -> None:
    state = jax.jit(functools.partial(init_state, RUN))()
    chex.assert_trees_all_close(state.variables, init_variables(CONFIG, jax.random.key(5)), rtol=1e-6)
    chex.assert_trees_all_equal_structs(jax.eval_shape(functools.partial(init_state, RUN)), state)
    assert (state.step.dtype, int(state.step)) == (jnp.int32, 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.router)} == {jnp.dtype("float32")}
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.router))
    adam = next(part for part in state.optimizer if isinstance(part, optax.ScaleByAdamState))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(adam))
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.nu)} == {jnp.dtype("bfloat16")}

    other = dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, seed=6))
    again, differently = (jax.jit(functools.partial(init_state, config))() for config in (RUN, other))
    chex.assert_trees_all_equal(again, state)
    assert np.any(differently.params["embed"]["embedding"] != state.params["embed"]["embedding"])


def test_a_state_around_given_variables_keeps_them() -> None:
    variables = random_variables()
    state = state_of(RUN, variables)
    chex.assert_trees_all_equal(state.variables, variables)
    chex.assert_trees_all_equal_structs(state, init_state(RUN))


def test_given_variables_become_a_run_at_step_0(tmp_path) -> None:
    variables = jax.tree.map(jnp.asarray, random_variables())
    path = str(tmp_path / "run")
    save_run_start(path, RUN, variables)
    config, loaded, step = load_run(path)
    assert (config, step) == (RUN, 0)
    chex.assert_trees_all_equal(loaded, variables)
    fresh = state_of(RUN, variables).optimizer
    with Checkpoints(RunDirectory.existing(path)) as checkpoints:
        chex.assert_trees_all_equal(checkpoints.restore(0, optimizer=fresh)["optimizer"], fresh)
    with pytest.raises(ValueError, match="already holds a run"):
        save_run_start(path, RUN, variables)
