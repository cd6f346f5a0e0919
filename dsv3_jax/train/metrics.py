"""What a run says while it trains: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.files import write_whole
from dsv3_jax.train.tensorboard import EventFiles


def finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a step as numbers; what is not finite, as after a skipped step, is left out: JSON has no word for it."""
    numbers = {name: float(value) for name, value in metrics.items()}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


class MetricsLog:
    """Appends one JSON object a logged step, digits in full, and the same to TensorBoard; a context manager.

    A continued run first drops the lines after the checkpoint it continues from: those steps are taken again. Where a file
    cannot be written (a full disk, say), a line on stderr says so, once, and the rows are kept until it can be.
    """

    def __init__(self, run: RunDirectory, first_step: int, *, writes: bool = True) -> None:
        """Args: writes: whether this process writes; the others of a run only keep the rows."""
        self._folder = run.path
        self.path = run.metrics_file
        self.rows = [row for row in read_metrics(run) if row["step"] <= first_step]
        self._board: EventFiles | None = None
        self._is_whole = True
        self._failed: set[str] = set()
        if writes:
            self._write_all()
            self._board = EventFiles(run.tensorboard, first_step + 1 if first_step else None)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            if not self._is_whole:
                self.attempt("metrics.jsonl", self._write_all)
            self.attempt("tensorboard", self._board.close)

    def write(self, row: dict[str, Any]) -> None:
        """Logs one step; `row` has `step` and numbers."""
        self.rows.append(row)
        if self._board is not None:
            self.attempt("metrics.jsonl", self._append)
            self.attempt("tensorboard", functools.partial(self._board.write, row))

    def _append(self) -> None:
        # Object stores cannot append; and after a failure there may be half a line.
        if "://" in str(self.path) or not self._is_whole:
            self._write_all()
            return
        self._is_whole = False
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        self._is_whole = True

    def _write_all(self) -> None:
        self._is_whole = False
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._is_whole = True

    def attempt(self, name: str, write: Callable[[], object]) -> None:
        """Writes a file of the run directory; says when that begins to fail, and when it works again."""
        path = self._folder / name
        try:
            write()
        except OSError as error:
            if name not in self._failed:
                reason = error.strerror or error
                print(
                    f"warning: {path} cannot be written ({reason}); the run goes on, and tries again at the next log",
                    file=sys.stderr,
                    flush=True,
                )
            self._failed.add(name)
        else:
            if name in self._failed:
                print(f"warning: {path} can be written again, and lacks nothing", file=sys.stderr, flush=True)
            self._failed.discard(name)


def read_metrics(run: RunDirectory) -> list[dict[str, Any]]:
    """The rows logged so far; a line cut short by a crash is left out."""
    if not run.metrics_file.exists():
        return []
    rows = []
    for line in run.metrics_file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
