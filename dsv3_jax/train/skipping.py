"""Steps whose loss or gradient was not finite: the step leaves the state as it was, and here they are counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.data import TrainBatches


class SkippedSteps:
    """Counts them. The flag of a step is read once the next is on its way, so that the devices need not wait."""

    def __init__(self, limit: int, keep: Callable[[int], str], total: int = 0, in_a_row: int = 0) -> None:
        """Sets the counts.

        Args:
          limit: in a row, at which the run ends.
          keep: writes down the batch of a step, and says so.
          total, in_a_row: before the step at which the run resumes.
        """
        self._limit = limit
        self._keep = keep
        self.stuck: str | None = None
        """Why the run ends, once `limit` steps in a row were skipped."""
        self.total = total
        self.in_a_row = in_a_row
        self._unread: tuple[int, Any] | None = None

    @property
    def counters(self) -> dict[str, int]:
        """What a checkpoint keeps of them, as the arguments to go on with."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def see(self, step: int, flag: Any) -> None:
        """Takes the flag of a step (a scalar on the devices, 1 if it was skipped), and reads that of the step before."""
        self.settle()
        self._unread = step, flag

    def settle(self) -> None:
        """Waits for the last flag, and reads it."""
        if self._unread is None:
            return
        (step, flag), self._unread = self._unread, None
        if not float(flag):
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row >= self._limit and self.stuck is None:
            self.stuck = (
                f"the loss or gradient of {self.in_a_row} steps in a row, up to step {step}, was not finite; none was taken; "
                f"{self._keep(step)}; lower optimizer.learning_rate, in another --run-dir"
            )


def keep_batch(run: RunDirectory, batches: TrainBatches, writes: bool, step: int) -> str:
    """Writes the whole batch of a step (counted from 1) into the run directory, as an .npz of its arrays by their names.

    Args: writes: whether this process does. Returns: what became of it, in words.
    """
    file = run.path / f"skipped_step_{step}.npz"
    if writes:
        arrays = {name: array for name, array in batches[step - 1]._asdict().items() if array is not None}
        try:
            with file.open("wb") as out:
                np.savez(out, **arrays)
        except OSError as error:
            return f"the batch of the last cannot be written to {file} ({error.strerror or error})"
    return f"the batch of the last is in {file}"
