"""The device mesh: five named axes over all devices of a run, on one host, many hosts or several TPU slices.

| axis | splits |
|---|---|
| data | the batch; parameters are replicated (between slices or hosts) |
| fsdp | the batch, and every parameter with its optimizer state |
| expert | the experts of MoE layers; everywhere else as fsdp |
| context | the sequence; parameters too |
| tensor | heads, hidden units of the feed-forwards, vocabulary |

The mesh of a program is ambient: `with jax.set_mesh(mesh): ...`. Code that depends on it calls `current_mesh` while it is
traced; without a mesh, or with one of a single device, it traces the one-device program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from dsv3_jax.config import Config, MeshConfig

AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))
BATCH_AXES = "data", "fsdp", "expert"  # Axes that split the sequences of a batch.
TOKEN_AXES = (*BATCH_AXES, "context")  # Axes that split the tokens of a batch.


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of `config` over `devices` (None: all devices of the run), laid out along their links.

    The default config (every size 1) takes the first device alone, if the run has one process. Several TPU slices are split
    along `data`, so that only this axis crosses the slow network.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices, or `data` is no multiple of the TPU slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if config == MeshConfig() and jax.process_count() == 1:
        devices = devices[:1]
    shape = tuple(config.resolve(len(devices)).values())
    return Mesh(_arranged(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(shape)  # JAX orders devices by process: the last axes stay within a host.
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    data, *rest = shape
    if data % slices:
        raise ValueError(f"mesh.data is {data}; it must be a multiple of the {slices} slices, which only that axis may cross")
    within, across = (data // slices, *rest), (slices, *(1 for _ in rest))
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def describe(mesh: Mesh) -> str:
    """Return the number and kind of the devices and the axes larger than 1, in words; without any, the device's name."""
    split = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    device = mesh.devices.flat[0]
    return f"{mesh.size} {device.device_kind} devices ({split})" if split else str(device)


def current_mesh() -> AbstractMesh | None:
    """Return the ambient mesh that a program is traced for; None without one, or if it has one device or other axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.axis_names == AXES and mesh.size > 1 else None


def without_mesh() -> Any:
    """Return a context in which `current_mesh` is None, to trace a program for its shapes alone."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


def current_platform() -> str:
    """Return "cpu", "gpu" or "tpu", the platform of the ambient mesh's devices, or JAX's default one without such."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def check_fits(config: Config, mesh: Mesh) -> None:
    """Raise ValueError, naming both, if mesh axes do not divide a size of the config that they split (batch, heads, ...)."""
    sizes, model, train = dict(mesh.shape), config.model, config.train
    splits = [
        (BATCH_AXES, "train.batch_size" if train.micro_batch_size is None else "train.micro_batch_size", train.micro_batch),
        (("context",), "train.sequence_length", train.sequence_length),
        (("tensor",), "model.num_attention_heads", model.num_attention_heads),
        (("tensor",), "model.vocab_size", model.vocab_size),
    ]
    if model.first_k_dense_replace:
        splits.append((("tensor",), "model.intermediate_size", model.intermediate_size))
    if model.num_moe_layers or model.num_nextn_predict_layers:
        splits += [
            (("expert",), "model.n_routed_experts", model.n_routed_experts),
            (("tensor",), "model.moe_intermediate_size", model.moe_intermediate_size),
        ]
    for axes, name, size in splits:
        parts = math.prod(sizes[axis] for axis in axes)
        if size % parts:
            product = " * ".join(f"mesh.{axis} ({sizes[axis]})" for axis in axes)
            shown = f"{product} = {parts}" if len(axes) > 1 else product
            raise ValueError(f"{name} is {size}, which {shown} does not divide; change one of them")
