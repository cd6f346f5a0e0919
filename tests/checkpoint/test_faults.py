"""Orbax's tracebacks are kept off stderr, and those of no other code."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from dsv3_jax.checkpoint.faults import quiet_orbax


def raised_in(filename: str, error: Exception) -> Callable[[], None]:
    """A function of that file, to all appearances, that raises `error`."""
    names = {"error": error}
    exec(compile("def read():\n    raise error\n", filename, "exec"), names)
    return names["read"]  # type: ignore[return-value]


def leave_unread(read: Callable[[], None]) -> None:
    """A read that fails while nobody waits for it, as when another failed before it."""

    async def several() -> None:
        asyncio.gather(one())
        await asyncio.sleep(0.01)

    async def one() -> None:
        read()

    gc.freeze()  # So that collecting takes no time.
    loop = asyncio.new_event_loop()
    loop.run_until_complete(several())
    loop.close()
    gc.collect()
    gc.unfreeze()


ORBAX = os.path.join("somewhere", "orbax", "checkpoint", "reading.py")
ARRAY = "Encountered error while reading array index: (slice(0, 3, 1))"


@pytest.mark.parametrize(
    ("filename", "error"),
    [(ORBAX, Exception(ARRAY)), ("elsewhere.py", ValueError('OUT_OF_RANGE: Error reading "params.w/0.0" in OCDBT database'))],
    ids=["Orbax", "TensorStore"],
)
def test_reads_that_failed_unnoticed_say_nothing(filename: str, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    quiet_orbax()
    leave_unread(raised_in(filename, error))
    assert not caplog.records


@pytest.mark.parametrize("error", [Exception(ARRAY), ValueError("out of range")], ids=repr)
def test_errors_of_others_are_heard(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    quiet_orbax()
    leave_unread(raised_in("mine.py", error))
    logging.getLogger("absl").warning("a warning of the program's own")
    assert "never retrieved" in caplog.text
    assert "of the program's own" in caplog.text


def test_a_read_that_ends_after_all_others_says_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda late: heard.append(str(late.exc_value)))
    quiet_orbax()
    installed = sys.unraisablehook
    quiet_orbax()
    assert sys.unraisablehook is installed
    # As a thread of TensorStore's calls it, with nothing above that could raise.
    sys.unraisablehook(SimpleNamespace(object=None, exc_value=RuntimeError("Event loop is closed")))
    sys.unraisablehook(SimpleNamespace(object=None, exc_value=RuntimeError("mine")))
    assert heard == ["mine"]
    leave_unread(raised_in(ORBAX, Exception(ARRAY)))
    assert not caplog.records
