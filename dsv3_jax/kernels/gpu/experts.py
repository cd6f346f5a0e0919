"""`expert_ffn` by Pallas kernels for Hopper GPUs: the six of grouped.py.

They take bfloat16 only: of float32 the matrix units would read ten bits of the fraction, and a float32 model asks for more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.gpu import hopper
from dsv3_jax.kernels.gpu.grouped_matmul import grouped_matmul
from dsv3_jax.kernels.gpu.grouped_matmul_dw import grouped_matmul_dw
from dsv3_jax.kernels.grouped import expert_ffn_by

WIDTH = 64
"""Widths are padded to a multiple of it, the columns of a swizzle, and to at least two: a tile of rows with two halves."""


class Hopper(NamedTuple):
    """`Products` for a GPU."""

    num_blocks: int
    """Multiprocessors of the device."""
    interpret: Any = None

    def rows(self, kernel: str, *arrays: Any, **options: Any) -> list[jax.Array]:
        """`Products.rows`."""
        return grouped_matmul(*arrays, **options, name=f"expert_{kernel}", **self._asdict())

    def weights(self, kernel: str, *arrays: Any) -> list[jax.Array]:
        """`Products.weights`."""
        return grouped_matmul_dw(*arrays, name=f"expert_{kernel}", **self._asdict())


def expert_ffn_pallas_gpu(
    x_RD: jax.Array, w_gate_EDF: jax.Array, w_up_EDF: jax.Array, w_down_EFD: jax.Array, group_sizes_E: jax.Array
) -> jax.Array:
    """Compute `expert_ffn` in bfloat16 on the Hopper GPU that the program is lowered for."""
    reason = hopper.unsupported_reason(x_RD.dtype)
    if reason is not None:
        raise ValueError(f"the expert backend 'pallas_gpu' {reason}; use model.expert_backend tiles or ragged_dot")
    products = Hopper(hopper.current_gpu().num_blocks)
    return expert_ffn_on(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, products)


def expert_ffn_on(
    x_RD: jax.Array,
    w_gate_EDF: jax.Array,
    w_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
    group_sizes_E: jax.Array,
    products: Hopper,
) -> jax.Array:
    """Compute `expert_ffn` on a given GPU. Rows and widths are padded with zeros to sizes that the kernels take."""
    num_rows, (D, F) = x_RD.shape[0], w_gate_EDF.shape[1:]
    more_D, more_F = ((0, max(-width % WIDTH, 2 * WIDTH - width)) for width in (D, F))
    more_R = 0, -num_rows % hopper.ALIGN_M
    if more_D[1] or more_F[1] or more_R[1]:
        x_RD = jnp.pad(x_RD, (more_R, more_D))
    if more_D[1] or more_F[1]:
        w_gate_EDF, w_up_EDF = (jnp.pad(w, ((0, 0), more_D, more_F)) for w in (w_gate_EDF, w_up_EDF))
        w_down_EFD = jnp.pad(w_down_EFD, ((0, 0), more_F, more_D))
    return expert_ffn_by(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, products)[:num_rows, :D]
