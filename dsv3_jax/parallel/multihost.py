"""A run of several processes: how they find each other, what they do in turn, and how they end together.

Cloud TPU (plain VMs, GKE, several slices) and SLURM say in the environment who takes part, and JAX reads it; elsewhere the
`--distributed` flags do. One process on one host needs none of this, and all of it is then the identity.

What the processes tell each other here goes through the key-value store of JAX's coordination service (on process 0), not
through their devices: waiting an hour for a text to be tokenised then trips no time limit of a collective, and an error
can be told while a device is busy.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from etils import epath
from jax._src.distributed import global_state  # The store has no public name; Orbax takes it from here too.

from dsv3_jax.config.cli import DistributedFlags

Result = TypeVar("Result")

SHUTDOWN_SECONDS = 30
"""How long a process that ends waits for the others to end too; when it has waited in vain, all of them are ended.

A process that vanishes without a word is missed after JAX's 100 seconds without a heartbeat, if no broken connection says
so before.
"""

OF_INPUT = ValueError, OSError, NotImplementedError
"""What a program ends of in one line (`cli_main`), and its other processes in the same."""
_POLL_MILLISECONDS = 10_000
_turns = itertools.count()


def join_processes(flags: DistributedFlags) -> None:
    """Connects this process with the others of its run, and mutes its stdout if it is not the first of them.

    Call it before anything touches a device. Without flags, and where neither Cloud TPU nor SLURM (a step of several
    tasks) is around, it does nothing; nor where the flags say that it is alone.

    Raises:
      ValueError: if the others cannot be reached.
    """
    if flags.alone:
        return
    if flags.coordinator is not None and not flags.coordinator.rpartition(":")[2].isdigit():
        raise ValueError(
            f"--distributed.coordinator is {flags.coordinator!r}; write host:port of process 0, such as host0:1234"
        )
    # JAX would catch SIGTERM to announce a preemption, which nothing here asks about: the process would not end.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if flags.coordinator is not None:
            jax.distributed.initialize(
                flags.coordinator, flags.num_processes, flags.process_id, shutdown_timeout_seconds=SHUTDOWN_SECONDS
            )
        elif os.environ.get("SLURM_STEP_NUM_TASKS") != "1":  # Such a step may carry the task count of its whole job.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", r"\s*Kubernetes environment detected")  # Any container may be in one.
                jax.distributed.initialize(shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    except ValueError as error:
        # What JAX says where no cluster environment is found: a run of one process.
        if "coordinator_address" not in str(error):
            raise
    except RuntimeError as error:
        raise ValueError(f"the processes of the run did not come together: {' '.join(str(error).split())}") from error
    if jax.process_count() > 1:
        _leave_stdout_to_first()


def _leave_stdout_to_first() -> None:
    """Mutes the file descriptor, where Gloo greets its peers from C++; what process 0 prints goes to a copy of it."""
    descriptor = sys.__stdout__.fileno() if sys.__stdout__ else 1
    if is_first_process():
        sys.stdout.flush()
        copy = os.fdopen(os.dup(descriptor), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
        copy.reconfigure(line_buffering=copy.isatty())
        sys.stdout = copy
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def is_first_process() -> bool:
    """Whether this process is the one that prints and writes what there is one of."""
    return jax.process_index() == 0


def by_first_process(function: Callable[[], Any]) -> None:
    """Calls `function` on process 0, while the others wait; what it raises there ends all of them.

    Raises:
      ValueError: on the others, if it was an error of input on process 0.
      RuntimeError: on the others, if it was something else.
    """
    if jax.process_count() == 1:
        function()
        return
    key = f"dsv3_jax/{next(_turns)}"
    if is_first_process():
        try:
            function()
        except Exception as error:
            expected = isinstance(error, OF_INPUT)
            kv_set(key, ("refused " if expected else "failed ") + (str(error) or type(error).__name__))
            raise
        kv_set(key, "done")
    else:
        outcome, _, message = kv_get(key).partition(" ")
        if outcome == "refused":
            raise ValueError(message)
        if outcome == "failed":
            raise RuntimeError(f"process 0 failed: {message}")


def on_every_process(function: Callable[[], Result]) -> Result:
    """`function()` on every process; where one raises an error of input, all raise ValueError, with that process named."""
    if jax.process_count() == 1:
        return function()
    result, message = None, ""
    try:
        result = function()
    except OF_INPUT as error:
        message = str(error) or type(error).__name__

    def refuse(messages: list[str]) -> None:
        for process, said in enumerate(messages):
            if said:
                raise ValueError(f"process {process}: {said}")

    _judged_by_first_process(message, refuse)
    return result  # type: ignore[return-value]  # It is one, or _judged_by_first_process has raised.


def first_process_first(function: Callable[[], Result]) -> Result:
    """`function()` on every process, on process 0 before the others, who then find what it left in a shared cache.

    Raises:
      ValueError: on every process, if it raises one on any.
    """
    results: list[Result] = []
    by_first_process(lambda: results.append(function()))
    return on_every_process(lambda: results[0] if results else function())


def check_agreement(values: Any) -> None:
    """Raises ValueError, on every process, unless all of them hold the same values.

    Args:
      values: a tree of plain values, in dicts whose keys name them in the error.
    """
    if jax.process_count() == 1:
        return
    leaves = jax.tree_util.tree_leaves_with_path(values, is_leaf=lambda leaf: leaf is None)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): repr(value) for path, value in leaves}

    def compare(everyone: list[str]) -> None:
        first = json.loads(everyone[0])
        for process, theirs in enumerate(map(json.loads, everyone)):
            for name in first | theirs:
                if first.get(name) != theirs.get(name):
                    raise ValueError(
                        f"process {process} has {name} {theirs.get(name)}, process 0 has {first.get(name)}; start all "
                        "processes with the same command and files"
                    )

    _judged_by_first_process(json.dumps(named), compare)


def check_shared(path: epath.Path) -> None:
    """Raises ValueError, on every process, unless all of them see `path`, which process 0 has written."""

    def look() -> None:
        if not path.exists():
            raise ValueError(f"{path} is not here, though process 0 has written it; name a --run-dir that all hosts share")

    on_every_process(look)


def wait_for_first_process() -> None:
    """Waits until process 0 is here too; a process that simply ended would be missed after `SHUTDOWN_SECONDS`."""
    by_first_process(lambda: None)


def write_note(name: str, text: str) -> None:
    """Leaves a note for all processes, unless there is one of that name: the first stands."""
    try:
        kv_set(f"dsv3_jax/note/{name}", text)
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise


def read_note(name: str) -> str | None:
    """The note of that name, or None."""
    try:
        return global_state.client.key_value_try_get(f"dsv3_jax/note/{name}")  # type: ignore[union-attr]
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" not in str(error):
            raise
        return None


def _judged_by_first_process(said: str, judge: Callable[[list[str]], None]) -> None:
    """Hands what every process says to `judge` on process 0, in order; a ValueError of its is raised on all."""
    key = f"dsv3_jax/{next(_turns)}"
    if not is_first_process():
        kv_set(f"{key}/{jax.process_index()}", said)
    by_first_process(lambda: judge([said, *(kv_get(f"{key}/{process}") for process in range(1, jax.process_count()))]))


def kv_set(key: str, value: str) -> None:
    """Puts `value` into the store under `key`, which must be new."""
    global_state.client.key_value_set(key, value.encode(errors="backslashreplace").decode())  # type: ignore[union-attr]


def kv_get(key: str, poll: int = _POLL_MILLISECONDS) -> str:
    """What another process tells under `key`; as long as it takes, for the service ends this process if that one is gone.

    It is asked for again after `poll` milliseconds, between which this process hears of no signal. The store keeps a little of
    each time that was in vain.
    """
    while True:
        try:
            return global_state.client.blocking_key_value_get(key, poll)  # type: ignore[union-attr]
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def kv_delete(folder: str) -> None:
    """Removes what was told under keys that begin with `folder`, which ends with a slash."""
    global_state.client.key_value_delete(folder)  # type: ignore[union-attr]
