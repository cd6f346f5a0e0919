"""Errors of reading and writing in Orbax and TensorStore: their reasons in one line, and their tracebacks kept off stderr."""

from __future__ import annotations

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

# TensorStore raises ValueError for everything; the text has the error number of the system, if there is one.
_SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")
# Of a store that is not a file system, and of messages that were cut short.
_STORE_ERROR = re.compile(r"\b(RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED|DATA_LOSS): ")
_TENSORSTORE_ERROR = re.compile(r"[A-Z_]+: ")
_TENSORSTORE = "tensorstore_spec"  # In the text of a write that failed after the end of its save.
_ORBAX = f"{os.sep}orbax{os.sep}"
# Errors that say nothing about the data on the disk.
_OF_THE_MACHINE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.ESTALE}
)


def io_reason(error: BaseException) -> str | None:
    """Return the system's or the store's text of a failed read or write, from `error` or its causes; None if no I/O failed."""
    for cause in _chain(error):
        number = _error_number(cause)
        if number is not None:
            return os.strerror(number)
        if isinstance(cause, OSError) or (isinstance(cause, ValueError) and _STORE_ERROR.search(str(cause))):
            return one_line(cause)
    return None


def is_of_the_machine(error: BaseException) -> bool:
    """Return True if `error` or a cause is of permissions, memory, open files or a time-out, and not of the data on disk."""
    return any(isinstance(cause, MemoryError) or _error_number(cause) in _OF_THE_MACHINE for cause in _chain(error))


def one_line(error: BaseException) -> str:
    """Return the first line of the error's text, at most 200 characters; the name of its type if it has no text."""
    return (str(error) or type(error).__name__).partition("\n")[0][:200]


def _error_number(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = _SYSTEM_ERROR.search(str(error)) if isinstance(error, ValueError) else None
    return int(found[1]) if found else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# ----------------------------------------------------------------------------------------------------------------------
# Orbax logs hundreds of lines about errors that it also raises, some of them long after the read or write has failed.


def quiet_orbax() -> None:
    """Install filters, for the whole process, that hide Orbax's log records, unraisable errors and "never awaited" warnings."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_not_orbax)
    warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)
    if getattr(sys.unraisablehook, "func", None) is not _report_others:
        sys.unraisablehook = functools.partial(_report_others, sys.unraisablehook)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, ValueError) and _TENSORSTORE_ERROR.match(str(error)):
        return False
    raised_in = (frame.filename for frame in traceback.extract_tb(error.__traceback__ if error else None))
    message = record.getMessage()
    return _TENSORSTORE not in message and not any(_ORBAX in name for name in (record.pathname, message, *raised_in))


def _report_others(report: Any, unraisable: Any) -> None:
    """Call `report(unraisable)`, unless the error is of a coroutine of Orbax or of a read after its event loop was closed."""
    code = getattr(unraisable.object, "cr_code", None)
    is_late_read = unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
    if not is_late_read and (code is None or _ORBAX not in code.co_filename):
        report(unraisable)
