"""Connections that are not waited for without end, and no more of them than the process has descriptors for."""

from __future__ import annotations

import asyncio
import os
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

_OTHER_FILES = 32
"""Descriptors left for what else the program opens."""


def most_connections() -> int:
    """How many more descriptors this process may have, but for some."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(limit - len(os.listdir("/dev/fd")) - _OTHER_FILES, 1)


class Connection(H11Protocol):
    """uvicorn's, which by itself waits forever for the head of a request."""

    def __init__(self, *arguments: Any, read_timeout: float, most: int, **options: Any) -> None:
        """Args beyond uvicorn's: read_timeout: seconds for a head; most: connections, of all clients together."""
        super().__init__(*arguments, **options)
        self._read_timeout, self._most = read_timeout, most
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._most:
            transport.abort()
        else:
            self._time_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def _time_head(self) -> None:
        """Runs the timer, from the end of what was before, until there is a request."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(self._read_timeout, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
