"""`jax.lax.ragged_all_to_all` for platforms without it, written from the semantics that JAX documents.

Every device sees everybody's operand and offsets, and writes the slices that are meant for it where their senders say.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.parallel import all_to_all


def emulate_ragged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ragged exchange run on a CPU, and be chosen there by name."""
    monkeypatch.setattr(all_to_all, "ragged_all_to_all", emulated_ragged_all_to_all)
    monkeypatch.setattr(all_to_all, "_OPTIONS", all_to_all._OPTIONS._replace(only_on={"ragged": ("cpu", "gpu", "tpu")}))


def emulated_ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: str,
) -> jax.Array:
    """The same arguments and result; sizes that sender and receiver do not agree on, and slices that overlap, give NaN."""
    here = jax.lax.axis_index(axis_name)
    operands, starts, sizes, targets = (
        jax.lax.all_gather(array, axis_name) for array in (operand, input_offsets, send_sizes, output_offsets)
    )
    num_devices = operands.shape[0]
    slices = input_offsets.shape[0] // num_devices
    # Of every slice that is meant for this device, those of one source after those of another.
    start, size, target = (
        jax.lax.dynamic_slice_in_dim(array, here * slices, slices, axis=1).reshape(-1) for array in (starts, sizes, targets)
    )
    place = jnp.arange(output.shape[0])
    written = (place[:, None] >= target) & (place[:, None] < target + size)
    of = jnp.argmax(written, axis=1)
    rows = operands[of // slices, jnp.clip(start[of] + place - target[of], 0, operand.shape[0] - 1)]
    # A slice that points outside of either array would be lost, or worse.
    inside = (start >= 0) & (start + size <= operand.shape[0]) & (target >= 0) & (target + size <= output.shape[0])
    agreed = jnp.all((size == recv_sizes) & (inside | (size == 0))) & jnp.all(written.sum(axis=1) <= 1)
    return jnp.where(agreed, jnp.where(written.any(axis=1)[:, None], rows, output), jnp.nan)
