"""Runs of several processes: joining, work of process 0 or of all in turn, checks that all agree, and a common end.

Cloud TPU (plain VMs, GKE, several slices) and SLURM describe the processes in the environment, which JAX reads; elsewhere the
`--distributed` flags do. In a run of one process nothing is exchanged: functions are called directly.

Messages go through the key-value store of JAX's coordination service (on process 0), not through the devices: an hour of
tokenising on process 0 then exceeds no time limit of a collective, and errors arrive while a device is busy.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from etils import epath
from jax._src.distributed import global_state  # The store has no public name; Orbax takes it from here too.

from dsv3_jax.config.checks import check
from dsv3_jax.config.cli import DistributedFlags

Result = TypeVar("Result")

SHUTDOWN_SECONDS = 30
"""Seconds that an ending process waits for the others to end; then the coordination service ends those still running.

A process that dies is noticed by its broken connections, or after JAX's 100 seconds without a heartbeat.
"""
OF_INPUT = ValueError, OSError, NotImplementedError
"""Types of errors of input, which `cli_main` reports in one line; the other processes end with the same line."""
_POLL_MILLISECONDS = 10_000
_turns = itertools.count()


def join_processes(flags: DistributedFlags) -> None:
    """Connect the processes of a run, and mute stdout on all but process 0. Call it before any device is used.

    It does nothing if the flags ask for one process, or name none and neither Cloud TPU nor SLURM (a step of several tasks)
    is found.

    Raises:
      ValueError: if the coordinator is not given as host:port, or the processes do not connect.
    """
    if flags.alone:
        return
    check(
        flags.coordinator is None or re.fullmatch(r".+:\d+", flags.coordinator) is not None,
        f"--distributed.coordinator is {flags.coordinator!r}; write host:port of process 0, such as host0:1234",
    )
    # Otherwise JAX catches SIGTERM to announce a preemption, which nothing here reads, and the process would not end.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        # A SLURM step of one task may carry the task count of its whole job.
        if flags.coordinator is not None or os.environ.get("SLURM_STEP_NUM_TASKS") != "1":
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", r"\s*Kubernetes environment detected")  # Any container may be in one.
                jax.distributed.initialize(
                    flags.coordinator, flags.num_processes, flags.process_id, shutdown_timeout_seconds=SHUTDOWN_SECONDS
                )
    except ValueError as error:
        if "coordinator_address" not in str(error):  # JAX raises this where it finds no cluster: a run of one process.
            raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the processes did not connect ({reason}); start all, with a coordinator they can reach") from error
    if jax.process_count() > 1:
        _leave_stdout_to_first()


def _leave_stdout_to_first() -> None:
    """Point stdout's file descriptor to /dev/null, against Gloo's C++ output too; process 0 prints to a copy made before."""
    descriptor = sys.__stdout__.fileno() if sys.__stdout__ else 1
    if is_first_process():
        sys.stdout.flush()
        copy = os.fdopen(os.dup(descriptor), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
        copy.reconfigure(line_buffering=copy.isatty())
        sys.stdout = copy
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def is_first_process() -> bool:
    """Return True on process 0, the one that prints and writes files."""
    return jax.process_index() == 0


def by_first_process(function: Callable[[], Any]) -> None:
    """Call `function` on process 0 while the others wait; an error there is raised on all.

    Raises:
      ValueError: on the others, for an error of input on process 0.
      RuntimeError: on the others, for any other error.
    """
    if jax.process_count() == 1:
        function()
        return
    key = f"dsv3_jax/{next(_turns)}"
    if not is_first_process():
        outcome, _, message = kv_get(key).partition(" ")
        check(outcome != "refused", message)
        if outcome == "failed":
            raise RuntimeError(f"process 0 failed: {message}")
        return
    try:
        function()
    except Exception as error:
        kv_set(key, f"{'refused' if isinstance(error, OF_INPUT) else 'failed'} {_text(error)}")
        raise
    kv_set(key, "done")


def on_every_process(function: Callable[[], Result]) -> Result:
    """Return this process's `function()`; if any process raises one of `OF_INPUT`, raise ValueError with its number on all."""
    if jax.process_count() == 1:
        return function()
    result, message = None, ""
    try:
        result = function()
    except OF_INPUT as error:
        message = _text(error)
    message = first_message(message)
    check(not message, message)
    return result  # type: ignore[return-value]  # Some process would have sent a message.


def first_process_first(function: Callable[[], Result]) -> Result:
    """Return this process's `function()`; the others call it after process 0, and find its results in a shared cache.

    Raises:
      ValueError, RuntimeError: on every process, as `by_first_process` and `on_every_process`.
    """
    results: list[Result] = []
    by_first_process(lambda: results.append(function()))
    return on_every_process(lambda: results[0] if results else function())


def check_agreement(values: Any) -> None:
    """Raise ValueError, on every process, unless all of them hold the same values.

    Args:
      values: a tree of plain values, in dicts whose keys name them in the error.
    """
    if jax.process_count() == 1:
        return
    leaves = jax.tree_util.tree_leaves_with_path(values, is_leaf=lambda leaf: leaf is None)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): repr(value) for path, value in leaves}
    first, *others = map(json.loads, exchange(json.dumps(named)))
    for process, theirs in enumerate(others, 1):
        for name in first | theirs:
            check(
                first.get(name) == theirs.get(name),
                f"process {process} has {name} {theirs.get(name)}, process 0 has {first.get(name)}; start all processes with "
                "the same command and files",
            )


def check_shared(path: epath.Path) -> None:
    """Raise ValueError, on every process, unless all of them see `path`, which process 0 has written."""
    hint = "is not here, though process 0 has written it; name a --run-dir that all hosts share"
    on_every_process(lambda: check(path.exists(), f"{path} {hint}"))


def wait_for_first_process() -> None:
    """Make the other processes wait until process 0 calls this; at exit they would wait only `SHUTDOWN_SECONDS` for it."""
    by_first_process(lambda: None)


def write_note(name: str, text: str) -> None:
    """Store a note for all processes under `name`; do nothing if one is stored there already."""
    with _suppress("ALREADY_EXISTS"):
        kv_set(f"dsv3_jax/note/{name}", text)


def read_note(name: str) -> str | None:
    """Return the note that any process stored under `name`, without waiting; None if there is none yet."""
    with _suppress("NOT_FOUND"):
        return global_state.client.key_value_try_get(f"dsv3_jax/note/{name}")  # type: ignore[union-attr]
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Messages through the key-value store.


def exchange(message: str, folder: str | None = None) -> list[str]:
    """Send this process's message to all, wait for theirs, and return all messages by process number; every process calls it.

    Args:
      folder: key prefix in the store, not used before; None on the main thread, where all processes make the same calls.
    """
    folder = folder or f"dsv3_jax/{next(_turns)}"
    if not is_first_process():
        kv_set(f"{folder}/{jax.process_index()}", message)
        return json.loads(kv_get(f"{folder}/all"))
    everyone = [message, *(kv_get(f"{folder}/{process}") for process in range(1, jax.process_count()))]
    kv_set(f"{folder}/all", json.dumps(everyone))
    return everyone


def first_message(message: str) -> str:
    """Exchange messages; return the first that is not empty, as "process 2: ..." (bare in a run of one process), or ""."""
    if jax.process_count() == 1:
        return message
    return next((f"process {process}: {text}" for process, text in enumerate(exchange(message)) if text), "")


def kv_set(key: str, value: str) -> None:
    """Store `value` under `key`; an error if the key exists. Characters that UTF-8 lacks are escaped."""
    global_state.client.key_value_set(key, value.encode(errors="backslashreplace").decode())  # type: ignore[union-attr]


def kv_get(key: str, poll: int = _POLL_MILLISECONDS) -> str:
    """Wait without limit for the value of `key`, and return it; if its writer is gone, the service ends this process.

    Args:
      poll: milliseconds of one request. No signal is handled within it, and the store keeps some memory of each in vain.
    """
    while True:
        with _suppress("DEADLINE_EXCEEDED"):
            return global_state.client.blocking_key_value_get(key, poll)  # type: ignore[union-attr]


def kv_delete(folder: str) -> None:
    """Delete all keys that begin with `folder`, which ends with a slash."""
    global_state.client.key_value_delete(folder)  # type: ignore[union-attr]


@contextlib.contextmanager
def _suppress(status: str) -> Iterator[None]:
    """Suppress a `JaxRuntimeError` of the store whose text contains `status`, such as "NOT_FOUND"; others pass."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if status not in str(error):
            raise


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__
