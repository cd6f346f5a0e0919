"""Guards of the training loop: skipped non-finite steps, graceful shutdown on signals, and a watchdog for hung steps."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from dsv3_jax.parallel.multihost import read_note, write_note


class NaNGuard:
    """Counter of steps skipped for a loss or gradient that is not finite; sets `abort_reason` after `limit` of them in a row.

    It skips and raises nothing itself. A step's flag is read once the next step is dispatched, so that devices need not wait.
    """

    def __init__(self, limit: int, keep: Callable[[int], str], total: int = 0, in_a_row: int = 0) -> None:
        """Args: limit: skipped steps in a row that end the run; keep: called with the last of them, saves its batch, returns
        the outcome in words; total, in_a_row: counts at the start.
        """
        self._limit = limit
        self._keep = keep
        self.abort_reason: str | None = None
        """Reason to end the run, once `limit` steps in a row were skipped; None before."""
        self.total = total
        self.in_a_row = in_a_row
        self._unread: tuple[int, Any] | None = None

    @property
    def counters(self) -> dict[str, int]:
        """The counts `total` and `in_a_row`, for a checkpoint: keyword arguments of the guard at the next start."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def see(self, step: int, flag: Any) -> None:
        """Call `update`, which waits for the flag of the step before; keep that of `step` (a device scalar, 1 if skipped)."""
        self.update()
        self._unread = step, flag

    def update(self) -> None:
        """Wait for the stored flag, if any, and count it; at the limit call `keep` and set `abort_reason`."""
        if self._unread is None:
            return
        (step, flag), self._unread = self._unread, None
        if not float(flag):
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row >= self._limit and self.abort_reason is None:
            self.abort_reason = (
                f"the loss or gradient of {self.in_a_row} steps in a row, up to step {step}, was not finite; all were skipped; "
                f"{self._keep(step)}; start again with a lower optimizer.learning_rate and another --run-dir"
            )


# ----------------------------------------------------------------------------------------------------------------------
# Graceful shutdown on SIGTERM and SIGINT


_NOTE = "stop"
# Processes are at most two steps apart: each waits for the metrics of a step before it dispatches the next but one.
_STEPS_AHEAD = 4


class GracefulShutdown:
    """Handler of SIGTERM and the first SIGINT that only remembers them, for `after`; a context manager.

    A second SIGINT interrupts at once. Of several processes any may get the signal: all stop after the same step.
    """

    def __init__(self, num_processes: int) -> None:
        self._alone = num_processes == 1
        self._signal: signal.Signals | None = None
        self._handlers_before: dict[signal.Signals, Any] = {}
        self._last_step: int | None = None

    def __enter__(self) -> GracefulShutdown:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers_before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    @property
    def reason(self) -> str:
        """Name of the signal that this process got, such as "SIGTERM"; "another process" if it got none."""
        return self._signal.name if self._signal is not None else "another process"

    def after(self, step: int) -> bool:
        """Return True if the run stops after this step (of several processes 4 steps after a signal); all call it each step."""
        if self._alone:
            return self._signal is not None
        if self._last_step is None:
            if self._signal is not None:
                write_note(_NOTE, str(step + _STEPS_AHEAD))
            note = read_note(_NOTE)
            self._last_step = int(note) if note is not None else None
        return self._last_step is not None and step >= self._last_step

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = self._signal or signal.Signals(number)
        if number == signal.SIGINT:  # From a keyboard; schedulers repeat SIGTERM.
            signal.signal(number, self._handlers_before[signal.SIGINT])


# ----------------------------------------------------------------------------------------------------------------------
# Watchdog: the stacks of all threads, when a step takes far longer than those before it


_REMEMBERED_STEPS = 100
_FEWEST_STEPS = 5


class Watchdog:
    """Watchdog over the steps of a loop; a context manager.

    When a step takes more than `factor` times the median of those before it, and more than `least` seconds, the stacks of
    all threads go to stderr, once, and another line when the step ends. The run goes on. The first six steps (the first
    compiles) are not watched. A thread of our own: `faulthandler.dump_traceback_later` cannot name the step.
    """

    def __init__(self, factor: float = 10.0, least: float = 10.0) -> None:
        self._factor = factor
        self._least = least
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._lock = threading.Lock()
        self._step = 0
        self._since: float | None = None
        self._warned = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def step_done(self, step: int) -> None:
        """Record the end of `step`, the start of the next; print to stderr if the watchdog had warned of it."""
        now = time.perf_counter()
        with self._lock:
            if self._since is not None:
                if self._warned:
                    print(f"the slow step {step} is done after {now - self._since:.0f} s", file=sys.stderr, flush=True)
                self._seconds.append(now - self._since)
            self._step, self._since, self._warned = step, now, False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block from the current step."""
        with self._lock:
            spent = None if self._since is None else time.perf_counter() - self._since
            self._since = None
        yield
        with self._lock:
            self._since = None if spent is None else time.perf_counter() - spent

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._least / 4)):
            with self._lock:
                if self._since is None or self._warned or len(self._seconds) < _FEWEST_STEPS:
                    continue
                taken, median = time.perf_counter() - self._since, statistics.median(self._seconds)
                self._warned = taken > max(self._factor * median, self._least)
                if self._warned:
                    reason = f"warning: step {self._step + 1} has taken {taken:.0f} s so far, and the median is {median:.2f} s"
                    print(f"{reason}; the run goes on; where all threads stand:", file=sys.stderr, flush=True)
                    faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
