"""The expert FFN as six products over sorted rows, forward and backward: what Pallas kernels for TPUs and GPUs share.

| kernel | computes | columns |
|---|---|---|
| `expert_gate_up` | hidden = silu(x w_gate) * (x w_up); for a gradient, gate and up, too | F |
| `expert_down` | y = hidden w_down | D |
| `expert_dhidden` | dhidden = dy w_down^T, and of it dgate and dup | F |
| `expert_dx` | dx = dgate w_gate^T + dup w_up^T, one sum | D |
| `expert_dw_gate_up` | x^T dgate, x^T dup | D x F an expert |
| `expert_dw_down` | hidden^T dy | F x D an expert |

What a kernel makes of its products it makes before they are written, in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

KERNELS = "gate_up", "down", "dhidden", "dx", "dw_gate_up", "dw_down"

Compute = Callable[[list[jax.Array], list[jax.Array]], Sequence[jax.Array]]
"""From float32 products of some rows and columns, and the same places of other arrays, to outputs at these places."""


class Products(Protocol):
    """Kernels of one kind of machine. Compared by value: an instance is part of what a program is compiled for."""

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
    ) -> Sequence[jax.Array]:
        """Products of every row with the weights of its group, and what `compute` makes of them.

        Args:
          kernel: one of KERNELS.
          compute: takes and returns what `Compute` says, within the kernel.
          rows: one array [R, K] for all weights, each of which gives a product; or one for each of the weights, whose
            products are added up to a single one.
          weights: arrays [E, K, N], or [E, N, K] if transposed.
          beside: arrays [R, N].
          group_sizes_E: int32, rows of each group.
          num_outputs: of `compute`.
          transposed: how the weights lie.

        Returns:
          The outputs, [R, N] in the dtype of the rows. Rows past the last group are zero.
        """

    def weights(
        self, kernel: str, left_RX: jax.Array, rights: Sequence[jax.Array], group_sizes_E: jax.Array
    ) -> Sequence[jax.Array]:
        """left^T right over the rows of every group, for each of the right arrays [R, Y]: [E, X, Y] in the dtype of the rows.

        Sums are float32; groups without rows get zeros, and rows past the last group count for nobody.
        """


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def expert_ffn_by(
    x_RD: jax.Array,
    w_gate_EDF: jax.Array,
    w_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
    group_sizes_E: jax.Array,
    products: Products,
) -> jax.Array:
    """`expert_ffn` by the kernels of choice."""
    (hidden_RF,) = products.rows(
        "gate_up", _hidden, [x_RD], [w_gate_EDF, w_up_EDF], [], group_sizes_E, num_outputs=1, transposed=False
    )
    return _down(hidden_RF, w_down_EFD, group_sizes_E, products)


def _forward(
    x_RD: jax.Array,
    w_gate_EDF: jax.Array,
    w_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
    group_sizes_E: jax.Array,
    products: Products,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    # To read gate and up back is cheaper than two of eight products again.
    hidden_RF, gate_RF, up_RF = products.rows(
        "gate_up", _hidden_gate_up, [x_RD], [w_gate_EDF, w_up_EDF], [], group_sizes_E, num_outputs=3, transposed=False
    )
    y_RD = _down(hidden_RF, w_down_EFD, group_sizes_E, products)
    return y_RD, (x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, hidden_RF, gate_RF, up_RF)


def _backward(products: Products, residuals: tuple[jax.Array, ...], dy_RD: jax.Array) -> tuple[jax.Array | None, ...]:
    x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, hidden_RF, gate_RF, up_RF = residuals
    dgate_RF, dup_RF = products.rows(
        "dhidden", _dgate_dup, [dy_RD], [w_down_EFD], [gate_RF, up_RF], group_sizes_E, num_outputs=2, transposed=True
    )
    (dx_RD,) = products.rows(
        "dx", _same, [dgate_RF, dup_RF], [w_gate_EDF, w_up_EDF], [], group_sizes_E, num_outputs=1, transposed=True
    )
    dw_gate_EDF, dw_up_EDF = products.weights("dw_gate_up", x_RD, [dgate_RF, dup_RF], group_sizes_E)
    (dw_down_EFD,) = products.weights("dw_down", hidden_RF, [dy_RD], group_sizes_E)
    return dx_RD, dw_gate_EDF, dw_up_EDF, dw_down_EFD, None


expert_ffn_by.defvjp(_forward, _backward)


def _down(hidden_RF: jax.Array, w_down_EFD: jax.Array, group_sizes_E: jax.Array, products: Products) -> jax.Array:
    (y_RD,) = products.rows("down", _same, [hidden_RF], [w_down_EFD], [], group_sizes_E, num_outputs=1, transposed=False)
    return y_RD


# What is made of the products: `Compute`.


def _same(products: Any, beside: Any) -> Sequence[jax.Array]:
    return products


def _hidden(products: Any, beside: Any) -> Sequence[jax.Array]:
    gate_AX, up_AX = products
    return (jax.nn.silu(gate_AX) * up_AX,)


def _hidden_gate_up(products: Any, beside: Any) -> Sequence[jax.Array]:
    return *_hidden(products, beside), *products


def _dgate_dup(products: Any, beside: Any) -> Sequence[jax.Array]:
    (dhidden_AX,) = products
    gate_AX, up_AX = (a.astype(jnp.float32) for a in beside)
    sigmoid_AX = jax.nn.sigmoid(gate_AX)
    silu_AX = gate_AX * sigmoid_AX
    dgate_AX = dhidden_AX * up_AX * (sigmoid_AX + silu_AX * (1 - sigmoid_AX))
    return dgate_AX, dhidden_AX * silu_AX
