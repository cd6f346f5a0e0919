"""A run of several processes: how they find each other, and the three things they have to do together.

Cloud TPU (plain VMs, GKE, several slices) and SLURM say in the environment who takes part, and JAX reads it; elsewhere the
`--distributed` flags do. One process on one host needs none of this, and all of it is then the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsv3_jax.config.command_line import DistributedFlags

Result = TypeVar("Result")

_LONGEST_MESSAGE = 4096


def join_processes(flags: DistributedFlags) -> None:
    """Connects this process with the others of its run; call it before anything touches a device.

    Raises:
      ValueError: if the others cannot be reached.
    """
    try:
        if flags.coordinator is not None:
            jax.distributed.initialize(flags.coordinator, flags.num_processes, flags.process_id)
        else:
            jax.distributed.initialize()
    except ValueError as error:
        # What JAX says where no cluster environment is found: a run of one process.
        if "coordinator_address" not in str(error):
            raise
    except RuntimeError as error:
        raise ValueError(f"the processes of the run did not come together: {error}") from error


def is_first_process() -> bool:
    """Whether this process is the one that prints and writes what there is one of."""
    return jax.process_index() == 0


def by_first_process(function: Callable[[], Any]) -> None:
    """Calls `function` on process 0, while the others wait; a ValueError there is raised on all of them."""
    message = _message_of(function) if is_first_process() else ""
    if jax.process_count() > 1:
        text = np.zeros(_LONGEST_MESSAGE, np.uint8)
        encoded = message.encode()[:_LONGEST_MESSAGE]
        text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
        message = bytes(multihost_utils.broadcast_one_to_all(text)).rstrip(b"\0").decode(errors="replace")
    if message:
        raise ValueError(message)


def first_process_first(function: Callable[[], Result]) -> Result:
    """`function()` on every process, on process 0 before the others, who then find what it left in a shared cache."""
    results: list[Result] = []
    by_first_process(lambda: results.append(function()))
    return results[0] if results else function()


def require_agreement(what: str, value: str) -> None:
    """Raises ValueError, on every process, unless all of them hold the same `value`."""
    if jax.process_count() == 1:
        return
    text = np.frombuffer(value.encode().ljust(256, b"\0")[:256], np.uint8)
    everyone = multihost_utils.process_allgather(text)
    if (differing := np.flatnonzero((everyone != everyone[0]).any(1))).size:
        raise ValueError(f"process {differing[0]} has another {what} than process 0; start all processes from the same files")


def _message_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except ValueError as error:
        return str(error) or type(error).__name__
    return ""
