"""`expert_ffn` by Pallas kernels for Hopper GPUs: the six of `grouped_ffn.py`.

Four are in `grouped_rows_gpu.py`, two in `grouped_weights_gpu.py`. They take bfloat16 only: of float32 the matrix units would
read ten bits of the fraction, and a float32 model asks for more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.gpu.grouped_matmul import grouped_matmul
from dsv3_jax.kernels.gpu.grouped_matmul_dw import grouped_matmul_dw
from dsv3_jax.kernels.gpu.hopper import ALIGN_M, current_gpu, unsupported_reason
from dsv3_jax.kernels.grouped import Compute, expert_ffn_by

WIDTH = 64
"""Widths are padded to a multiple of it, the columns of a swizzle, and to at least two: a tile of rows with two halves."""


class Hopper(NamedTuple):
    """The kernels as `expert_ffn_by` takes them, for a GPU."""

    num_blocks: int
    """Multiprocessors of the device."""
    interpret: Any = None

    def rows(
        self,
        kernel: str,
        compute: Compute,
        rows: Sequence[jax.Array],
        weights: Sequence[jax.Array],
        beside: Sequence[jax.Array],
        group_sizes_E: jax.Array,
        *,
        num_outputs: int,
        transposed: bool,
    ) -> list[jax.Array]:
        """`Products.rows`."""
        arrays = rows, weights, beside, group_sizes_E
        return grouped_matmul(compute, *arrays, num_outputs=num_outputs, transposed=transposed, **self._settings(kernel))

    def weights(
        self, kernel: str, left_RX: jax.Array, rights: Sequence[jax.Array], group_sizes_E: jax.Array
    ) -> list[jax.Array]:
        """`Products.weights`."""
        return grouped_matmul_dw(left_RX, rights, group_sizes_E, **self._settings(kernel))

    def _settings(self, kernel: str) -> dict[str, Any]:
        return {"num_blocks": self.num_blocks, "name": f"expert_{kernel}", "interpret": self.interpret}


def expert_ffn_pallas_gpu(
    x_RD: jax.Array, w_gate_EDF: jax.Array, w_up_EDF: jax.Array, w_down_EFD: jax.Array, group_sizes_E: jax.Array
) -> jax.Array:
    """`expert_ffn` for the GPU that the program is lowered for; see there. Takes bfloat16, on Hopper."""
    reason = unsupported_reason(x_RD.dtype)
    if reason is not None:
        raise ValueError(f"the expert backend 'pallas_gpu' {reason}; use model.expert_backend tiles or ragged_dot")
    return expert_ffn_on(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, Hopper(current_gpu().num_blocks))


def expert_ffn_on(
    x_RD: jax.Array,
    w_gate_EDF: jax.Array,
    w_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
    group_sizes_E: jax.Array,
    hopper: Hopper,
) -> jax.Array:
    """`expert_ffn` on a GPU of choice. Rows and widths are padded with zeros to what the kernels can take."""
    num_rows, (D, F) = x_RD.shape[0], w_gate_EDF.shape[1:]
    more_D, more_F = ((0, max(-width % WIDTH, 2 * WIDTH - width)) for width in (D, F))
    more_R = 0, -num_rows % ALIGN_M
    if more_D[1] or more_F[1] or more_R[1]:
        x_RD = jnp.pad(x_RD, (more_R, more_D))
    if more_D[1] or more_F[1]:
        w_gate_EDF, w_up_EDF = (jnp.pad(w, ((0, 0), more_D, more_F)) for w in (w_gate_EDF, w_up_EDF))
        w_down_EFD = jnp.pad(w_down_EFD, ((0, 0), more_F, more_D))
    return expert_ffn_by(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, hopper)[:num_rows, :D]
