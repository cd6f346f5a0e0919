"""Loss and bits per byte of held-out text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.data import HeldoutBatch
from dsv3_jax.train.step import heldout_loss


class Evaluation(NamedTuple):
    """The summed loss of some held-out tokens."""

    nats: float
    """Sum of their losses."""
    tokens: int
    """How many were scored."""

    @property
    def loss(self) -> float:
        """Mean loss, in nats a token."""
        return self.nats / self.tokens


class Evaluator:
    """Scores batches of one shape with one compiled program."""

    def __init__(self, config: ModelConfig, place: Callable[[np.ndarray], Any] = jnp.asarray) -> None:
        """Args: config: the model; place: puts an array [B, T] of a batch where the model runs."""
        self._place = place
        self._loss = jax.jit(functools.partial(heldout_loss, config=config))

    def __call__(self, variables: dict[str, Any], batches: Iterable[HeldoutBatch]) -> Evaluation:
        """The loss of the batches' scored tokens under `variables`."""
        # Summed in Python floats: float32 would lose digits over a million tokens.
        parts = [(float(self._loss(variables, *map(self._place, batch))), int(batch.weights_BT.sum())) for batch in batches]
        return Evaluation(sum(nats for nats, _ in parts), sum(count for _, count in parts))
