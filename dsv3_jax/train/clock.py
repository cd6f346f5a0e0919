"""How fast a run goes, and how much of its time it waits for its input."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class Clock:
    """Measures laps of a loop over batches: from one logged step to the next."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._waited = 0.0

    def waiting_for(self, items: Iterable[Item]) -> Iterator[Item]:
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

    def lap(self, tokens: float) -> dict[str, float]:
        """`tokens_per_second` and `input_wait`, the share of the time spent waiting for batches, since the last lap began."""
        seconds = time.perf_counter() - self._since
        return {"tokens_per_second": tokens / seconds, "input_wait": self._waited / seconds}

    def start(self) -> None:
        """Begins a lap: what came since the last was measured belongs to none."""
        self._since, self._waited = time.perf_counter(), 0.0
