"""The device mesh: five named axes over all devices of a run, on one host, many hosts or several TPU slices.

| axis | carries |
|---|---|
| data | the batch; parameters are replicated (between slices or hosts) |
| fsdp | the batch; every parameter and its optimizer state are split |
| expert | the experts in MoE layers; everywhere else it is one more fsdp |
| context | the sequence; parameters are split along it too |
| tensor | heads, hidden units of the feed-forwards, vocabulary |

The mesh of a program is ambient: `with jax.set_mesh(mesh): ...`. Code that cares asks `current_mesh` while it is traced;
without a mesh, or on one of a single device, everything is the plain one-device program.
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
BATCH_AXES = "data", "fsdp", "expert"
"""The axes that split the sequences of a batch."""
TOKEN_AXES = (*BATCH_AXES, "context")
"""The axes that split the tokens of a batch."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (all of the run's, if None), laid out along their links.

    A mesh of one place, which is what a config has unless it says otherwise, takes the first device of a lone process.
    Devices of several TPU slices are split along `data` first, so that only that axis crosses the slow network.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices, or `data` is no multiple of the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if config == MeshConfig() and jax.process_count() == 1:
        devices = devices[:1]
    shape = tuple(config.resolve(len(devices)).values())
    return Mesh(_arranged(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(shape)  # Ordered by process: the last axes stay within a host.
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    data, *rest = shape
    if data % slices:
        raise ValueError(f"mesh.data is {data}; it must be a multiple of the {slices} slices, which only that axis may cross")
    within, across = (data // slices, *rest), (slices, *(1 for _ in rest))
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def describe(mesh: Mesh) -> str:
    """The mesh in a few words: the axes that split something, and what the devices are."""
    split = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    device = mesh.devices.flat[0]
    return f"{mesh.size} {device.device_kind} devices ({split})" if split else str(device)


def current_mesh() -> AbstractMesh | None:
    """The mesh that the program at hand is traced for; None if it is to run on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.axis_names == AXES and mesh.size > 1 else None


def without_mesh() -> Any:
    """A context in which `current_mesh` is None: for tracing what nothing will be computed of."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


def current_platform() -> str:
    """Platform ("cpu", "gpu", "tpu") of the devices that the program at hand is lowered for."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def check_fits(config: Config, mesh: Mesh) -> None:
    """Raises ValueError, naming both sizes, where an axis does not divide what it splits."""
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
        places = math.prod(sizes[axis] for axis in axes)
        if size % places:
            product = " * ".join(f"mesh.{axis} ({sizes[axis]})" for axis in axes)
            shown = f"{product} = {places}" if len(axes) > 1 else product
            raise ValueError(f"{name} is {size}, which {shown} does not divide; change one of them")
