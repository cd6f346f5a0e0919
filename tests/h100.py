"""H100s that are not there, for the CUDA compiler of JAX's plugin: a pip package that runs on any x86 machine."""

from __future__ import annotations

import importlib
import os
import pathlib
import sys
from typing import Any

import jax

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
    """Return so many H100s of one host, for the compiler. JAX itself is made to run on the CPU.

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
    """Return the folder of packages that `make cuda-compiler` fills; None without one."""
    folder = pathlib.Path(sys.prefix, "cuda")
    return str(folder) if (folder / "jax_plugins").is_dir() else None
