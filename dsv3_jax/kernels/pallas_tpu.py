"""`expert_ffn` by Pallas kernels for TPUs: four products of rows with weights, two of rows with rows.

| kernel | computes | columns |
|---|---|---|
| `expert_gate_up` | hidden = silu(x w_gate) * (x w_up); for a gradient, gate and up, too | F |
| `expert_down` | y = hidden w_down | D |
| `expert_dhidden` | dhidden = dy w_down^T, and of it dgate and dup | F |
| `expert_dx` | dx = dgate w_gate^T + dup w_up^T, one sum | D |
| `expert_dw_gate_up` | x^T dgate, x^T dup | D x F an expert |
| `expert_dw_down` | hidden^T dy | F x D an expert |

What a kernel makes of its products it makes in fast memory, before they are written. Sizes come from a table by chip, made with
benchmarks/tune_expert_ffn.py, which needs no TPU; v5e, which it does not know, has those of v6e.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.grouped_rows import RowTiles, grouped_rows
from dsv3_jax.kernels.grouped_weights import WeightTiles, grouped_weights
from dsv3_jax.kernels.tpu_memory import Machine, require_dtype


class Tiles(NamedTuple):
    """Sizes of the six kernels."""

    gate_up: RowTiles
    down: RowTiles
    dhidden: RowTiles
    dx: RowTiles
    dw_gate_up: WeightTiles
    dw_down: WeightTiles


class How(NamedTuple):
    """What is fixed before the program runs."""

    tiles: Tiles
    machine: Machine
    interpret: Any = False

    def settings(self, kernel: str) -> dict[str, Any]:
        """What a kernel is called with beside arrays."""
        sizes = getattr(self.tiles, kernel)
        return {"tiles": sizes, "machine": self.machine, "name": f"expert_{kernel}", "interpret": self.interpret}


_SMALL_VMEM = Tiles(
    gate_up=RowTiles(1024, 512, 128, 256),
    down=RowTiles(1024, 512, 128, 512),
    dhidden=RowTiles(1024, 512, 128, 256),
    dx=RowTiles(1024, 512, 128, 512),
    dw_gate_up=WeightTiles(512, 256, 1792, 1024),
    dw_down=WeightTiles(512, 256, 1024, 1792),
)
_LARGE_VMEM = Tiles(
    gate_up=RowTiles(2048, 512, 128, 512),
    down=RowTiles(2048, 512, 128, 1024),
    dhidden=RowTiles(2048, 512, 128, 512),
    dx=RowTiles(2048, 512, 128, 1024),
    dw_gate_up=WeightTiles(1024, 256, 3584, 1024),
    dw_down=WeightTiles(1024, 256, 2048, 1024),
)
TILES = {
    "v5e": _LARGE_VMEM,
    "v5p": _SMALL_VMEM,
    "v6e": _LARGE_VMEM,
    # A product of 256 columns cannot fill both matrix units there, and few rows hide little of what surrounds them.
    "7x": _SMALL_VMEM._replace(
        gate_up=RowTiles(512, 512, 128, 512),
        dw_gate_up=WeightTiles(1024, 256, 1792, 1024),
        dw_down=WeightTiles(1024, 256, 1024, 1792),
    ),
}
"""By chip, as Pallas names it."""


def expert_ffn_pallas_tpu(
    x_RD: jax.Array, w_gate_EDF: jax.Array, w_up_EDF: jax.Array, w_down_EFD: jax.Array, group_sizes_E: jax.Array
) -> jax.Array:
    """`expert_ffn` for the TPU that the program is lowered for; see there. Takes float32 and bfloat16."""
    require_dtype("the expert backend 'pallas_tpu'", x_RD.dtype, "model.expert_backend tiles")
    return expert_ffn_with(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, this_machine())


def this_machine() -> How:
    """Sizes for the TPU at hand: the devices of the current mesh, or JAX's default device.

    Raises:
      NotImplementedError: for a TPU without an entry in the table.
      ValueError: where there is no TPU.
    """
    try:
        info = pltpu.get_tpu_info()
    except ValueError as error:
        raise ValueError("the expert backend 'pallas_tpu' runs on TPUs only; choose 'auto' or 'tiles'") from error
    chip = str(info.chip_version)
    if chip not in TILES:
        raise NotImplementedError(
            f"the expert backend 'pallas_tpu' has no tile sizes for TPU {chip}, only for {', '.join(TILES)}; choose 'tiles'"
        )
    return How(TILES[chip], Machine(info.num_cores, info.vmem_capacity_bytes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def expert_ffn_with(
    x_RD: jax.Array, w_gate_EDF: jax.Array, w_up_EDF: jax.Array, w_down_EFD: jax.Array, group_sizes_E: jax.Array, how: How
) -> jax.Array:
    """`expert_ffn` with sizes of choice."""
    (hidden_RF,) = _hidden(x_RD, w_gate_EDF, w_up_EDF, group_sizes_E, how, keep=False)
    return _down(hidden_RF, w_down_EFD, group_sizes_E, how)


def _hidden(
    x_RD: jax.Array, w_gate_EDF: jax.Array, w_up_EDF: jax.Array, group_sizes_E: jax.Array, how: How, *, keep: bool
) -> list[jax.Array]:
    """hidden, and gate and up if they are to be kept: to read them back is cheaper than two of eight products again."""

    def compute(products: Any, beside: Any) -> tuple[jax.Array, ...]:
        gate_AX, up_AX = products
        hidden_AX = jax.nn.silu(gate_AX) * up_AX
        return (hidden_AX, gate_AX, up_AX) if keep else (hidden_AX,)

    num_outputs, settings = 3 if keep else 1, how.settings("gate_up")
    weights = [w_gate_EDF, w_up_EDF]
    return grouped_rows(compute, [x_RD], weights, [], group_sizes_E, num_outputs=num_outputs, transposed=False, **settings)


def _down(hidden_RF: jax.Array, w_down_EFD: jax.Array, group_sizes_E: jax.Array, how: How) -> jax.Array:
    def same(products: list[jax.Array], beside: list[jax.Array]) -> list[jax.Array]:
        return products

    settings = how.settings("down")
    (y_RD,) = grouped_rows(same, [hidden_RF], [w_down_EFD], [], group_sizes_E, num_outputs=1, transposed=False, **settings)
    return y_RD


def _forward(
    x_RD: jax.Array, w_gate_EDF: jax.Array, w_up_EDF: jax.Array, w_down_EFD: jax.Array, group_sizes_E: jax.Array, how: How
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    hidden_RF, gate_RF, up_RF = _hidden(x_RD, w_gate_EDF, w_up_EDF, group_sizes_E, how, keep=True)
    y_RD = _down(hidden_RF, w_down_EFD, group_sizes_E, how)
    return y_RD, (x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, hidden_RF, gate_RF, up_RF)


def _backward(how: How, residuals: tuple[jax.Array, ...], dy_RD: jax.Array) -> tuple[jax.Array | None, ...]:
    x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, hidden_RF, gate_RF, up_RF = residuals

    def through_swiglu(products: Any, beside: Any) -> tuple[jax.Array, ...]:
        (dhidden_AX,) = products
        gate_AX, up_AX = (a.astype(jnp.float32) for a in beside)
        sigmoid_AX = jax.nn.sigmoid(gate_AX)
        silu_AX = gate_AX * sigmoid_AX
        dgate_AX = dhidden_AX * up_AX * (sigmoid_AX + silu_AX * (1 - sigmoid_AX))
        return dgate_AX, dhidden_AX * silu_AX

    def both(products: Any, beside: Any) -> tuple[jax.Array]:
        dx_from_gate_AX, dx_from_up_AX = products
        return (dx_from_gate_AX + dx_from_up_AX,)

    arrays = [dy_RD], [w_down_EFD], [gate_RF, up_RF], group_sizes_E
    dgate_RF, dup_RF = grouped_rows(through_swiglu, *arrays, num_outputs=2, transposed=True, **how.settings("dhidden"))
    arrays = [dgate_RF, dup_RF], [w_gate_EDF, w_up_EDF], [], group_sizes_E
    (dx_RD,) = grouped_rows(both, *arrays, num_outputs=1, transposed=True, **how.settings("dx"))
    dw_gate_EDF, dw_up_EDF = grouped_weights(x_RD, [dgate_RF, dup_RF], group_sizes_E, **how.settings("dw_gate_up"))
    (dw_down_EFD,) = grouped_weights(hidden_RF, [dy_RD], group_sizes_E, **how.settings("dw_down"))
    return dx_RD, dw_gate_EDF, dw_up_EDF, dw_down_EFD, None


expert_ffn_with.defvjp(_forward, _backward)
