"""From the host onto the mesh: batches, of which each process makes the rows that its devices hold, and what all hold alike."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from dsv3_jax.parallel.rules import TOKENS


class BatchPlacement:
    """Where the rows of [B, T] batches go."""

    def __init__(self, mesh: Mesh, batch_size: int, sequence_length: int) -> None:
        self._shape = batch_size, sequence_length
        self._sharding = NamedSharding(mesh, TOKENS)
        held = self._sharding.addressable_devices_indices_map(self._shape)
        self.rows = sorted({row for index in held.values() if index for row in range(*index[0].indices(batch_size))})
        """The rows of each batch that devices of this process hold."""

    def place(self, array: np.ndarray) -> jax.Array:
        """A whole batch [B, T], or micro-batches [A, B, T], on the mesh, from this process's rows of each, or all rows.

        Raises:
          ValueError: if the array has neither as many rows as this process holds, nor as many as the batch.
        """
        batch_size, length = self._shape
        leading = array.shape[:-2]
        rows = list(range(batch_size)) if array.shape[-2] == batch_size else self.rows
        if array.shape[-2:] != (len(rows), length):
            raise ValueError(f"a batch of shape {array.shape} has neither the {len(self.rows)} rows of this process nor all")
        place = {row: i for i, row in enumerate(rows)}

        def part(index: Any) -> np.ndarray:
            wanted = [place[row] for row in range(*index[-2].indices(batch_size))]
            return array[..., wanted, index[-1]]

        sharding = NamedSharding(self._sharding.mesh, PartitionSpec(*(None for _ in leading), *TOKENS))
        return jax.make_array_from_callback((*leading, *self._shape), sharding, part)


def place_alike(tree: Any, sharding: Sharding) -> Any:
    """Arrays that every process holds alike, onto the devices of `sharding`.

    `jax.device_put` would have the processes compare what they hold, which takes a collective for each array.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda array: _place_alike(np.asarray(array), sharding), tree)


def _place_alike(array: np.ndarray, sharding: Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
