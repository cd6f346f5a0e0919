"""The state of a run at its start."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.checkpoint.run import Checkpoints, load_run
from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import Config, TrainConfig
from dsv3_jax.model import init_variables
from dsv3_jax.train.start import save_run_start
from dsv3_jax.train.state import init_state, state_of
from tests.model.tiny import CONFIG, random_variables

SMALL = dataclasses.replace(
    CONFIG, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0, q_lora_rank=None, n_shared_experts=0
)
RUN = Config(model=SMALL, train=TrainConfig(steps=3, sequence_length=16, seed=5))
VARIABLES = jax.tree.map(jnp.asarray, random_variables(SMALL))


def test_a_fresh_state_is_that_of_the_seed() -> None:
    with jax.default_prng_impl("unsafe_rbg"):  # Compiles fastest.
        state = jax.jit(functools.partial(init_state, RUN))()
        drawn = jax.jit(lambda seed: init_variables(SMALL, jax.random.key(seed)))
        chex.assert_trees_all_close(state.variables, drawn(5), rtol=1e-6)
        assert np.all(drawn(6)["params"]["embed"]["embedding"] != state.params["embed"]["embedding"])
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(functools.partial(init_state, RUN)), state)
    assert (state.step.dtype, int(state.step)) == (jnp.int32, 0)
    chex.assert_shape(state.router["moe_layers"]["mlp"]["gate"]["e_score_correction_bias"], (1, SMALL.n_routed_experts))
    for zeros in (state.router, state.optimizer):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(zeros))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.router)} == {jnp.dtype("float32")}


def test_a_state_around_given_variables_keeps_them() -> None:
    state = state_of(RUN, VARIABLES)
    chex.assert_trees_all_equal(state.variables, VARIABLES)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.eval_shape(functools.partial(init_state, RUN)))


def test_given_variables_become_a_run_at_step_0(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "run")
    save_run_start(path, RUN, VARIABLES)
    config, loaded, step = load_run(path)
    assert (config, step) == (RUN, 0)
    chex.assert_trees_all_equal(loaded, VARIABLES)
    optimizer = state_of(RUN, VARIABLES).optimizer
    with Checkpoints(RunDirectory.existing(path)) as checkpoints:
        chex.assert_trees_all_equal(checkpoints.restore(0, optimizer=optimizer)["optimizer"], optimizer)
    with pytest.raises(ValueError, match="already holds a run"):
        save_run_start(path, RUN, VARIABLES)
