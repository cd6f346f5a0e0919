"""Routed experts (section 2.1.2 of the report): dispatch, combine, and the feed-forward over rows sorted by expert.

The feed-forward is most of DeepSeek-V3's arithmetic. `expert_ffn_reference` specifies it, and every other backend computes the
same faster: tpu/experts.py on TPUs, gpu/experts.py on Hopper GPUs, `expert_ffn_tiles` elsewhere, and `expert_ffn_ragged_dot`
by XLA's own grouped product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.backend import Backends
from dsv3_jax.kernels.gpu.experts import expert_ffn_pallas_gpu
from dsv3_jax.kernels.gpu.hopper import unsupported_reason
from dsv3_jax.kernels.grouped import swiglu_gradient
from dsv3_jax.kernels.quantized import QuantizedArray, check_trainable, is_quantized
from dsv3_jax.kernels.tpu.experts import expert_ffn_pallas_tpu
from dsv3_jax.kernels.vma import varying_alike, zeros_beside

# ----------------------------------------------------------------------------------------------------------------------
# The specification: every expert multiplies all rows, and its own are kept


def expert_ffn_reference(
    x_RD: jax.Array, w_gate_EDF: jax.Array, w_up_EDF: jax.Array, w_down_EFD: jax.Array, group_sizes_E: jax.Array
) -> jax.Array:
    """Compute `expert_ffn`, y [R, D], by a scan over the experts: each multiplies all rows, with those of others zeroed."""
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


# ----------------------------------------------------------------------------------------------------------------------
# `expert_ffn` in plain XLA: products over the tiles of rows of one expert after the other


_LARGEST_TILE = 256
_REMAINDER_TILE = 32


Weight = jax.Array | QuantizedArray


class _Tile(NamedTuple):
    """A rows from `start` on; where `mine_A1` is False (another expert's, or done) they are read as zeros and not written."""

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
    """Return one or two tile sizes in rows, largest first, for experts that have num_rows / num_experts rows on average.

    Every product packs the weights again and every tile adds to the weight gradients, so a tile should hold most of an
    expert's rows; past 64 rows these costs are small, and small tiles for the remainder save more than they cost.
    """
    mean = -(-num_rows // num_experts)
    largest = min(1 << (mean - 1).bit_length(), _LARGEST_TILE, num_rows)
    return (largest, _REMAINDER_TILE) if largest >= 4 * _REMAINDER_TILE else (largest,)


def _over_experts(visit: Callable[[jax.Array, Callable, Any], Any], carry: Any, group_sizes_E: jax.Array, num_rows: int) -> Any:
    """Return `carry` after carry = visit(e, over_tiles, carry) for every expert e that has rows, in ascending order.

    In `visit`, over_tiles(body, carry) returns `carry` after carry = body(tile, carry) for every tile of expert e's rows.
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
        # JAX moves back a slice that would end past the array; done here, so that the mask matches.
        start = jnp.minimum(begin, num_rows - rows)
        row_A1 = start + jnp.arange(rows, dtype=start.dtype)[:, None]
        return body(_Tile(start, (begin <= row_A1) & (row_A1 < end)), carry)

    return jax.lax.fori_loop(0, count, step, carry)


def _dot(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


@jax.custom_vjp
def expert_ffn_tiles(
    x_RD: jax.Array, w_gate_EDF: Weight, w_up_EDF: Weight, w_down_EFD: Weight, group_sizes_E: jax.Array
) -> jax.Array:
    """Compute `expert_ffn`, y [R, D], expert after expert and tile by tile of its rows. FP8 weights have no gradient."""

    def visit(e: jax.Array, over_tiles: Callable, y_RD: jax.Array) -> jax.Array:
        # Weights in 8 bits are dequantized one expert at a time.
        weights = tuple(w_EXX[e].astype(x_RD.dtype) for w_EXX in (w_gate_EDF, w_up_EDF, w_down_EFD))
        return over_tiles(lambda tile, y_RD: tile.write(y_RD, _expert(tile.read(x_RD), *weights)[0]), y_RD)

    return _over_experts(visit, jnp.zeros_like(x_RD), group_sizes_E, x_RD.shape[0])


def _expert(
    x_AD: jax.Array, w_gate_DF: jax.Array, w_up_DF: jax.Array, w_down_FD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return y [A, D], gate and up [A, F] of one expert for a tile of rows, at least float32."""
    gate_AF, up_AF = _dot("AD,DF->AF", x_AD, w_gate_DF), _dot("AD,DF->AF", x_AD, w_up_DF)
    hidden_AF = (jax.nn.silu(gate_AF) * up_AF).astype(x_AD.dtype)
    return _dot("AF,FD->AD", hidden_AF, w_down_FD), gate_AF, up_AF


def _forward(
    x_RD: jax.Array, w_gate_EDF: jax.Array, w_up_EDF: jax.Array, w_down_EFD: jax.Array, group_sizes_E: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Return y and residuals with gate and up, cheaper to read than to compute again. ValueError for FP8 weights."""
    check_trainable((w_gate_EDF, w_up_EDF, w_down_EFD))
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
            gate_AF, up_AF = tile.read(gate_RF), tile.read(up_RF)
            silu_AF, *gradients = swiglu_gradient(gate_AF, up_AF, dhidden_AF)
            # Rounded to the dtype of the products that they enter.
            hidden_AF, dgate_AF, dup_AF = (a.astype(x_RD.dtype) for a in (silu_AF * up_AF, *gradients))
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


expert_ffn_tiles.defvjp(_forward, _backward)


# ----------------------------------------------------------------------------------------------------------------------
# `expert_ffn` by `jax.lax.ragged_dot`, XLA's own grouped product


def expert_ffn_ragged_dot(
    x_RD: jax.Array, w_gate_EDF: jax.Array, w_up_EDF: jax.Array, w_down_EFD: jax.Array, group_sizes_E: jax.Array
) -> jax.Array:
    """Compute `expert_ffn`, y [R, D], by three calls of `jax.lax.ragged_dot`; rows past the last group are zeroed."""
    dtype = x_RD.dtype
    accumulate = jnp.promote_types(dtype, jnp.float32)
    # ragged_dot's rows past the last group differ between platforms: masking them before and after keeps them out of y
    # and, in the backward pass, out of every gradient.
    used_R1 = jnp.arange(x_RD.shape[0])[:, None] < jnp.sum(group_sizes_E)

    def product(rows: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, weights, group_sizes_E, preferred_element_type=accumulate)

    x_RD = jnp.where(used_R1, x_RD, 0)
    hidden_RF = jax.nn.silu(product(x_RD, w_gate_EDF)) * product(x_RD, w_up_EDF)
    y_RD = product(jnp.where(used_R1, hidden_RF, 0).astype(dtype), w_down_EFD).astype(dtype)
    return jnp.where(used_R1, y_RD, 0)


# ----------------------------------------------------------------------------------------------------------------------
# `expert_ffn`, and the choice of its backend


_BACKENDS: dict[str, Callable[..., jax.Array]] = {
    "pallas_tpu": expert_ffn_pallas_tpu,
    "pallas_gpu": expert_ffn_pallas_gpu,
    "tiles": expert_ffn_tiles,
    "ragged_dot": expert_ffn_ragged_dot,
    "reference": expert_ffn_reference,
}
# XLA's grouped product multiplies every row with every expert and masks, on a CPU as on a TPU (libtpu 0.0.42) and a GPU.
_OPTIONS = Backends(
    "expert_backend",
    auto={"cpu": "tiles", "gpu": "pallas_gpu", "tpu": "pallas_tpu"},
    anywhere=("tiles", "ragged_dot", "reference"),
    only_on={"pallas_tpu": "tpu", "pallas_gpu": "gpu"},
)


def choose_backend(name: str, dtype: Any, platform: str | None = None) -> str:
    """Return the backend of `expert_ffn` that `name` stands for.

    Args:
      name: a backend, or "auto": "pallas_tpu" on a TPU, "pallas_gpu" for bfloat16 on a Hopper GPU, otherwise "tiles".
      dtype: of the experts' computation.
      platform: the program's target ("cpu", "gpu", "tpu"); None for JAX's default backend. To be named when compiling for
        another machine.

    Raises:
      ValueError: for any other name, an unknown platform, and a backend that the platform cannot run.
    """
    return _OPTIONS.resolve_backend(name, platform, {"pallas_gpu": lambda: unsupported_reason(dtype)})


def expert_ffn(
    x_RD: jax.Array, w_gate_EDF: Weight, w_up_EDF: Weight, w_down_EFD: Weight, group_sizes_E: jax.Array, *, backend: str
) -> jax.Array:
    """Return y [R, D], row r computed by its own expert e: y = (silu(x w_gate[e]) * (x w_up[e])) w_down[e].

    Differentiable in x and the weights. Products accumulate in float32 and the hidden activations are float32 until
    they enter the down product, for operands of any dtype.

    Args:
      x_RD: rows sorted by expert. Those past the last group may hold anything, NaN too.
      w_gate_EDF, w_up_EDF, w_down_EFD: the weights, in x's dtype or as `QuantizedArray`, which "tiles" dequantizes one
        expert at a time, and only experts that have rows; for all other backends all experts are dequantized to x's dtype.
      group_sizes_E: int32, rows of each expert; their sum is at most R.
      backend: a name for `choose_backend`.

    Returns:
      y_RD in x's dtype. Rows past the last group are exactly zero, in y and in the gradient of x.

    Raises:
      ValueError: for an unknown backend, one that cannot run here or in this dtype, and for shapes or dtypes that do not
        fit together.
    """
    # A named backend may be for another platform than the default one, and is not checked against it.
    ffn = _BACKENDS[backend if backend in _BACKENDS else choose_backend(backend, x_RD.dtype)]
    if ffn is not expert_ffn_tiles:
        weights = w_gate_EDF, w_up_EDF, w_down_EFD
        w_gate_EDF, w_up_EDF, w_down_EFD = (w.astype(x_RD.dtype) if is_quantized(w) else w for w in weights)
    _check(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E)
    return ffn(*varying_alike(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E))


def _check(x_RD: jax.Array, w_gate_EDF: Any, w_up_EDF: Any, w_down_EFD: Any, group_sizes_E: jax.Array) -> None:
    names = "x", "w_gate", "w_up", "w_down", "group_sizes"
    arrays = dict(zip(names, (x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E), strict=True))
    floats = {a.dtype for name, a in arrays.items() if name != "group_sizes" and not is_quantized(a)}
    fits = x_RD.ndim == 2 and w_gate_EDF.ndim == 3 and min(x_RD.shape + w_gate_EDF.shape) >= 1
    if fits:
        E, D, F = w_gate_EDF.shape
        fits = (x_RD.shape[1], w_up_EDF.shape, w_down_EFD.shape, group_sizes_E.shape) == (D, (E, D, F), (E, F, D), (E,))
    if not fits or len(floats) > 1 or not jnp.issubdtype(x_RD.dtype, jnp.floating) or group_sizes_E.dtype != jnp.int32:
        raise ValueError(
            "expert_ffn got "
            + ", ".join(f"{name} {a.dtype.name}{list(a.shape)}" for name, a in arrays.items())
            + "; it needs x [R, D], w_gate and w_up [E, D, F] and w_down [E, F, D] of one float dtype and no empty axis, "
            "and group_sizes int32[E]"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Dispatch and combine of DeepSeekMoE on one device


class ExpertOrder(NamedTuple):
    """Stable sort by expert of a batch's choices; choice i = t K + k is the k-th expert of token t, row r the r-th sorted."""

    order: jax.Array
    """int32 [R]: for each row its choice."""
    inverse: jax.Array
    """int32 [R]: for each choice its row."""
    group_sizes_E: jax.Array
    """int32 [E]: rows of each expert."""


def sort_by_expert(chosen_TK: jax.Array, num_experts: int) -> ExpertOrder:
    """Return the order of the choices, expert indices in [0, num_experts): by expert, within an expert by token.

    Raises:
      ValueError: if num_experts * T * K does not fit in an int32.
    """
    num_choices = chosen_TK.size
    if num_experts * num_choices >= 2**31:
        raise ValueError(
            f"{num_choices} choices among {num_experts} experts are too many to sort at once; split the batch so that "
            "choices times experts stays below 2**31"
        )
    choice = jnp.arange(num_choices, dtype=jnp.int32)
    # Expert and choice in one integer: sorting it takes a sixth of the time of a stable argsort on CPUs.
    key = jax.lax.sort(chosen_TK.reshape(-1).astype(jnp.int32) * num_choices + choice)
    order = key % num_choices
    inverse = jnp.zeros_like(order).at[order].set(choice, unique_indices=True, mode="promise_in_bounds")
    first_row = jnp.searchsorted(key, jnp.arange(num_experts + 1, dtype=jnp.int32) * num_choices)
    return ExpertOrder(order, inverse, jnp.diff(first_row).astype(jnp.int32))


@jax.custom_vjp
def dispatch(x_TD: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Return for every row the vector of its token: [R, D], row r being x[order[r] // K], with K = R / T.

    The gradient of x is summed over K in float32. `order` and `inverse` are those of `sort_by_expert`.
    """
    return rows_at(x_TD, order // (order.shape[0] // x_TD.shape[0]))


@jax.custom_vjp
def combine(y_RD: jax.Array, weight_TK: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Return for every token the sum over its choices k of weight_k y_k, summed in float32: [T, D] in y's dtype.

    `order` and `inverse` are those of `sort_by_expert`.
    """
    return sum_over_choices(y_RD, inverse.reshape(weight_TK.shape), weight_TK).astype(y_RD.dtype)


def rows_at(array_XD: jax.Array, index_R: jax.Array) -> jax.Array:
    """Return array[index_R], [R, D] or [R]. The bounds are not checked: every index has to be valid."""
    return array_XD.at[index_R].get(mode="promise_in_bounds")


def sum_over_choices(y_RD: jax.Array, row_TK: jax.Array, weight_TK: jax.Array | None) -> jax.Array:
    """Return sum_k weight_k y[row_k] of every token, or sum_k y[row_k] if the weights are None: [T, D], at least float32."""
    # One gather for each k, instead of one of [T, K, D], fuses into a single pass without a temporary.
    total_TD = jnp.zeros_like(y_RD, shape=(row_TK.shape[0], y_RD.shape[1]), dtype=jnp.promote_types(y_RD.dtype, jnp.float32))
    for k in range(row_TK.shape[1]):
        chosen_TD = rows_at(y_RD, row_TK[:, k])
        total_TD += chosen_TD if weight_TK is None else weight_TK[:, k, None] * chosen_TD
    return total_TD


def _dispatch_forward(x_TD: jax.Array, order: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    # The shape [T, K] carries the number of tokens.
    return dispatch(x_TD, order, inverse), inverse.reshape(x_TD.shape[0], -1)


def _dispatch_backward(row_TK: jax.Array, dx_RD: jax.Array) -> tuple[jax.Array, None, None]:
    return sum_over_choices(dx_RD, row_TK, None).astype(dx_RD.dtype), None, None


def _combine_forward(*arguments: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return combine(*arguments), arguments


def _combine_backward(residuals: tuple[jax.Array, ...], dout_TD: jax.Array) -> tuple[jax.Array | None, ...]:
    y_RD, weight_TK, order, inverse = residuals
    wide = jnp.promote_types(y_RD.dtype, jnp.float32)
    dout_RD = rows_at(dout_TD, order // weight_TK.shape[1]).astype(wide)
    dy_RD = rows_at(weight_TK.reshape(-1), order)[:, None] * dout_RD
    dweight_TK = rows_at(jnp.sum(y_RD * dout_RD, axis=1), inverse).reshape(weight_TK.shape)
    return dy_RD.astype(y_RD.dtype), dweight_TK.astype(weight_TK.dtype), None, None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)
combine.defvjp(_combine_forward, _combine_backward)
