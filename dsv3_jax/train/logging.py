"""Logging of a training run: metrics.jsonl, TensorBoard, the progress bar, speed, profiler and watchdog."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
from etils import epath
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column

from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import Config
from dsv3_jax.config.run import StepHyperparams
from dsv3_jax.data.batches import TrainBatches
from dsv3_jax.files import write_arrays, write_whole
from dsv3_jax.model.flops import flops_per_token
from dsv3_jax.parallel.devices import peak_flops
from dsv3_jax.train.evaluation import ValidationReport
from dsv3_jax.train.guards import Watchdog
from dsv3_jax.train.profiling import StepProfiler
from dsv3_jax.train.report import ExpertLoad, humanize, in_time, write_report

T = TypeVar("T")


class Observer(contextlib.ExitStack):
    """Metrics, progress, expert loads, profiler and watchdog of a run; a context manager.

    Every process calls it; only the first one writes and prints, but the watchdog of each one warns.
    """

    def __init__(
        self, run: RunDirectory, config: Config, mesh: Mesh, first_step: int, *, profiled: range, started: float, writes: bool
    ) -> None:
        """Open the logs in the run directory, and start the progress bar and the watchdog.

        Args: first_step: steps taken before this start; profiled: steps to trace; started: start of the program, by
          `time.perf_counter`; writes: True in the process that writes and prints.
        """
        super().__init__()
        self._run, self._config, self._mesh, self._writes = run, config, mesh, writes
        self._schedules, self._first, self._started = config.schedules, first_step, started
        self._logged_tokens, tokens = map(self._schedules.tokens_before, (first_step, config.train.steps))
        self._clock = Clock()
        self._loads = ExpertLoad(run, writes=writes)
        self._log = self.enter_context(MetricsLog(run, first_step, writes=writes))
        self._bar = self.enter_context(ProgressBar(self._logged_tokens, tokens, shows=writes))
        self._watchdog = self.enter_context(Watchdog())
        self._profiler = self.enter_context(StepProfiler(run, profiled, traces=writes, say=self._bar.say))
        self.rows = self._log.rows
        """All rows logged so far, those of earlier starts included."""
        self.say = self._bar.say
        self.data_timer = self._clock.data_timer
        self.before_step = self._profiler.before
        self.paused = self._watchdog.paused
        """Context for work that belongs to no step, such as a save: the watchdog ignores it."""

    @property
    def median_speed(self) -> float | None:
        """Median of the logged rows' tokens a second; None if no row has them."""
        speeds = [row["tokens_per_second"] for row in self.rows if "tokens_per_second" in row]
        return statistics.median(speeds) if speeds else None

    def after_step(self, step: int, state: Any, load: dict[str, jax.Array]) -> None:
        """Pass a dispatched step on to profiler, expert loads and watchdog; wait for the first one, and print its time."""
        self._profiler.after(step, state)
        self._loads.accumulate(load)
        self._watchdog.step_done(step)
        if step == self._first + 1:
            jax.block_until_ready(state)
            self.say(f"first step done {time.perf_counter() - self._started:.1f} s after the start")
            # The step that compiles does not count in the speed.
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
        """Log a step to metrics.jsonl, TensorBoard, expert_load.npz and the bar: finite metrics, hyperparameters, speed.

        It waits for `metrics`. `skipped`: steps so far; `evaluate`: returns held-out scores to log, its time is in no step.
        """
        tokens = self._schedules.tokens_before(step)
        numbers = {name: float(value) for name, value in metrics.items()}
        row: dict[str, Any] = {"step": step, **{name: value for name, value in numbers.items() if math.isfinite(value)}}
        row |= {"learning_rate": float(values.learning_rate), "skipped": skipped}
        row |= {"batch_size": self._schedules.batch_size(step - 1), "tokens": tokens}
        if tokens > self._logged_tokens:
            row |= self._clock.throughput(tokens - self._logged_tokens)
            row |= speed(self._config, row["tokens_per_second"], self._mesh.size, self._mesh.devices.flat[0].device_kind)
        with self.paused():
            row |= evaluate().row if evaluate is not None else {}
        self._log.write(row)
        self._log.attempt("expert_load.npz", self._loads.write)
        self._bar.show(row)
        self._logged_tokens = tokens
        self._clock.start()

    def draw_report(self) -> None:
        """Draw report.png from all rows, on the process that writes."""
        if self._writes:
            write_report(self._run, self.rows, self._config.model)


# ----------------------------------------------------------------------------------------------------------------------
# Rows of metrics: metrics.jsonl and TensorBoard


class MetricsLog:
    """Rows of metrics.jsonl, one JSON object a logged step, and the same for TensorBoard; a context manager.

    A resumed run first drops the rows after its checkpoint: those steps are taken again. If a file cannot be written (a full
    disk, say), one line on stderr says so, and the rows are kept until it can be.
    """

    def __init__(self, run: RunDirectory, first_step: int, *, writes: bool = True) -> None:
        """Read the rows up to `first_step`; if `writes`, rewrite the file with them, and open TensorBoard files."""
        self._folder = run.path
        self.path = run.metrics_file
        self.rows = [row for row in read_metrics(run) if row["step"] <= first_step]
        self._board: EventFiles | None = None
        self._is_whole = False
        self._failed: set[str] = set()
        if writes:
            self._save()
            self._board = EventFiles(run.tensorboard, first_step + 1 if first_step else None)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            if not self._is_whole:
                self.attempt("metrics.jsonl", self._save)
            self.attempt("tensorboard", self._board.close)

    def write(self, row: dict[str, Any]) -> None:
        """Add the row of a step (`step`, and numbers) to `rows`; in the process that writes also to the files."""
        self.rows.append(row)
        if self._board is not None:
            self._board.add(row)
            self.attempt("metrics.jsonl", self._save)
            self.attempt("tensorboard", self._board.flush_if_due)

    def _save(self) -> None:
        """Append the last row to the file, or rewrite all rows: in an object store, and if the file may be damaged."""
        appends = self._is_whole and "://" not in str(self.path)
        text = "".join(json.dumps(row) + "\n" for row in (self.rows[-1:] if appends else self.rows))
        self._is_whole = False
        if appends:
            with self.path.open("a") as file:
                file.write(text)
        else:
            write_whole(self.path, text)
        self._is_whole = True

    def attempt(self, name: str, write: Callable[[], object]) -> None:
        """Call `write`, which writes the run's file `name`; warn at its first OSError, and at the next success, on stderr."""
        path, message = self._folder / name, ""
        try:
            write()
        except OSError as error:
            if name not in self._failed:
                reason = error.strerror or error
                message = f"{path} cannot be written ({reason}); the run goes on, and tries again at the next log"
            self._failed.add(name)
        else:
            if name in self._failed:
                message = f"{path} can be written again, and lacks nothing"
            self._failed.discard(name)
        if message:
            print(f"warning: {message}", file=sys.stderr, flush=True)


def read_metrics(run: RunDirectory) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl, without lines cut short by a crash; [] if there is no file."""
    if not run.metrics_file.exists():
        return []
    rows = []
    for line in run.metrics_file.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


_FLUSH_SECONDS = 120
"""Least time between two flushes of TensorBoard rows: object stores take files whole."""


class EventFiles:
    """TensorBoard event files of a run. Rows wait in memory until they are on the disk: a full disk loses none."""

    def __init__(self, folder: epath.Path, purge_step: int | None) -> None:
        """Args: purge_step: first step to hide in the files of earlier starts; None hides none."""
        self._folder = str(folder)
        self._purge_step = purge_step
        self._waiting: list[tuple[float, dict[str, Any]]] = []
        self._writer: Any = None
        self._files = 0
        self._flushed_at = -math.inf

    def add(self, row: dict[str, Any]) -> None:
        """Add the numbers of `row` at its `step`, for the next flush."""
        self._waiting.append((time.time(), row))

    def flush_if_due(self) -> None:
        """Call `flush` unless it succeeded in the last two minutes; raises as `flush`."""
        if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the waiting rows to an event file.

        Raises:
          OSError: if that fails; the rows are kept for the next flush, into another file.
        """
        # Not at the top: tensorboardX imports torch, where that is installed.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import directory_check
        from tensorboardX.summary import scalar

        events, now = [], time.time()
        if self._purge_step is not None:
            events.append(Event(step=self._purge_step, wall_time=now, file_version="brain.Event:2"))
            events.append(Event(step=self._purge_step, wall_time=now, session_log=SessionLog(status=SessionLog.START)))
        for wall_time, row in self._waiting:
            summaries = [scalar(name, value) for name, value in row.items() if name != "step"]
            events += [Event(step=row["step"], wall_time=wall_time, summary=summary) for summary in summaries]
        try:
            if self._writer is None:
                directory_check(self._folder)
                # The library names files by the second.
                self._writer = EventsWriter(os.path.join(self._folder, "events"), f".{os.getpid()}.{self._files}")
                self._files += 1
            for event in events:
                self._writer.write_event(event)
            self._writer.flush()
        except OSError:
            with contextlib.suppress(OSError):
                self._close()
            raise
        self._waiting, self._purge_step, self._flushed_at = [], None, time.monotonic()

    def close(self) -> None:
        """Flush the waiting rows, if any, and close the file; raises as `flush`."""
        if self._waiting:
            self.flush()
        self._close()

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


# ----------------------------------------------------------------------------------------------------------------------
# Speed: tokens a second, input wait, model FLOPs utilisation


class Clock:
    """Timer of the intervals between logged steps, and of the waiting for batches in them."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start an interval, with no waiting yet."""
        self._since, self._waited = time.perf_counter(), 0.0

    def data_timer(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; the time it takes to get one counts as waiting."""
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
        """Return the interval's `tokens_per_second`, from `tokens`, and `input_wait`, its share spent waiting for batches."""
        seconds = time.perf_counter() - self._since
        return {"tokens_per_second": tokens / seconds, "input_wait": self._waited / seconds}


def speed(config: Config, tokens_per_second: float, num_devices: int, device_kind: str) -> dict[str, float]:
    """Return the metrics of speed: `tokens_per_second`, and `mfu`, or `model_flops_per_second` if the peak is unknown.

    Model FLOPs are the causal count of `flops_per_token`: attention over the whole sequence (documents or not), a backward
    pass of twice the forward, MTP depths, nothing for recomputation. The peak is that of dense bfloat16, in every dtype.
    """
    flops = tokens_per_second * flops_per_token(config.model, config.train.sequence_length).causal
    peak = peak_flops(device_kind)
    of_machine = {"model_flops_per_second": flops} if peak is None else {"mfu": flops / (num_devices * peak)}
    return {"tokens_per_second": tokens_per_second, **of_machine}


# ----------------------------------------------------------------------------------------------------------------------
# Progress bar: step, loss, speed, load violation, tokens and time left


_REMEMBERED_ROWS = 20


class ProgressBar(Progress):
    """Progress bar on a terminal, else a line every tenth of the run; a context manager.

    Progress is counted in tokens, since batches may grow. The time left is estimated from the speed over the last twenty
    logged rows, with evaluations and checkpoints in between.
    """

    def __init__(self, first_tokens: int, tokens: int, *, shows: bool = True) -> None:
        """Args: first_tokens: seen before this start; tokens: of the whole run; shows: True in the process that prints."""
        self._shows = shows
        self._tokens = tokens
        self._printed = self._tenths(first_tokens)
        self._seen: collections.deque[tuple[float, int]] = collections.deque(maxlen=_REMEMBERED_ROWS + 1)
        description = TextColumn("{task.description}", table_column=Column())  # On a narrow terminal it takes several lines.
        columns = description, BarColumn(bar_width=20), TaskProgressColumn(), TextColumn("{task.fields[amount]}")
        console = Console()
        super().__init__(*columns, console=console, disable=not (shows and console.is_terminal))
        self._task = self.add_task("compiling", total=tokens, completed=first_tokens, amount="")

    def show(self, row: dict[str, float]) -> None:
        """Show a logged row: `step`, `tokens`, `max_violation`, the metrics of speed, and `main_loss` unless skipped."""
        if not self._shows:
            return
        tokens = int(row["tokens"])
        self._seen.append((time.perf_counter(), tokens))
        loss = f"loss {row['main_loss']:.3f}" if "main_loss" in row else "skipped"
        text = f"step {row['step']}  {loss}  {_speed_in_words(row)}  violation {row['max_violation']:.2f}"
        amount = f"{humanize(tokens)} of {humanize(self._tokens)} tokens"
        (then, before), (now, _) = self._seen[0], self._seen[-1]
        by_clock = tokens > before and now > then
        tokens_per_second = (tokens - before) / (now - then) if by_clock else row.get("tokens_per_second")
        if tokens_per_second:
            amount += f", {in_time((self._tokens - tokens) / tokens_per_second)} left"
        self.update(self._task, completed=tokens, description=text, amount=amount)
        if not self.console.is_terminal and self._tenths(tokens) > self._printed:
            self._printed = self._tenths(tokens)
            print(f"{text}  {amount}", flush=True)

    def _tenths(self, tokens: int) -> int:
        return 10 * tokens // self._tokens

    def say(self, text: str) -> None:
        """Print a line, above the bar on a terminal; nothing unless this process shows."""
        if self._shows and self.console.is_terminal:
            self.print(text)
        elif self._shows:
            print(text, flush=True)


def _speed_in_words(row: dict[str, float]) -> str:
    if "tokens_per_second" not in row:  # The first row of a start.
        return "compiled"
    words = f"{row['tokens_per_second']:,.0f} tokens/s"
    if "mfu" in row:
        return f"{words} ({row['mfu']:.1%} MFU)"
    flops = row.get("model_flops_per_second")
    return words if flops is None else f"{words} ({flops / 1e12:.2g} model TFLOP/s)"


def keep_batch(run: RunDirectory, batches: TrainBatches, writes: bool, step: int) -> str:
    """Write the batch of a step (from 1) to skipped_step_<step>.npz if `writes`; return the outcome, or error, in words."""
    file = run.path / f"skipped_step_{step}.npz"
    if writes:
        names = "tokens_ABT", "targets_ABT", "weights_ABT", "starts_ABT"  # Of the file format, not of the batch's fields.
        arrays = {name: array for name, array in zip(names, batches[step - 1], strict=True) if array is not None}
        try:
            write_arrays(file, arrays)
        except OSError as error:
            return f"the batch of step {step} cannot be written to {file} ({error.strerror or error})"
    return f"the batch of step {step} is in {file}"
