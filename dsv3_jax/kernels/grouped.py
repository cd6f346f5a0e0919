"""The expert FFN as six grouped products over sorted rows, forward and backward, for the Pallas kernels of TPUs and GPUs.

| kernel | computes | columns |
|---|---|---|
| `expert_gate_up` | hidden = silu(x w_gate) * (x w_up); gate and up in addition if a gradient follows | F |
| `expert_down` | y = hidden w_down | D |
| `expert_dhidden` | dgate and dup, from dhidden = dy w_down^T, which is not stored | F |
| `expert_dx` | dx = dgate w_gate^T + dup w_up^T, one sum | D |
| `expert_dw_gate_up` | x^T dgate, x^T dup | D x F an expert |
| `expert_dw_down` | hidden^T dy | F x D an expert |

A kernel applies a function to its float32 products, the epilogue, and writes only that function's results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

KERNELS = "gate_up", "down", "dhidden", "dx", "dw_gate_up", "dw_down"

Epilogue = Callable[[list[jax.Array], list[jax.Array]], Sequence[jax.Array]]
"""Function of a tile's float32 products and of the same tile of each `extras` array; returns the tile of each output."""


class Products(Protocol):
    """Interface of the grouped products of one kind of machine. Hashed and compared by value: static in a compiled program."""

    def grouped_matmul(
        self,
        kernel: str,
        epilogue: Epilogue,
        rows: Sequence[jax.Array],
        weights: Sequence[jax.Array],
        extras: Sequence[jax.Array],
        group_sizes_E: jax.Array,
        /,
        *,
        num_outputs: int,
        transposed: bool,
    ) -> Sequence[jax.Array]:
        """Return the epilogue of the products of every row with the weights of its group.

        Args:
          kernel: one of KERNELS.
          epilogue: function of the products and extras that runs within the kernel and gives the outputs.
          rows: one array [R, K] for all weights, each of which gives a product; or one for each of the weights, whose
            products are summed to a single one.
          weights: arrays [E, K, N], or [E, N, K] if transposed.
          extras: arrays [R, N], passed to the epilogue.
          group_sizes_E: int32, rows of each group.
          num_outputs: number of arrays that the epilogue returns.
          transposed: True for weights [E, N, K].

        Returns:
          The outputs, [R, N] in the dtype of the rows. Rows past the last group are zero.
        """

    def grouped_matmul_dw(
        self, kernel: str, left_RX: jax.Array, rights: Sequence[jax.Array], group_sizes_E: jax.Array, /
    ) -> Sequence[jax.Array]:
        """Return left^T right over the rows of every group, for each right array [R, Y]: [E, X, Y] in the dtype of the rows.

        Sums are float32; groups without rows get zeros, and rows past the last group are ignored.
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
    """Compute `expert_ffn`, y [R, D], by the kernels of `products`; its custom gradient runs their backward kernels."""
    weights = [w_gate_EDF, w_up_EDF]
    (hidden_RF,) = products.grouped_matmul(
        "gate_up", _hidden, [x_RD], weights, [], group_sizes_E, num_outputs=1, transposed=False
    )
    return _down(hidden_RF, w_down_EFD, group_sizes_E, products)


def _forward(*arguments: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, products = arguments
    # Reading gate and up back is cheaper than computing two of eight products again.
    hidden_RF, gate_RF, up_RF = products.grouped_matmul(
        "gate_up", _hidden_gate_up, [x_RD], [w_gate_EDF, w_up_EDF], [], group_sizes_E, num_outputs=3, transposed=False
    )
    y_RD = _down(hidden_RF, w_down_EFD, group_sizes_E, products)
    return y_RD, (x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, hidden_RF, gate_RF, up_RF)


def _backward(products: Products, residuals: tuple[jax.Array, ...], dy_RD: jax.Array) -> tuple[jax.Array | None, ...]:
    x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, hidden_RF, gate_RF, up_RF = residuals
    dgate_RF, dup_RF = products.grouped_matmul(
        "dhidden", _dgate_dup, [dy_RD], [w_down_EFD], [gate_RF, up_RF], group_sizes_E, num_outputs=2, transposed=True
    )
    (dx_RD,) = products.grouped_matmul(
        "dx", _identity, [dgate_RF, dup_RF], [w_gate_EDF, w_up_EDF], [], group_sizes_E, num_outputs=1, transposed=True
    )
    dw_gate_EDF, dw_up_EDF = products.grouped_matmul_dw("dw_gate_up", x_RD, [dgate_RF, dup_RF], group_sizes_E)
    (dw_down_EFD,) = products.grouped_matmul_dw("dw_down", hidden_RF, [dy_RD], group_sizes_E)
    return dx_RD, dw_gate_EDF, dw_up_EDF, dw_down_EFD, None


expert_ffn_by.defvjp(_forward, _backward)


def _down(hidden_RF: jax.Array, w_down_EFD: jax.Array, group_sizes_E: jax.Array, products: Products) -> jax.Array:
    return products.grouped_matmul(
        "down", _identity, [hidden_RF], [w_down_EFD], [], group_sizes_E, num_outputs=1, transposed=False
    )[0]


def _identity(products: Any, extras: Any) -> Sequence[jax.Array]:
    return products


def _hidden(products: Any, extras: Any) -> Sequence[jax.Array]:
    gate_AX, up_AX = products
    return (jax.nn.silu(gate_AX) * up_AX,)


def _hidden_gate_up(products: Any, extras: Any) -> Sequence[jax.Array]:
    return *_hidden(products, extras), *products


def _dgate_dup(products: Any, extras: Any) -> Sequence[jax.Array]:
    gate_AX, up_AX = (a.astype(jnp.float32) for a in extras)
    return swiglu_gradient(gate_AX, up_AX, products[0])[1:]


def swiglu_gradient(gate: jax.Array, up: jax.Array, dhidden: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (silu(gate), dgate, dup): the gradients of hidden = silu(gate) * up for the gradient `dhidden` of hidden."""
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    dgate = dhidden * up * (sigmoid + silu * (1 - sigmoid))
    return silu, dgate, dhidden * silu


def split_refs(refs: Sequence[Any], *sizes: int) -> list[Sequence[Any]]:
    """Split `refs` in order into one sequence for each of `sizes`, and a last one with all that follow; return their list."""
    parts = []
    for size in sizes:
        parts.append(refs[:size])
        refs = refs[size:]
    return [*parts, refs]


# ----------------------------------------------------------------------------------------------------------------------
# Schedules: the order in which a kernel visits the groups, blocks and tiles of sorted rows


class Visits(NamedTuple):
    """Pairs of a group and a block of rows that it reaches, ordered by row; from `number` on padding, with valid indices."""

    group_V: jax.Array
    block_V: jax.Array
    number: jax.Array
    start_G: jax.Array
    """int32 [G + 1]: the first row of every group, and the end of the last."""


class Steps(NamedTuple):
    """Group, row block and column tile of each step of a kernel, in order; see `steps_by_block`."""

    group_I: jax.Array
    block_I: jax.Array
    tile_I: jax.Array
    start_G: jax.Array


def visits_of(group_sizes_G: jax.Array, num_rows: int, block_rows: int, *, visit_empty: bool) -> Visits:
    """Return a visit for each pair of a group and a block (of `block_rows` rows) that share rows, in the order of rows.

    The sizes, int32, add up to at most `num_rows`; the last block may be cut short. With `visit_empty`, a group without rows
    gets one visit, else none.
    """
    num_groups, num_blocks = group_sizes_G.shape[0], -(-num_rows // block_rows)
    start_and_end = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(group_sizes_G, dtype=jnp.int32)])
    start_G, end_G = start_and_end[:-1], start_and_end[1:]
    first_block_G = jnp.minimum(start_G // block_rows, num_blocks - 1)
    visits_G = jnp.where(group_sizes_G > 0, (end_G - 1) // block_rows - first_block_G + 1, int(visit_empty))
    # Groups that share a block add one visit each to those of the blocks.
    visit_V = jnp.arange(num_blocks + num_groups, dtype=jnp.int32)
    group_V, within_V = _locate(visit_V, visits_G)
    block_V = jnp.minimum(first_block_G[group_V] + within_V, num_blocks - 1)
    return Visits(group_V, block_V, jnp.sum(visits_G, dtype=jnp.int32), start_and_end)


def steps_by_block(visits: Visits, num_blocks: int, num_tiles: int) -> tuple[Steps, jax.Array]:
    """Return one step for each visit and column tile, ordered by block, then tile, then visit, with padding; and their number.

    So a block of rows is fetched once, an output tile is complete before the next one begins, and a group's weights are fetched
    once for each block that the group has rows in. Every block needs a visit.
    """
    visit_V = jnp.arange(visits.group_V.shape[0], dtype=jnp.int32)
    here_SV = (jnp.arange(num_blocks)[:, None] == visits.block_V) & (visit_V < visits.number)
    visits_S = jnp.sum(here_SV, axis=1, dtype=jnp.int32)
    step_I = jnp.arange(visit_V.size * num_tiles, dtype=jnp.int32)
    block_I, within_I = _locate(step_I, visits_S * num_tiles)
    tile_I = jnp.minimum(within_I // visits_S[block_I], num_tiles - 1)
    visit_I = (jnp.cumsum(visits_S) - visits_S)[block_I] + within_I % visits_S[block_I]
    return Steps(visits.group_V[visit_I], block_I, tile_I, visits.start_G), visits.number * num_tiles


class RowSteps(NamedTuple):
    """Group, rows and column tile of each step, for tiles that begin near their group's start; see `steps_by_band`."""

    group_I: jax.Array
    row_I: jax.Array
    """First row of the row tile."""
    begin_I: jax.Array
    """Number of the tile's rows before the group's first row."""
    end_I: jax.Array
    """End of the group's rows within the tile: they are [begin, end) of it."""
    tile_I: jax.Array
    """Index of the column tile."""


def steps_by_band(
    group_sizes_G: jax.Array, num_rows: int, tile_rows: int, num_tiles: int, band: int, grain: int
) -> tuple[RowSteps, jax.Array]:
    """Return one step for each tile of rows and column tile, ordered by group, then band of `band` row tiles; and their number.

    A group's first tile begins with it or up to `grain` - 1 rows before, at a multiple of `grain`, as `tile_rows` is; its last
    one may reach beyond it. Within a band the order is by column tile, then row tile: multiprocessors that work on neighbouring
    steps share rows and weights. The sizes, int32, add up to `num_rows`. The steps are padded at the end.
    """
    start_G = jnp.cumsum(group_sizes_G, dtype=jnp.int32) - group_sizes_G
    before_G = start_G % grain
    visits_G = jnp.where(group_sizes_G > 0, -(-(group_sizes_G + before_G) // tile_rows), 0)
    most = (num_rows + group_sizes_G.size * (grain + tile_rows - 2)) // tile_rows
    step_I = jnp.arange(most * num_tiles, dtype=jnp.int32)
    group_I, within_I = _locate(step_I, visits_G * num_tiles)
    band_I, within_I = within_I // (band * num_tiles), within_I % (band * num_tiles)
    visits_I = jnp.clip(visits_G[group_I] - band_I * band, 1, band)
    offset_I = (band_I * band + within_I % visits_I) * tile_rows
    before_I = before_G[group_I]
    begin_I = jnp.clip(before_I - offset_I, 0, tile_rows)
    end_I = jnp.clip(group_sizes_G[group_I] + before_I - offset_I, 0, tile_rows)
    tile_I = jnp.minimum(within_I // visits_I, num_tiles - 1)
    steps = RowSteps(group_I, start_G[group_I] - before_I + offset_I, begin_I, end_I, tile_I)
    return steps, jnp.sum(visits_G, dtype=jnp.int32) * num_tiles


def _locate(index_I: jax.Array, count_Y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the run that each index falls into, and its offset there: consecutive runs of lengths count_Y, the last endless.

    All are compared with all: a single pass over a small matrix, where a search or a scatter would be a loop.
    """
    end_Y = jnp.cumsum(count_Y, dtype=jnp.int32)
    run_I = jnp.minimum(jnp.sum(index_I[:, None] >= end_Y, axis=1, dtype=jnp.int32), count_Y.size - 1)
    return run_I, index_I - (end_Y - count_Y)[run_I]
