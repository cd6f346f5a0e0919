"""Which experts the tokens went to between two logged steps: expert_load.npz of a run."""

from __future__ import annotations

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.files import write_whole


class ExpertLoad:
    """Sums the loads of the steps since the last log on the devices, and writes them at each log.

    The file holds the last logged interval alone: for each stack of `ModelOutput.load` ("moe_layers" [L, E], "mtp_0" [E], ...)
    float32 loads over the mean of their layer, so that 1 is an even share.
    """

    def __init__(self, run: RunDirectory, *, writes: bool = True) -> None:
        """Args: writes: whether this process writes; the others of a run only keep step with it."""
        self._run = run
        self._writes = writes
        self._sums: dict[str, jax.Array] | None = None

    def accumulate(self, load: dict[str, jax.Array]) -> None:
        """Adds a step's tokens per expert; waits for nothing, so it may be called before the step is done."""
        self._sums = load if self._sums is None else _added(self._sums, load)

    def write(self) -> dict[str, np.ndarray]:
        """Ends the interval: writes its loads over their means, if this process does, and returns them.

        Nothing is written if no step, or no MoE layer, has been seen since the last time.
        """
        sums, self._sums = self._sums or {}, None
        relative = {name: over_mean(np.asarray(load)) for name, load in sums.items()}
        if self._writes and relative:
            file = io.BytesIO()
            np.savez(file, **relative)  # type: ignore[arg-type]  # Its own keywords are no names of stacks.
            write_whole(self._run.expert_load_file, file.getvalue())
        return relative

    @staticmethod
    def read(run: RunDirectory) -> dict[str, np.ndarray]:
        """What was written last; empty if nothing was.

        Raises:
          ValueError: if the file is damaged.
        """
        if not run.expert_load_file.exists():
            return {}
        try:
            with np.load(io.BytesIO(run.expert_load_file.read_bytes())) as arrays:
                return dict(arrays)
        except Exception as error:  # What a damaged archive raises has no narrower type.
            raise ValueError(f"{run.expert_load_file} cannot be read ({error}); remove it") from error


@jax.jit
def _added(sums: dict[str, jax.Array], load: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.add, sums, load)


def over_mean(load: Any) -> np.ndarray:
    """Loads [..., E] over the mean of their layer, float32; 0 in a layer that no token came to."""
    exact = np.asarray(load, np.float64)
    mean = exact.mean(-1, keepdims=True)
    return np.divide(exact, mean, out=np.zeros_like(exact), where=mean > 0).astype(np.float32)
