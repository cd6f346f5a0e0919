"""Barriers of the threads in which several processes save a checkpoint, at which all learn that one of them has failed.

Orbax lets a process that cannot write go on to another barrier than the one at which the others wait for it, and these then
give up after twenty minutes. Here every process says where it waits, and what has happened to it.
"""

from __future__ import annotations

import itertools
import json
import sys

import jax

from dsv3_jax.checkpoint.faults import io_reason, one_line
from dsv3_jax.parallel.multihost import forget, hear, is_first_process, tell


class FailedElsewhere(OSError):
    """Another process of the run could not write its part."""


class RollCall:
    """A `barrier_sync_fn` for Orbax; called by one thread at a time, and by all processes equally often."""

    def __init__(self) -> None:
        # One for each Checkpoints, all of which every process makes in the same order.
        self._name = f"dsv3_jax/roll_call/{next(_made)}"
        self._turns = itertools.count()

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits for the others; as long as it takes, for Orbax limits the time of what they do.

        Raises:
          FailedElsewhere: if another process has failed to write, and this one has not.
          RuntimeError: if it has failed in another way.
        """
        error = sys.exc_info()[1]  # Orbax comes here on the way out, too.
        reason = io_reason(error) if error is not None else None
        expected = error is None or reason is not None
        said = {"at": key, "reason": reason if error is None or expected else one_line(error), "expected": expected}
        while True:
            everyone = self._exchange(json.dumps(said))
            if all(one["at"] == key for one in everyone):
                return
            # Who has failed is ahead of the others, and waits until they come there too.
            if error is None:
                failed = {process: one for process, one in enumerate(everyone) if one["reason"] is not None}
                text = "; ".join(f"process {process}: {one['reason']}" for process, one in failed.items())
                expected = all(one["expected"] for one in failed.values())
                raise FailedElsewhere(text) if failed and expected else RuntimeError(text or f"processes wait at {everyone}")

    def _exchange(self, said: str) -> list[dict[str, object]]:
        """What each process says, on each."""
        turn = next(self._turns)
        folder = f"{self._name}/{turn}"
        if not is_first_process():
            tell(f"{folder}/{jax.process_index()}", said)
            return json.loads(hear(f"{folder}/all"))
        everyone = [said, *(hear(f"{folder}/{process}") for process in range(1, jax.process_count()))]
        tell(f"{folder}/all", f"[{', '.join(everyone)}]")
        if turn:
            forget(f"{self._name}/{turn - 1}/")  # Whoever is here has heard it.
        return [json.loads(one) for one in everyone]


_made = itertools.count()
