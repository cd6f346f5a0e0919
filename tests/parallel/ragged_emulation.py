"""`jax.lax.ragged_all_to_all` for platforms without it, written from the semantics that JAX documents.

Every device sees everybody's operand and offsets, and writes the slices that are meant for it where their senders say.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.parallel import exchange


def emulate_ragged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the exchange one that runs on a CPU as well, and may be chosen there by its name."""
    monkeypatch.setattr(exchange, "ragged_all_to_all", emulated_ragged_all_to_all)
    monkeypatch.setattr(exchange, "_CHOICE", exchange._CHOICE._replace(only_on={"ragged": ("cpu", "gpu", "tpu")}))


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
    """The same arguments and result; sizes that sender and receiver do not agree on give NaN."""
    here = jax.lax.axis_index(axis_name)
    operands, starts, sizes, targets = (
        jax.lax.all_gather(array, axis_name) for array in (operand, input_offsets, send_sizes, output_offsets)
    )
    num_devices = operands.shape[0]
    slices = input_offsets.shape[0] // num_devices
    places = jnp.arange(output.shape[0])
    agreed = jnp.bool_(True)
    for source in range(num_devices):
        for k in range(slices):
            i = here * slices + k
            start, size, target = starts[source, i], sizes[source, i], targets[source, i]
            agreed &= size == recv_sizes[source * slices + k]
            written = (places >= target) & (places < target + size)
            rows = operands[source][jnp.clip(start + places - target, 0, operand.shape[0] - 1)]
            output = jnp.where(written[:, None], rows, output)
            # A slice that points outside of either array would be lost, or worse.
            agreed &= (size == 0) | ((start >= 0) & (start + size <= operand.shape[0]))
            agreed &= (size == 0) | ((target >= 0) & (target + size <= output.shape[0]))
    return jnp.where(agreed, output, jnp.nan)
