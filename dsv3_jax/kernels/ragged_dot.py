"""`expert_ffn` from `jax.lax.ragged_dot`: XLA's own grouped product, on any platform.

XLA multiplies every row with every expert and masks: on CPUs, on GPUs, and in the gradients on TPUs (libtpu 0.0.42). So it
serves as a second opinion.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def expert_ffn_ragged_dot(
    x_RD: jax.Array, w_gate_EDF: jax.Array, w_up_EDF: jax.Array, w_down_EFD: jax.Array, group_sizes_E: jax.Array
) -> jax.Array:
    """`expert_ffn` by three ragged products; see there."""
    dtype = x_RD.dtype
    accumulate = jnp.promote_types(dtype, jnp.float32)
    # What ragged_dot leaves in the rows past the last group differs between platforms: masking them on both sides
    # keeps whatever stands there out of y and, in the backward pass, out of every gradient.
    used_R1 = jnp.arange(x_RD.shape[0])[:, None] < jnp.sum(group_sizes_E)

    def product(rows: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, weights, group_sizes_E, preferred_element_type=accumulate)

    x_RD = jnp.where(used_R1, x_RD, 0)
    hidden_RF = jax.nn.silu(product(x_RD, w_gate_EDF)) * product(x_RD, w_up_EDF)
    y_RD = product(jnp.where(used_R1, hidden_RF, 0).astype(dtype), w_down_EFD).astype(dtype)
    return jnp.where(used_R1, y_RD, 0)
