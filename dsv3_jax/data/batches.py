"""Batches of a run: each a pure function of (seed, step), cut into micro-batches, and read ahead by a thread.

On any number of processes, and wherever a run resumes, step n trains on the same rows: those after the rows of all steps
before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from dsv3_jax.config import TrainConfig
from dsv3_jax.config.run import Schedules
from dsv3_jax.data.rows import Row, Rows
from dsv3_jax.model.losses import Batch

_PREFETCHED_BATCHES = 8


@dataclasses.dataclass(eq=False)
class TrainBatches:
    """Batches of a run: `batches[step]`, and `batches.iterate(step)`, which reads ahead in the background."""

    rows: Rows
    """Every row of the run."""
    config: TrainConfig
    """Shape of a batch and number of steps."""
    schedules: Schedules
    """Number of rows of each step."""
    held: Sequence[int] | None = None
    """Rows of each micro-batch that this process reads; None for all of them."""
    _: dataclasses.KW_ONLY
    across_documents: bool = True
    """True if attention crosses documents, so that batches need no segment starts."""

    def __post_init__(self) -> None:
        """Set up the pipeline; nothing is read yet."""
        import grain  # Takes a second, which tokenizing and evaluating should not wait for.

        self._held = range(self.config.micro_batch) if self.held is None else self.held
        self._dataset = grain.MapDataset.source(self)
        self._reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES)

    def __len__(self) -> int:
        """Steps of the run."""
        return self.config.steps

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of `step`, counted from 0."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of a run of {len(self)} steps")
        config, first = self.config, self.schedules.rows_before(step)
        micro_batches = self.schedules.batch_size(step) // config.micro_batch
        numbers = (first + part * config.micro_batch + row for part in range(micro_batches) for row in self._held)
        row = Row(*map(np.stack, zip(*(self.rows[number] for number in numbers), strict=True)))
        tokens, targets, weights = (self._cut(array) for array in row[:3])
        starts = None if self.across_documents else self._cut(row.segment_starts_T, empty=-1)
        return Batch(tokens, targets, weights, starts)

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of the steps from `start` on, in order, read ahead by a thread."""
        yield from self._dataset.slice(slice(start, len(self))).to_iter_dataset(self._reading)

    def _cut(self, array: np.ndarray, empty: int = 0) -> np.ndarray:
        """Reshape [rows, T] to [A, B, T]; micro-batches that the step does not use are filled with `empty`."""
        shape = self.config.micro_batches, len(self._held), self.config.sequence_length
        missing = shape[0] * shape[1] - len(array)
        return np.pad(array, ((0, missing), (0, 0)), constant_values=empty).reshape(shape)
