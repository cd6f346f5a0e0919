"""Machines that need not exist, for the compiler: devices of a TPU topology or virtual CPU devices, meshes, abstract arrays.

The TPU compiler is part of libtpu, a pip package that runs on any x86 machine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from dsv3_jax.config import MeshConfig
from dsv3_jax.config.checks import check
from dsv3_jax.parallel.devices import CHIPS, Chip
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import EXPERT_FSDP_AXES, FSDP_AXES

# libtpu looks for a TPU host around it, and there is none.
_NO_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
}


def chip_of(topology: str) -> Chip:
    """Return the peak figures of the chip of a topology such as v5p:8x8x8.

    Raises:
      ValueError: if the name is of another form, or of a chip without figures here.
    """
    chip, colon, shape = topology.partition(":")
    if chip not in CHIPS or not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape, re.ASCII):
        raise ValueError(f"topology {topology!r} is not chip:AxBxC with a chip of {', '.join(CHIPS)}, such as v5p:4x4x8")
    return CHIPS[chip]


def tpu_devices(topology: str, slices: int = 1) -> list[Any]:
    """Return abstract devices of `slices` slices of a topology; sets JAX's platform to CPU and libtpu's environment variables.

    Raises:
      ValueError: if there is no such topology, or no TPU compiler.
    """
    from jax.experimental import topologies

    library = find_tpu_compiler()
    if library is None:
        raise ValueError(
            f"compiling for {topology} takes the TPU compiler, which is not found; `make tpu-compiler` or `pip install "
            "'dsv3-jax[tpu]'` adds it, --devices N compiles for N CPU devices without it"
        )
    os.environ.update(_NO_HOST, TPU_LIBRARY_PATH=library)
    jax.config.update("jax_platforms", "cpu")
    more = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices)
    except Exception as error:  # libtpu's errors have no narrower type.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"topology {topology} is refused by the TPU compiler: {reason}; name another") from error


def find_tpu_compiler() -> str | None:
    """Return the path of libtpu.so: TPU_LIBRARY_PATH, that of `make tpu-compiler`, or that of the libtpu package; else None."""
    made = pathlib.Path(sys.prefix, "tpu", "libtpu", "libtpu.so")
    library = os.environ.get("TPU_LIBRARY_PATH") or (str(made) if made.exists() else None)
    if library is None and (spec := importlib.util.find_spec("libtpu")) is not None and spec.origin is not None:
        library = str(pathlib.Path(spec.origin).with_name("libtpu.so"))
    return library


def use_cpu_devices(number: int) -> list[Any]:
    """Set JAX's platform to CPU, and return `number` virtual CPU devices; call it before JAX is first used.

    Raises:
      ValueError: if JAX already runs, with fewer devices.
    """
    jax.config.update("jax_platforms", "cpu")
    # JAX refuses this once it runs, with the devices that it has.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", number)
    devices = jax.devices()
    if len(devices) < number:
        raise ValueError(f"{number} CPU devices are asked for where JAX runs on {len(devices)} already; ask before it runs")
    return devices[:number]


def mesh_of_all(config: MeshConfig, devices: list[Any], rest: str) -> Mesh:
    """Return the mesh of `config` on all of the devices.

    Raises:
      ValueError: if the mesh has another number of devices; the message advises to give axis `rest` the remaining ones.
    """
    mesh = make_mesh(config, devices)
    places = f"the mesh has {mesh.size} place for {len(devices)} devices; set mesh.{rest} to -1, which takes all of them"
    check(mesh.size == len(devices), places)
    return mesh


# ----------------------------------------------------------------------------------------------------------------------
# Abstract arrays with a sharding, and their size on one device.


def placed(shape: Any, sharding: Sharding) -> Any:
    """Return an abstract array with the shape and dtype of `shape`, and `sharding`."""
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[tuple[str, ...], Any]]:
    """Return (path, leaf) for every leaf of a tree, the path as a tuple of key names; `is_leaf` as in `jax.tree.map`."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return [(tuple(jax.tree_util.keystr((key,), simple=True) for key in path), leaf) for path, leaf in found]


def device_bytes(tree: Any) -> int:
    """Return the bytes that all arrays of a tree, which have shardings, take on one device."""
    return sum(device_values(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_values(array: Any) -> int:
    """Return the number of values of a sharded array that one device holds."""
    return math.prod(array.sharding.shard_shape(array.shape))


def gathered(array: Any) -> Any:
    """Return the abstract array that `all_gather_weight` makes of a weight: no longer split along the fsdp axes."""
    sharding = array.sharding
    spec = (None if part in (FSDP_AXES, EXPERT_FSDP_AXES) else part for part in sharding.spec)
    return placed(array, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
