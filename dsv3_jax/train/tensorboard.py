"""TensorBoard's event files, written so that a full disk ends no run.

tensorboardX's SummaryWriter writes from a thread of its own; an error ends that thread, and the run then waits for good at its
full queue. So its event files are written here without one, and what did not reach the disk is written again.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import directory_check
from tensorboardX.summary import scalar

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
