"""Everything that watches a run while it trains, under one name: so that train.py tells the story and not its footnotes."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import Config
from dsv3_jax.config.run import StepValues
from dsv3_jax.train.clock import Clock
from dsv3_jax.train.evaluation import HeldoutReport
from dsv3_jax.train.expert_load import ExpertLoad
from dsv3_jax.train.metrics import MetricsLog, finite
from dsv3_jax.train.profiling import StepProfiler
from dsv3_jax.train.progress import ProgressBar
from dsv3_jax.train.report import write_report
from dsv3_jax.train.speed import speed
from dsv3_jax.train.watchdog import Watchdog

Item = TypeVar("Item")


class Observer(contextlib.ExitStack):
    """Metrics, progress, expert loads, profiler and watchdog of a run; a context manager.

    All processes call it alike; only the first one writes and prints.
    """

    def __init__(
        self, run: RunDirectory, config: Config, mesh: Mesh, first_step: int, *, profiled: range, started: float, writes: bool
    ) -> None:
        """Opens the logs.

        Args:
          run: where they are kept.
          config: the run's.
          mesh: of the devices that it trains on.
          first_step: steps taken before this start.
          profiled: steps to trace.
          started: when the program did, by `time.perf_counter`.
          writes: whether this process writes and prints.
        """
        super().__init__()
        self._run, self._config, self._schedules, self._mesh, self._writes = run, config, config.schedules, mesh, writes
        self._first = first_step
        self._logged_tokens = self._schedules.tokens_before(first_step)
        self._started = started
        self._clock = Clock()
        self._loads = ExpertLoad(run, writes=writes)
        tokens = (self._schedules.tokens_before(step) for step in (first_step, config.train.steps))
        self._log = self.enter_context(MetricsLog(run, first_step, writes=writes))
        self._bar = self.enter_context(ProgressBar(*tokens, shows=writes))
        self._watchdog = self.enter_context(Watchdog())
        self._profiler = self.enter_context(StepProfiler(run, profiled, traces=writes, say=self._bar.say))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows logged so far, those of earlier starts too."""
        return self._log.rows

    @property
    def median_speed(self) -> float | None:
        """Median over those rows of their tokens a second."""
        speeds = [row["tokens_per_second"] for row in self.rows if "tokens_per_second" in row]
        return statistics.median(speeds) if speeds else None

    def say(self, text: str) -> None:
        """Prints a line."""
        self._bar.say(text)

    def waiting_for(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The batches; waiting for them is measured."""
        return self._clock.waiting_for(batches)

    def before_step(self, step: int) -> None:
        """To be called before a step is sent to the devices."""
        self._profiler.before(step)

    def after_step(self, step: int, state: Any, load: dict[str, jax.Array]) -> None:
        """To be called when it has been, with its results, which may still be on their way."""
        self._profiler.after(step, state)
        self._loads.accumulate(load)
        self._watchdog.step_done(step)
        if step == self._first + 1:
            jax.block_until_ready(state)
            self.say(f"first step done {time.perf_counter() - self._started:.1f} s after the start")
            # What compiling took is no speed of the run's.
            self._logged_tokens = self._schedules.tokens_before(step)
            self._clock.start()

    def log(
        self,
        step: int,
        metrics: dict[str, jax.Array],
        values: StepValues,
        skipped: int,
        evaluate: Callable[[], HeldoutReport] | None = None,
    ) -> None:
        """Logs a step.

        Args:
          step: its number.
          metrics: of the step.
          values: what it was taken with.
          skipped: steps of the run that were.
          evaluate: gives held-out scores to log with it; the time that takes belongs to no step.
        """
        tokens = self._schedules.tokens_before(step)
        row = {"step": step, **finite(metrics), "learning_rate": float(values.learning_rate), "skipped": skipped}
        row |= {"batch_size": self._schedules.batch_size(step - 1), "tokens": tokens}
        if tokens > self._logged_tokens:
            row |= self._clock.lap(tokens - self._logged_tokens)
            row |= speed(self._config, row["tokens_per_second"], self._mesh.size, self._mesh.devices.flat[0].device_kind)
        with self._watchdog.paused():
            row |= evaluate().row if evaluate is not None else {}
        self._log.write(row)
        self._log.attempt("expert_load.npz", self._loads.write)
        self._bar.show(row)
        self._logged_tokens = tokens
        self._clock.start()

    def draw_report(self) -> None:
        """Draws report.png."""
        if self._writes:
            write_report(self._run, self.rows, self._config.model)

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Around what is no step, such as a save: however long it takes, none hangs."""
        return self._watchdog.paused()
