"""What goes wrong between a program and its disk, as Orbax and TensorStore tell it."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

# TensorStore raises ValueError for everything, and puts the number of the system's error, if it is one, into the text.
_SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")
# Of a store that is not a file system, and where a message was cut short.
_OF_A_STORE = re.compile(r"\b(RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED|DATA_LOSS): ")
_OF_TENSORSTORE = re.compile(r"[A-Z_]+: ")  # How the text of each of its errors starts.
_ORBAX = f"{os.sep}orbax{os.sep}"
_TENSORSTORE = "tensorstore_spec"  # What a write that failed ends with, long after the save has.
_LATE = contextlib.ExitStack()  # Is never left.
# Not the fault of what lies on the disk.
_OF_THE_MACHINE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.ESTALE}
)


def io_reason(error: BaseException) -> str | None:
    """Why reading or writing failed, in a few words; None if `error` is no such failure but a bug."""
    for one in _chain(error):
        number = _number(one)
        if number is not None:
            return os.strerror(number)
        if isinstance(one, OSError) or (isinstance(one, ValueError) and _OF_A_STORE.search(str(one))):
            return one_line(one)
    return None


def is_of_the_machine(error: BaseException) -> bool:
    """Whether a failed read says nothing about what was read: permissions, memory, too many open files."""
    return any(isinstance(one, MemoryError) or _number(one) in _OF_THE_MACHINE for one in _chain(error))


def one_line(error: BaseException) -> str:
    """The error's first line, cut short."""
    return f"{str(error) or type(error).__name__}".partition("\n")[0][:200]


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _SYSTEM_ERROR.search(str(error)) if isinstance(error, ValueError) else None
    return int(found[1]) if found else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def orbax_keeps_quiet() -> Iterator[None]:
    """Keeps from stderr what Orbax says there about an error that it raises as well: hundreds of lines of tracebacks."""
    with _without_tracebacks(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)
        yield


@functools.cache
def late_reads_keep_quiet() -> None:
    """Where one read fails, those under way fail later, with nobody to tell: when, nothing says, so this has no end."""
    _LATE.enter_context(_without_tracebacks())


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    report, logs = sys.unraisablehook, [logging.getLogger(name) for name in ("absl", "asyncio")]

    def is_not_orbax(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, ValueError) and _OF_TENSORSTORE.match(str(error)):
            return False
        raised_in = (frame.filename for frame in traceback.extract_tb(error.__traceback__ if error else None))
        message = record.getMessage()
        return _TENSORSTORE not in message and not any(_ORBAX in name for name in (record.pathname, message, *raised_in))

    def report_others(late: Any) -> None:
        code = getattr(late.object, "cr_code", None)
        of_tensorstore = late.object is None and str(late.exc_value) == "Event loop is closed"
        if not of_tensorstore and (code is None or _ORBAX not in code.co_filename):
            report(late)

    sys.unraisablehook = report_others
    for log in logs:
        log.addFilter(is_not_orbax)
    try:
        yield
    finally:
        if sys.unraisablehook is report_others:  # Else the one that took its place since asks it.
            sys.unraisablehook = report
        for log in logs:
            log.removeFilter(is_not_orbax)
