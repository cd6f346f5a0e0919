"""Everything that watches a run while it trains, under one name: so that train.py tells the story and not its footnotes."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import directory_check
from tensorboardX.summary import scalar

from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import Config
from dsv3_jax.config.run import StepHyperparams
from dsv3_jax.data import TrainBatches
from dsv3_jax.files import write_whole
from dsv3_jax.model.flops import flops_per_token
from dsv3_jax.parallel.devices import peak_flops
from dsv3_jax.train.evaluation import ValidationReport
from dsv3_jax.train.guards import Watchdog
from dsv3_jax.train.profiling import StepProfiler
from dsv3_jax.train.report import ExpertLoad, humanize, in_time, write_report

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

    def data_timer(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The batches; waiting for them is measured."""
        return self._clock.data_timer(batches)

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
        values: StepHyperparams,
        skipped: int,
        evaluate: Callable[[], ValidationReport] | None = None,
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
            row |= self._clock.throughput(tokens - self._logged_tokens)
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


# ----------------------------------------------------------------------------------------------------------------------
# What a run says while it trains: metrics.jsonl and TensorBoard.


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


# ----------------------------------------------------------------------------------------------------------------------
# TensorBoard's event files, written so that a full disk ends no run.


_FLUSH_SECONDS = 120
"""At most so long a row waits in memory: object stores take files whole."""


class EventFiles:
    """Scalars of one run for TensorBoard. Nothing is written before the first row."""

    def __init__(self, folder: epath.Path, purge_step: int | None) -> None:
        """Args: purge_step: hides what earlier files hold of this step and those after it."""
        self._folder = str(folder)
        self._waiting: list[Event] = []
        if purge_step is not None:
            self._waiting.append(Event(step=purge_step, file_version="brain.Event:2", wall_time=time.time()))
            session = SessionLog(status=SessionLog.START)
            self._waiting.append(Event(step=purge_step, session_log=session, wall_time=time.time()))
        self._writer: EventsWriter | None = None
        self._files = 0
        self._written = 0
        self._flushed_at = 0.0

    def write(self, row: dict[str, Any]) -> None:
        """Adds `step` and the numbers of `row`.

        Raises:
          OSError: if that, or an earlier row, cannot be written; it is kept and tried again with the next.
        """
        for name, value in row.items():
            if name != "step":
                self._waiting.append(Event(step=row["step"], summary=scalar(name, value), wall_time=time.time()))
        self._write()
        if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Makes sure that all rows are on the disk; raises OSError like `write`."""
        self._write()
        if self._writer is not None:
            try:
                self._writer.flush()
            except OSError:
                self._give_up_file()
                raise
            self._waiting.clear()
            self._written = 0
            self._flushed_at = time.monotonic()

    def close(self) -> None:
        """`flush`, and closes the file; raises OSError like `write`."""
        self.flush()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self) -> None:
        if len(self._waiting) == self._written:
            return
        try:
            if self._writer is None:
                directory_check(self._folder)
                # The library names files by the second.
                self._writer = EventsWriter(os.path.join(self._folder, "events"), f".{os.getpid()}.{self._files}")
                self._files += 1
            while self._written < len(self._waiting):
                self._writer.write_event(self._waiting[self._written])
                self._written += 1
        except OSError:
            self._give_up_file()
            raise

    def _give_up_file(self) -> None:
        """The next file gets all that has not been flushed into this one, of which some may be there as well."""
        self._written = 0
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None


# ----------------------------------------------------------------------------------------------------------------------
# How fast a run goes, and how much of its time it waits for its input.


T = TypeVar("T")


class Clock:
    """Measures laps of a loop over batches: from one logged step to the next."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._waited = 0.0

    def data_timer(self, items: Iterable[T]) -> Iterator[T]:
        """The items; what it takes to get one is counted as waiting."""
        iterator = iter(items)
        while True:
            asked = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - asked
            yield item

    def throughput(self, tokens: float) -> dict[str, float]:
        """`tokens_per_second` and `input_wait`, the share of the time spent waiting for batches, since the last lap began."""
        seconds = time.perf_counter() - self._since
        return {"tokens_per_second": tokens / seconds, "input_wait": self._waited / seconds}

    def start(self) -> None:
        """Begins a lap: what came since the last was measured belongs to none."""
        self._since, self._waited = time.perf_counter(), 0.0


# ----------------------------------------------------------------------------------------------------------------------
# How much of the machine a run uses: model FLOPs utilisation.


def model_flops(config: Config, tokens_per_second: float) -> float:
    """Model FLOP/s of a run, over all devices: tokens a second times `flops_per_token`'s causal count.

    It counts what the model asks for, not what the machine does: attention to the tokens before, the backward as twice the
    forward, MTP depths included, and nothing of what is computed again for want of memory. Where attention is kept within
    documents, it is still counted over the whole sequence.
    """
    return tokens_per_second * flops_per_token(config.model, config.train.sequence_length).causal


def mfu(config: Config, tokens_per_second: float, num_devices: int, device_kind: str) -> float | None:
    """Model FLOPs utilisation: the share of the devices' peak that the model's arithmetic takes.

      tokens_per_second * flops_per_token / (num_devices * peak)

    The FLOPs are those of `model_flops`: causal, nothing recomputed; the peak is that of dense bfloat16, whatever the run
    computes in.

    Args:
      config: the run.
      tokens_per_second: of the whole run.
      num_devices: devices of the mesh, as JAX counts them.
      device_kind: JAX's name for one of them.

    Returns:
      A share of 1, or None if the device's peak is not known here, as that of a CPU.
    """
    peak = peak_flops(device_kind)
    return None if peak is None else model_flops(config, tokens_per_second) / (num_devices * peak)


def speed(config: Config, tokens_per_second: float, num_devices: int, device_kind: str) -> dict[str, float]:
    """What a logged row says of speed: `tokens_per_second`, and `mfu` where it is known, else `model_flops_per_second`."""
    share = mfu(config, tokens_per_second, num_devices, device_kind)
    of_machine = {"model_flops_per_second": model_flops(config, tokens_per_second)} if share is None else {"mfu": share}
    return {"tokens_per_second": tokens_per_second, **of_machine}


# ----------------------------------------------------------------------------------------------------------------------
# The progress bar of a run: step, loss, speed, the largest load violation, the tokens seen and the time left.


_REMEMBERED_ROWS = 20


class ProgressBar:
    """A bar on a terminal; where the output is no terminal, a line every tenth of the run. A context manager.

    Progress is counted in tokens, for batches may grow. The time left is that of the tokens to come at the speed of the last
    twenty logged rows, with whatever went on between them: held-out losses and checkpoints take time too.
    """

    def __init__(self, first_tokens: int, tokens: int, *, shows: bool = True) -> None:
        """Args: first_tokens: seen before this start; tokens: of the whole run; shows: whether this process prints."""
        self._shows = shows
        self._tokens = tokens
        self._printed = self._tenths(first_tokens)
        self._seen: collections.deque[tuple[float, int]] = collections.deque(maxlen=_REMEMBERED_ROWS + 1)
        description = TextColumn("{task.description}", table_column=Column())  # On a narrow terminal it takes several lines.
        columns = description, BarColumn(bar_width=20), TaskProgressColumn(), TextColumn("{task.fields[amount]}")
        self._console = Console()
        self._progress = Progress(*columns, console=self._console, disable=not (shows and self._console.is_terminal))
        self._task = self._progress.add_task("compiling", total=tokens, completed=first_tokens, amount="")

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, row: dict[str, float]) -> None:
        """Shows a logged row: `step`, `tokens`, `max_violation`, `speed`'s figures; `main_loss` unless the step was skipped."""
        if not self._shows:
            return
        tokens = int(row["tokens"])
        self._seen.append((time.perf_counter(), tokens))
        loss = f"loss {row['main_loss']:.3f}" if "main_loss" in row else "skipped"
        text = f"step {row['step']}  {loss}  {_speed_of(row)}  violation {row['max_violation']:.2f}"
        amount = f"{humanize(tokens)} of {humanize(self._tokens)} tokens"
        if speed := self._speed(row):
            amount += f", {in_time((self._tokens - tokens) / speed)} left"
        self._progress.update(self._task, completed=tokens, description=text, amount=amount)
        if not self._console.is_terminal and self._tenths(tokens) > self._printed:
            self._printed = self._tenths(tokens)
            print(f"{text}  {amount}", flush=True)

    def _tenths(self, tokens: int) -> int:
        return 10 * tokens // self._tokens

    def _speed(self, row: dict[str, float]) -> float | None:
        """Tokens a second, by the clock; with nothing to compare with yet, what the row says, if it does."""
        (then, before), (now, tokens) = self._seen[0], self._seen[-1]
        return (tokens - before) / (now - then) if tokens > before and now > then else row.get("tokens_per_second")

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self._shows:
            return
        self._progress.print(text) if self._console.is_terminal else print(text, flush=True)


def _speed_of(row: dict[str, float]) -> str:
    """Tokens a second, and what that comes to; the first row of a start may have none."""
    return f"{row['tokens_per_second']:,.0f} tokens/s{_of_machine(row)}" if "tokens_per_second" in row else "compiled"


def _of_machine(row: dict[str, float]) -> str:
    """What the speed comes to on these devices, if the row says so."""
    if "mfu" in row:
        return f" ({row['mfu']:.1%} MFU)"
    return f" ({row['model_flops_per_second'] / 1e12:.2g} model TFLOP/s)" if "model_flops_per_second" in row else ""


def keep_batch(run: RunDirectory, batches: TrainBatches, writes: bool, step: int) -> str:
    """Writes the whole batch of a step (counted from 1) into the run directory, as an .npz of its arrays by their names.

    Args: writes: whether this process does. Returns: what became of it, in words.
    """
    file = run.path / f"skipped_step_{step}.npz"
    if writes:
        names = "tokens_ABT", "targets_ABT", "weights_ABT", "starts_ABT"  # Of the file, whatever the fields are called.
        arrays = {name: array for name, array in zip(names, batches[step - 1], strict=True) if array is not None}
        try:
            with file.open("wb") as out:
                np.savez(out, **arrays)
        except OSError as error:
            return f"the batch of the last cannot be written to {file} ({error.strerror or error})"
    return f"the batch of the last is in {file}"
