"""Rows into the batches of a run: each a pure function of (seed, step), cut into micro-batches, read ahead of time.

However many processes take part, and wherever a run resumes, step n trains on the same rows: those that follow the rows of
all steps before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dsv3_jax.config import TrainConfig
from dsv3_jax.config.run import Schedules
from dsv3_jax.data.rows import Row, Rows
from dsv3_jax.model.losses import Batch

if TYPE_CHECKING:
    import grain

_PREFETCHED_BATCHES = 8


class TrainBatches:
    """The batches of a run: `batches[step]`, and `batches.iterate(step)` that reads ahead in the background."""

    def __init__(
        self,
        rows: Rows,
        config: TrainConfig,
        schedules: Schedules,
        held: Sequence[int] | None = None,
        *,
        across_documents: bool = True,
    ) -> None:
        """Sets up the pipeline; nothing is read yet.

        Args:
          rows: every row of the run.
          config: gives the shape of a batch and the number of steps.
          schedules: how many rows each step takes.
          held: the rows of each micro-batch that this process makes; None for all of them.
          across_documents: whether attention crosses documents, so that a batch need not say where they start.
        """
        import grain  # takes a second, which tokenizing and evaluating should not wait for

        held = range(config.micro_batch) if held is None else held
        self._steps = _Steps(rows, config, schedules, held, across_documents)
        self._dataset: grain.MapDataset = grain.MapDataset.source(self._steps)

    def __len__(self) -> int:
        """Steps of the run."""
        return len(self._steps)

    def __getitem__(self, step: int) -> Batch:
        """The batch of `step`, counted from 0."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of a run of {len(self)} steps")
        return self._steps[step]

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """The batches of the steps from `start` on, in order, made ahead of time by a thread."""
        import grain

        reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES)
        yield from self._dataset.slice(slice(start, len(self))).to_iter_dataset(reading)


class _Steps:
    """The batches by their step: a random-access source for grain."""

    def __init__(
        self, rows: Rows, config: TrainConfig, schedules: Schedules, held: Sequence[int], across_documents: bool
    ) -> None:
        self._rows = rows
        self._config = config
        self._schedules = schedules
        self._held = held
        self._across_documents = across_documents

    def __len__(self) -> int:
        return self._config.steps

    def __getitem__(self, step: int) -> Batch:
        config, first = self._config, self._schedules.rows_before(step)
        micro_batches = self._schedules.batch_size(step) // config.micro_batch
        numbers = (first + part * config.micro_batch + row for part in range(micro_batches) for row in self._held)
        row = Row(*map(np.stack, zip(*(self._rows[number] for number in numbers), strict=True)))
        tokens, targets, weights = (self._cut(array) for array in row[:3])
        # What the step leaves empty is padding, as the rows say it.
        starts = None if self._across_documents else self._cut(row.segment_starts_T, empty=-1)
        return Batch(tokens, targets, weights, starts)

    def _cut(self, array: np.ndarray, empty: int = 0) -> np.ndarray:
        """[rows, T] as [A, B, T]."""
        shape = self._config.micro_batches, len(self._held), self._config.sequence_length
        missing = shape[0] * shape[1] - len(array)
        return np.pad(array, ((0, missing), (0, 0)), constant_values=empty).reshape(shape) if missing else array.reshape(shape)
