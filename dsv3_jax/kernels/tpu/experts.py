"""`expert_ffn` by Pallas kernels for TPUs: the six of grouped.py, and a table of their tile sizes by chip.

benchmarks/tune_expert_ffn.py makes the sizes, without a TPU. It does not know v5e, which has those of v6e.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.grouped import expert_ffn_by
from dsv3_jax.kernels.tpu.grouped_matmul import RowTiles, grouped_matmul
from dsv3_jax.kernels.tpu.grouped_matmul_dw import WeightTiles, grouped_matmul_dw
from dsv3_jax.kernels.tpu.memory import Machine, check_dtype


class Tiles(NamedTuple):
    """Sizes of the six kernels."""

    gate_up: RowTiles
    down: RowTiles
    dhidden: RowTiles
    dx: RowTiles
    dw_gate_up: WeightTiles
    dw_down: WeightTiles


class KernelConfig(NamedTuple):
    """`Products` for a TPU."""

    tiles: Tiles
    machine: Machine
    interpret: Any = False

    def rows(self, kernel: str, *arrays: Any, **options: Any) -> list[jax.Array]:
        """`Products.rows`."""
        return grouped_matmul(*arrays, **options, **self._settings(kernel))

    def weights(self, kernel: str, *arrays: Any) -> list[jax.Array]:
        """`Products.weights`."""
        return grouped_matmul_dw(*arrays, **self._settings(kernel))

    def _settings(self, kernel: str) -> dict[str, Any]:
        return {**self._asdict(), "tiles": getattr(self.tiles, kernel), "name": f"expert_{kernel}"}


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
"""By chip, under its name in Pallas."""


def expert_ffn_pallas_tpu(
    x_RD: jax.Array, w_gate_EDF: jax.Array, w_up_EDF: jax.Array, w_down_EFD: jax.Array, group_sizes_E: jax.Array
) -> jax.Array:
    """Compute `expert_ffn` in float32 or bfloat16 on the TPU that the program is lowered for."""
    check_dtype("the expert backend 'pallas_tpu'", x_RD.dtype, "model.expert_backend tiles")
    return expert_ffn_by(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, this_machine())


def this_machine() -> KernelConfig:
    """Return the kernels for the devices of the current mesh, or for JAX's default device.

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
    return KernelConfig(TILES[chip], Machine(info.num_cores, info.vmem_capacity_bytes))
