"""Devices that are not there, and a mesh of them: an accelerator topology for the compiler, or virtual CPU devices.

The TPU compiler is part of libtpu, and that for CUDA of JAX's plugin for GPUs: pip packages that run on any x86 machine.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import pathlib
import re
import sys
from typing import Any

import jax
from jax.sharding import Mesh

from dsv3_jax.config import MeshConfig
from dsv3_jax.config.checks import check
from dsv3_jax.parallel.devices import CHIPS, Chip
from dsv3_jax.parallel.mesh import make_mesh

# libtpu looks for a TPU host around it, and there is none.
_NO_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as v5p:8x8x8.

    Raises:
      ValueError: if the name is of another form, or of a chip without figures here.
    """
    chip, colon, shape = topology.partition(":")
    if chip not in CHIPS or not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape, re.ASCII):
        raise ValueError(f"topology {topology!r} is not chip:AxBxC with a chip of {', '.join(CHIPS)}, such as v5p:4x4x8")
    return CHIPS[chip]


def tpu_devices(topology: str, slices: int = 1) -> list[Any]:
    """The devices of `slices` slices of a topology. JAX itself is made to run on the CPU.

    Raises:
      ValueError: if there is no such topology, or no TPU compiler.
    """
    from jax.experimental import topologies

    library = find_tpu_compiler()
    if library is None:
        raise ValueError(
            f"compiling for {topology} takes the TPU compiler; `make tpu-compiler` or `pip install 'dsv3-jax[tpu]'` adds it, "
            "--devices N compiles for N CPU devices without it"
        )
    os.environ.update(_NO_HOST, TPU_LIBRARY_PATH=library)
    jax.config.update("jax_platforms", "cpu")
    more = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices)
    except Exception as error:  # What libtpu raises has no narrower type.
        raise ValueError(f"topology {topology} is refused by the TPU compiler: {_first_line(error)}") from error


def find_tpu_compiler() -> str | None:
    """The path of libtpu.so: TPU_LIBRARY_PATH, where `make tpu-compiler` puts it, or the libtpu package; None without one."""
    beside = pathlib.Path(sys.prefix, "tpu", "libtpu", "libtpu.so")
    named = os.environ.get("TPU_LIBRARY_PATH") or (str(beside) if beside.exists() else None)
    if named is None and (spec := importlib.util.find_spec("libtpu")) is not None and spec.origin is not None:
        named = str(pathlib.Path(spec.origin).with_name("libtpu.so"))
    return named


# A description of a GPU as XLA's compiler takes it (GpuTargetConfigProto): limits of compute capability 9.0, sizes of the card.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def h100_devices(number: int) -> list[Any]:
    """So many H100s of one host, for the compiler. JAX itself is made to run on the CPU.

    Raises:
      ValueError: if there is no CUDA compiler.
    """
    from jax.experimental import topologies

    folder = find_cuda_compiler()
    if folder is None:
        raise ValueError("compiling for a GPU takes the CUDA compiler; `make cuda-compiler` adds it")
    jax.config.update("jax_platforms", "cpu")
    jax.devices()  # The plugin, once it is loaded, would look for a GPU.
    if folder not in sys.path:
        sys.path.append(folder)
        # Pallas looks for it once, perhaps before the folder was known.
        os.environ["MOSAIC_GPU_RUNTIME_LIB_PATH"] = str(pathlib.Path(folder, "jax_cuda13_plugin", "libmosaic_gpu_runtime.so"))
        importlib.import_module("jax_plugins.xla_cuda13").initialize()
    shape = f"1x1x{number}"
    return list(topologies.get_topology_desc("", platform="cuda", target_config=_H100, topology=shape).devices)


def find_cuda_compiler() -> str | None:
    """The folder of packages where `make cuda-compiler` puts it; None without one."""
    beside = pathlib.Path(sys.prefix, "cuda")
    return str(beside) if (beside / "jax_plugins").is_dir() else None


def use_cpu_devices(number: int) -> list[Any]:
    """So many CPU devices, virtual ones; call it before anything else touches a device.

    Raises:
      ValueError: if JAX runs on fewer already.
    """
    jax.config.update("jax_platforms", "cpu")
    # Refused once JAX runs: then on as many as it has.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", number)
    devices = jax.devices()
    if len(devices) < number:
        raise ValueError(f"{number} CPU devices are asked for where JAX runs on {len(devices)} already")
    return devices[:number]


def mesh_of_all(config: MeshConfig, devices: list[Any], rest: str) -> Mesh:
    """The mesh of `config`, on every one of the devices.

    Args:
      config: the sizes of its axes.
      devices: what it is made of.
      rest: the axis that an error advises to give the rest of them.

    Raises:
      ValueError: if it has a place for fewer, or more.
    """
    mesh = make_mesh(config, devices)
    places = f"the mesh has {mesh.size} place for {len(devices)} devices; set mesh.{rest} to -1, for instance"
    check(mesh.size == len(devices), places)
    return mesh


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
