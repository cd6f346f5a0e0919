"""First states of runs, made in numpy: nothing compiles for them."""

from __future__ import annotations

import functools

import jax
import numpy as np

from dsv3_jax.config import Config
from dsv3_jax.train.state import TrainState, state_of
from tests.model.tiny import random_variables


def init_or_restore(config: Config) -> TrainState:
    """A state of numpy arrays around random variables."""
    variables = random_variables(config.model)
    shapes = jax.eval_shape(functools.partial(state_of, config), variables)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes).replace(**variables)
