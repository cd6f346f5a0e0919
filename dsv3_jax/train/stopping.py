"""How a run ends before its time: SIGTERM and SIGINT are noted, the step at hand is finished and saved."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from dsv3_jax.parallel.multihost import read_note, write_note

_NOTE = "stop"
# Processes are at most two steps apart: each waits for the metrics of a step before it sends off the next but one.
_STEPS_AHEAD = 4


class StopRequest:
    """Whether a signal asks the run to stop; a context manager, within which SIGTERM and a first SIGINT end no process.

    A second SIGINT does. Of several processes any may be told: all of them then stop after the same step.
    """

    def __init__(self, num_processes: int) -> None:
        self._alone = num_processes == 1
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._last_step: int | None = None

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def reason(self) -> str:
        """What asked for it, in words."""
        return self._signal.name if self._signal is not None else "another process"

    def after(self, step: int) -> bool:
        """Whether the run stops after this step, which every process asks of every step."""
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
            signal.signal(number, self._before[signal.SIGINT])
