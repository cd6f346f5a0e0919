"""A thread that speaks up when a step takes far longer than the steps before it: it dumps the stacks of all threads."""

from __future__ import annotations

import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator

_REMEMBERED_STEPS = 100
_FEWEST_STEPS = 5


class Watchdog:
    """Watches the steps of a loop; a context manager.

    When a step takes more than `factor` times the median of those before it, and more than `least` seconds, the stacks of
    all threads go to stderr, once, and another line when it goes on. The run is left alone: what to do is the reader's
    decision. The first step, which compiles, is not watched.
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
        """Says that a step is done, and the next begins."""
        now = time.perf_counter()
        with self._lock:
            if self._since is not None:
                if self._warned:
                    print(f"step {step} is done after {now - self._since:.0f} s", file=sys.stderr, flush=True)
                self._seconds.append(now - self._since)
            self._step, self._since, self._warned = step, now, False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what belongs to no step: what it takes is not counted."""
        with self._lock:
            spent = None if self._since is None else time.perf_counter() - self._since
            self._since = None
        yield
        with self._lock:
            self._since = None if spent is None else time.perf_counter() - spent

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._least / 4)):
            with self._lock:
                self._look()

    def _look(self) -> None:
        if self._since is None or self._warned or len(self._seconds) < _FEWEST_STEPS:
            return
        taken, median = time.perf_counter() - self._since, statistics.median(self._seconds)
        if taken > max(self._factor * median, self._least):
            self._warned = True
            print(
                f"step {self._step + 1} has taken {taken:.0f} s, and the median is {median:.2f} s; where all threads stand:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
