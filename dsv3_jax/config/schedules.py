"""What changes while a run goes on (section 4.2 of the report): learning rate, batch size, lambda, gamma and alpha.

All of it follows from the number of the step, on the host and in float64: tokens of a long run outgrow int32, and float32
cannot tell one step from the next. A step gets its values as arguments, so that nothing compiles twice.
"""

from __future__ import annotations

import bisect
import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from dsv3_jax.config.run import OptimizerConfig, TrainConfig

Changes = tuple[tuple[float, float], ...]
"""Later values of a constant: pairs of tokens seen and the value from there on."""


class StepValues(NamedTuple):
    """What one step is taken with: float32 scalars, and an int32 count."""

    learning_rate: Any
    mtp_loss_weight: Any
    """lambda."""
    bias_update_speed: Any
    """gamma."""
    aux_loss_alpha: Any
    """alpha."""
    micro_batches: Any
    """How many micro-batches of the step's arrays are filled."""


class Schedules:
    """The schedules of a run, by the number of the step, counted from 0."""

    def __init__(self, optimizer: OptimizerConfig, train: TrainConfig, aux_loss_alpha: float) -> None:
        self._optimizer = optimizer
        self._train = train
        self._alpha = aux_loss_alpha
        self._ramp_rows = _ramp_rows(train)

    def batch_size(self, step: int) -> int:
        """Sequences of the step, over all devices."""
        return self.rows_before(step + 1) - self.rows_before(step)

    def rows_before(self, step: int) -> int:
        """Sequences of all steps before this one."""
        ramp = len(self._ramp_rows) - 1
        return self._ramp_rows[min(step, ramp)] + max(step - ramp, 0) * self._train.batch_size

    def tokens_before(self, step: int) -> int:
        """Tokens of all steps before this one."""
        return self.rows_before(step) * self._train.sequence_length

    def steps_for(self, tokens: float) -> int:
        """The fewest steps that see this many tokens."""
        rows = math.ceil(tokens / self._train.sequence_length)
        ramp = len(self._ramp_rows) - 1
        if rows <= self._ramp_rows[ramp]:
            return bisect.bisect_left(self._ramp_rows, rows)
        return ramp + -(-(rows - self._ramp_rows[ramp]) // self._train.batch_size)

    def learning_rate(self, step: int) -> float:
        """Linear over `warmup_steps`, constant, a cosine to `final_learning_rate`, then constants.

        The warm-up counts from 1, so that no step is taken at rate 0, and the cosine goes by the tokens seen after the step.
        """
        o = self._optimizer
        seen, warm = self.tokens_before(step), self.tokens_before(o.warmup_steps)
        changed = [rate for tokens, rate in o.learning_rate_after if seen >= tokens]
        if changed:
            return changed[-1]
        if step < o.warmup_steps:
            return o.learning_rate * (step + 1) / o.warmup_steps
        start = max(warm, o.constant_tokens)
        whole = self.tokens_before(self._train.steps) - start if o.decay_tokens is None else o.decay_tokens
        done = min(max((self.tokens_before(step + 1) - start) / whole, 0.0), 1.0) if whole > 0 else 1.0
        return o.final_learning_rate + (o.learning_rate - o.final_learning_rate) * (1 + math.cos(math.pi * done)) / 2

    def at(self, step: int) -> StepValues:
        """Everything the step is taken with."""
        train, seen = self._train, self.tokens_before(step)
        return StepValues(
            np.float32(self.learning_rate(step)),
            np.float32(_value(train.mtp_loss_weight, train.mtp_loss_weight_after, seen)),
            np.float32(_value(train.bias_update_speed, train.bias_update_speed_after, seen)),
            np.float32(_value(self._alpha, train.aux_loss_alpha_after, seen)),
            np.int32(self.batch_size(step) // train.micro_batch),
        )


def _value(first: float, after: Changes, seen: int) -> float:
    return next((value for tokens, value in reversed(after) if seen >= tokens), first)


@functools.lru_cache(maxsize=8)
def _ramp_rows(train: TrainConfig) -> list[int]:
    """Sequences before each step of the batch ramp, and before the first step after it."""
    rows = [0]
    if train.initial_batch_size is None:
        return rows
    growth = train.batch_size - train.initial_batch_size
    while rows[-1] * train.sequence_length < train.batch_ramp_tokens:
        done = rows[-1] * train.sequence_length / train.batch_ramp_tokens
        rows.append(rows[-1] + train.initial_batch_size + int(growth * done) // train.batch_ramp_unit * train.batch_ramp_unit)
    return rows
