"""`expert_ffn` by plain XLA: matrix products over the tiles of rows of one expert after the other.

An outer loop visits the experts that have rows, so each expert's weights are fetched once and those of an idle one
never, which is what counts when a few tokens are decoded. Inner loops walk the expert's rows, first in large tiles and
then in small ones that waste little past its last row. The loops have trip counts known only at run time; that rules
out automatic differentiation, hence the gradient written out below.

Axes beyond the project's legend: A the rows of a tile, X any second axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.block_scaled import BlockScaled, require_trainable
from dsv3_jax.kernels.varying import zeros_beside

_LARGEST_TILE = 256
_REMAINDER_TILE = 32


class _Tile(NamedTuple):
    """Consecutive rows, of which `mine_A1` belong to the expert at hand; the others are read as zero and kept."""

    start: jax.Array
    mine_A1: jax.Array

    def read(self, array_RX: jax.Array) -> jax.Array:
        return jnp.where(self.mine_A1, self._slice(array_RX), 0)

    def write(self, array_RX: jax.Array, rows_AX: jax.Array) -> jax.Array:
        kept_AX = jnp.where(self.mine_A1, rows_AX.astype(array_RX.dtype), self._slice(array_RX))
        return jax.lax.dynamic_update_slice_in_dim(array_RX, kept_AX, self.start, 0)

    def _slice(self, array_RX: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(array_RX, self.start, self.mine_A1.shape[0], 0)


def _tile_rows(num_rows: int, num_experts: int) -> tuple[int, ...]:
    """Rows of a tile, largest first, for experts that have num_rows / num_experts rows on average.

    Every product packs the weights anew and every tile adds to the weight gradients, so a tile should hold most of an
    expert's rows; past 64 rows that is paid for, and small tiles for the remainder save more than they cost.
    """
    mean = -(-num_rows // num_experts)
    largest = min(1 << (mean - 1).bit_length(), _LARGEST_TILE, num_rows)
    return (largest, _REMAINDER_TILE) if largest >= 4 * _REMAINDER_TILE else (largest,)


def _over_experts(visit: Callable[[jax.Array, Callable, Any], Any], carry: Any, group_sizes_E: jax.Array, num_rows: int) -> Any:
    """Folds `visit(e, over_tiles, carry)` over the experts that have rows.

    In it, `over_tiles(body, carry)` folds `body(tile, carry)` over the tiles of expert e.
    """
    num_experts = group_sizes_E.shape[0]
    busy_E = jnp.nonzero(group_sizes_E, size=num_experts, fill_value=0)[0]
    end_E = jnp.cumsum(group_sizes_E)

    def step(i: jax.Array, carry: Any) -> Any:
        e = busy_E[i]
        end = end_E[e]

        def over_tiles(body: Callable[[_Tile, Any], Any], carry: Any) -> Any:
            first = end - group_sizes_E[e]
            *larger, smallest = _tile_rows(num_rows, num_experts)
            for rows in larger:
                count = (end - first) // rows
                carry = _over_equal_tiles(body, carry, first, end, rows, count, num_rows)
                first += count * rows
            return _over_equal_tiles(body, carry, first, end, smallest, -(-(end - first) // smallest), num_rows)

        return visit(e, over_tiles, carry)

    return jax.lax.fori_loop(0, jnp.sum(group_sizes_E > 0), step, carry)


def _over_equal_tiles(
    body: Callable[[_Tile, Any], Any], carry: Any, first: jax.Array, end: jax.Array, rows: int, count: jax.Array, num_rows: int
) -> Any:
    def step(i: jax.Array, carry: Any) -> Any:
        begin = first + i * rows
        # A slice that would run past the array is moved back by JAX, so do it here, where the mask can know.
        start = jnp.minimum(begin, num_rows - rows)
        row_A1 = start + jnp.arange(rows, dtype=start.dtype)[:, None]
        return body(_Tile(start, (begin <= row_A1) & (row_A1 < end)), carry)

    return jax.lax.fori_loop(0, count, step, carry)


def _dot(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


Weight = jax.Array | BlockScaled


@jax.custom_vjp
def expert_ffn_tiles(
    x_RD: jax.Array, w_gate_EDF: Weight, w_up_EDF: Weight, w_down_EFD: Weight, group_sizes_E: jax.Array
) -> jax.Array:
    """`expert_ffn` by tiles; see there."""

    def visit(e: jax.Array, over_tiles: Callable, y_RD: jax.Array) -> jax.Array:
        # Of weights in 8 bits, an expert's are wide only while it is visited.
        weights = tuple(w_EXX[e].astype(x_RD.dtype) for w_EXX in (w_gate_EDF, w_up_EDF, w_down_EFD))
        return over_tiles(lambda tile, y_RD: tile.write(y_RD, _expert(tile.read(x_RD), *weights)[0]), y_RD)

    return _over_experts(visit, jnp.zeros_like(x_RD), group_sizes_E, x_RD.shape[0])


def _expert(
    x_AD: jax.Array, w_gate_DF: jax.Array, w_up_DF: jax.Array, w_down_FD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One expert's y, gate and up."""
    gate_AF, up_AF = _dot("AD,DF->AF", x_AD, w_gate_DF), _dot("AD,DF->AF", x_AD, w_up_DF)
    hidden_AF = (jax.nn.silu(gate_AF) * up_AF).astype(x_AD.dtype)
    return _dot("AF,FD->AD", hidden_AF, w_down_FD), gate_AF, up_AF


def _forward(
    x_RD: jax.Array, w_gate_EDF: jax.Array, w_up_EDF: jax.Array, w_down_EFD: jax.Array, group_sizes_E: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """As `expert_ffn_tiles`, keeping gate and up: to read them back is cheaper than two of eight products again."""
    require_trainable((w_gate_EDF, w_up_EDF, w_down_EFD))
    num_rows, hidden = x_RD.shape[0], w_gate_EDF.shape[2]

    def visit(e: jax.Array, over_tiles: Callable, carry: Any) -> Any:
        weights = w_gate_EDF[e], w_up_EDF[e], w_down_EFD[e]

        def body(tile: _Tile, carry: Any) -> Any:
            return tuple(tile.write(array, rows) for array, rows in zip(carry, _expert(tile.read(x_RD), *weights), strict=True))

        return over_tiles(body, carry)

    pre_RF = zeros_beside(x_RD, (num_rows, hidden), jnp.promote_types(x_RD.dtype, jnp.float32))
    y_RD, gate_RF, up_RF = _over_experts(visit, (jnp.zeros_like(x_RD), pre_RF, pre_RF), group_sizes_E, num_rows)
    return y_RD, (x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, gate_RF, up_RF)


def _backward(residuals: tuple[jax.Array, ...], dy_RD: jax.Array) -> tuple[jax.Array | None, ...]:
    x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, gate_RF, up_RF = residuals

    def visit(e: jax.Array, over_tiles: Callable, carry: Any) -> Any:
        w_gate_DF, w_up_DF, w_down_FD = w_gate_EDF[e], w_up_EDF[e], w_down_EFD[e]

        def body(tile: _Tile, carry: Any) -> Any:
            dx_RD, (dw_gate_DF, dw_up_DF, dw_down_FD) = carry
            x_AD, dy_AD = tile.read(x_RD), tile.read(dy_RD)
            dhidden_AF = _dot("AD,FD->AF", dy_AD, w_down_FD)
            hidden_AF, dgate_AF, dup_AF = _swiglu_gradient(tile.read(gate_RF), tile.read(up_RF), dhidden_AF, x_RD.dtype)
            dx_AD = _dot("AF,DF->AD", dgate_AF, w_gate_DF) + _dot("AF,DF->AD", dup_AF, w_up_DF)
            return tile.write(dx_RD, dx_AD), (
                dw_gate_DF + _dot("AD,AF->DF", x_AD, dgate_AF),
                dw_up_DF + _dot("AD,AF->DF", x_AD, dup_AF),
                dw_down_FD + _dot("AF,AD->FD", hidden_AF, dy_AD),
            )

        dx_RD, dweights = carry
        sums = tuple(zeros_beside(x_RD, dw.shape[1:], gate_RF.dtype) for dw in dweights)
        dx_RD, sums = over_tiles(body, (dx_RD, sums))
        return dx_RD, tuple(dw.at[e].set(total.astype(dw.dtype)) for dw, total in zip(dweights, sums, strict=True))

    carry = jnp.zeros_like(x_RD), tuple(jnp.zeros_like(w) for w in (w_gate_EDF, w_up_EDF, w_down_EFD))
    dx_RD, dweights = _over_experts(visit, carry, group_sizes_E, x_RD.shape[0])
    return dx_RD, *dweights, None


def _swiglu_gradient(
    gate_AF: jax.Array, up_AF: jax.Array, dhidden_AF: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """hidden = silu(gate) * up, and the gradients of gate and up, rounded to `dtype` for the products they enter."""
    sigmoid_AF = jax.nn.sigmoid(gate_AF)
    silu_AF = gate_AF * sigmoid_AF
    dgate_AF = dhidden_AF * up_AF * (sigmoid_AF + silu_AF * (1 - sigmoid_AF))
    return (silu_AF * up_AF).astype(dtype), dgate_AF.astype(dtype), (dhidden_AF * silu_AF).astype(dtype)


expert_ffn_tiles.defvjp(_forward, _backward)
