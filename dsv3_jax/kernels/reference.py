"""What `expert_ffn` computes, written for the eye: every expert sees all rows, and its own are kept.

The specification of the other backends and the oracle of their tests. It does E times the work.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def expert_ffn_reference(
    x_RD: jax.Array, w_gate_EDF: jax.Array, w_up_EDF: jax.Array, w_down_EFD: jax.Array, group_sizes_E: jax.Array
) -> jax.Array:
    """`expert_ffn` for the tests; see there."""
    dtype = x_RD.dtype
    accumulate = jnp.promote_types(dtype, jnp.float32)
    end_E = jnp.cumsum(group_sizes_E)
    row_R1 = jnp.arange(x_RD.shape[0])[:, None]

    def add_expert(y_RD: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        w_gate_DF, w_up_DF, w_down_FD, start, end = expert
        mine_R1 = (start <= row_R1) & (row_R1 < end)
        mine_RD = jnp.where(mine_R1, x_RD, 0)
        gate_RF = jnp.dot(mine_RD, w_gate_DF, preferred_element_type=accumulate)
        up_RF = jnp.dot(mine_RD, w_up_DF, preferred_element_type=accumulate)
        hidden_RF = (jax.nn.silu(gate_RF) * up_RF).astype(dtype)
        out_RD = jnp.dot(hidden_RF, w_down_FD, preferred_element_type=accumulate).astype(dtype)
        return jnp.where(mine_R1, out_RD, y_RD), None

    experts = (w_gate_EDF, w_up_EDF, w_down_EFD, end_E - group_sizes_E, end_E)
    return jax.lax.scan(add_expert, jnp.zeros_like(x_RD), experts)[0]
