"""GPU kernels on a CPU, in Pallas' interpreter: shared memory full of NaN until it is written, and races looked for.

jax 0.10 has it under private names, without wgmma's transposed operands and those in registers, and without stores to an
accumulator. They are added here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import utils
from jax._src.pallas.mosaic_gpu.core import UntilingTransform
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.jaxpr_interpret import JaxprInterpreter
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax._src.pallas.mosaic_gpu.primitives import wgmma_accumulator_store_p
from jax._src.state.types import TransposeTransform
from jax.experimental import io_callback

# What a TMA copy reads beyond an array is zero on a GPU; here it is NaN, which nothing may depend on either.
INTERPRETED = InterpretGPUParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="uninitialized")


def assert_no_race() -> None:
    """Nor a copy that TMA could not make, of the kernels interpreted in this test. From jax 0.11 on races raise instead."""
    races = interpret_pallas_call.get_races()
    assert races is None or not races.races_found, "a race was detected"
    assert not _misaligned, f"copies of swizzled tiles begin at {_misaligned[:3]}"


def assert_no_spills(folder: Path, kernels: list[str]) -> None:
    """That what the assembler said of kernels, dumped under MOSAIC_GPU_DUMP_TO, is that all values found a register."""
    for kernel in kernels:
        (said,) = (path.read_text() for path in folder.glob("*.ptxas") if re.fullmatch(rf"{kernel}_\d+", path.stem))
        assert "0 bytes spill stores, 0 bytes spill loads" in said, said


_misaligned: list[int] = []
"""Where copies of this test begin that must not."""
needs_accumulator_stores = pytest.mark.skipif(
    jax.__version_info__ >= (0, 11),
    reason="Pallas' GPU interpreter knows no stores to an accumulator, and this shim knows no interpreter but that of jax 0.10",
)


@pytest.fixture
def gpu_interpreter(monkeypatch: pytest.MonkeyPatch) -> InterpretGPUParams:
    """The parameters to interpret with, starting afresh."""
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    _misaligned.clear()
    if jax.__version_info__ < (0, 11):
        monkeypatch.setattr(gpu_callbacks, "wgmma", _wgmma)
        for name in ("_execute_device_local_memory_transfer", "copy_smem_to_gmem"):
            monkeypatch.setattr(gpu_callbacks, name, _aligned(getattr(gpu_callbacks, name)))
        monkeypatch.setattr(JaxprInterpreter, "_interpret_arithmetic_primitive", _interpret_arithmetic_primitive)
    return INTERPRETED


def _aligned(copy: Any) -> Any:
    """The interpreter's own copy, which knows no tiles: TMA cuts arrays into tiles of 8 rows, and stays within them.

    A copy that begins within a tile would lose rows on a GPU, and the interpreter would never know.
    """

    def checked(**arguments: Any) -> Any:
        for smem, gmem in (("src", "dst"), ("dst", "src")):
            tiled = [t for t in arguments[f"{smem}_transforms"] if isinstance(t, UntilingTransform)]
            for indexer in arguments[f"{gmem}_transforms"] if tiled else ():
                slices = [index for index in indexer.indices if hasattr(index, "start")]
                for index, tile in zip(slices[-2:], tiled[0].tiling, strict=False):
                    if int(index.start) % tile:  # Raised here, it would leave the kernel's other threads waiting.
                        _misaligned.append(int(index.start))
        return copy(**arguments)

    return checked


def _wgmma(*, token: Any, device_id: Any, grid_point_coords: Any, thread_id: Any, acc_dtype: Any, **operands: Any) -> Any:
    """The interpreter's own, but for operands that are transposed views, and a left one that is no view but the values."""
    source_info, memory = operands.pop("source_info", None), gpu_callbacks._get_shared_memory()
    thread = memory.get_global_thread_id(int(device_id), int(thread_id))
    point = tuple(map(int, grid_point_coords))
    where = utils.GPULoggingInfo(
        device_id=int(device_id), grid_point_coords=point, thread_id=int(thread_id), source_info=source_info
    )

    def view(name: str) -> tuple[Any, Any, bool]:
        key = gpu_callbacks.HostAllocationKey.from_array(operands[f"{name}_allocation_key_as_array"])
        transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(operands[f"{name}_transforms"]))
        turned = bool(transforms) and isinstance(transforms[-1], TransposeTransform)
        return key, utils.to_range(transforms[:-1] if turned else transforms), turned

    def read(name: str) -> np.ndarray:
        if jnp.issubdtype(operands[f"{name}_allocation_key_as_array"].dtype, jnp.floating):
            return np.asarray(operands[f"{name}_allocation_key_as_array"])
        key, place, turned = view(name)
        content = memory.get_buffer_content(key, place, thread, logging_info=where)[0]
        return content.T if turned else content

    with np.errstate(invalid="ignore"):  # NaN may be multiplied, if its products are masked.
        total = read("acc") + np.matmul(read("a").astype(acc_dtype), read("b").astype(acc_dtype))
    key, place, _ = view("acc")
    memory.store_buffer_content(key, place, total, thread, logging_info=where)
    return token


_interpret_others = JaxprInterpreter._interpret_arithmetic_primitive


def _interpret_arithmetic_primitive(self: JaxprInterpreter, eqn: Any, get_invals: Any) -> Any:
    """The interpreter's own for whatever it does not know as an access to memory; one of these is known here."""
    if eqn.primitive is not wgmma_accumulator_store_p:
        return _interpret_others(self, eqn, get_invals)
    accumulator, values = get_invals()

    def store(key: Any, values: Any, device: Any, thread: Any, point: Any) -> np.ndarray:
        where = utils.GPULoggingInfo(
            device_id=int(device), grid_point_coords=tuple(map(int, point)), thread_id=int(thread), source_info=None
        )
        memory = gpu_callbacks._get_shared_memory()
        thread = memory.get_global_thread_id(int(device), int(thread))
        place = gpu_callbacks.HostAllocationKey.from_array(key)
        memory.store_buffer_content(place, (), np.asarray(values), thread, logging_info=where)
        return np.asarray(values)

    shape = jax.ShapeDtypeStruct(values.shape, values.dtype)
    device, point = jnp.int32(self.device_info.device_id), self.grid_point_coords
    return io_callback(store, shape, accumulator, values, device, self.thread_id, point, ordered=True)
