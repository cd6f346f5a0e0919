"""Bytes of a checkpoint that each process reads to load it onto a mesh of eight devices.

    python benchmarks/load_hf_sharded.py [--mesh fsdp=2,expert=2,tensor=2] [--megabytes 500] [--stored BF16|F32|FP8]

Writes a random checkpoint with one MTP depth and prints one JSON line. For 1, 2, 4 and 8 processes, each with its equal
part of the devices in order: the tensor bytes each reads as `load_hf` counts them, their sum, and its ratio to the
tensor bytes of the checkpoint. `kernel_ratio` is the same from the kernel's own count of this process (rchar in
/proc/self/io). A single process simulates them in turn, with the functions of `load_hf`.

The ratio is 1 when every byte is read once, plus what is replicated: norms and routers on every process, everything
along `data`, and the MTP layer's copies of embedding and head, which are compared with the originals.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from flax import traverse_util
from load_hf_memory import write_checkpoint
from machine import machine

from dsv3_jax.checkpoint.hugging_face import open_hf
from dsv3_jax.checkpoint.loading import Weights, compare_copies, held_slices, read_slices
from dsv3_jax.checkpoint.names import copies, leaves
from dsv3_jax.checkpoint.tensor_files import DTYPES
from dsv3_jax.config import ModelConfig
from dsv3_jax.model.sharding import variable_shardings

_AXES = "data", "fsdp", "expert", "context", "tensor"


def _read_as(weights: Weights, config: ModelConfig, shardings: dict[Any, Any], process: int, processes: int) -> int:
    """Read the part of one process; return the number of bytes."""
    before = weights.bytes_read
    devices = np.array(jax.devices()).reshape(processes, -1)[process].tolist()
    compare_copies(weights, list(copies(config).items()), (process, processes))
    for leaf in leaves(config):
        for _ in read_slices(weights, leaf, leaf.dtype(config), held_slices(leaf.shape, shardings[leaf.path], devices)):
            pass
    return weights.bytes_read - before


def _kernel_count() -> int:
    """Bytes this process has read by system calls."""
    file = Path("/proc/self/io")
    return int(file.read_text().split()[1]) if file.exists() else 0


def _figures(weights: Weights, config: ModelConfig, shardings: dict[Any, Any], processes: int, stored: int) -> dict[str, Any]:
    before, start = _kernel_count(), time.perf_counter()
    read = [_read_as(weights, config, shardings, process, processes) for process in range(processes)]
    seconds, by_kernel = time.perf_counter() - start, _kernel_count() - before
    return {
        "bytes_per_process": read,
        "bytes": sum(read),
        "ratio": round(sum(read) / stored, 4),
        "kernel_ratio": round(by_kernel / stored, 4),
        "seconds_per_process": round(seconds / processes, 2),
    }


def main() -> None:
    """Prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", default="fsdp=2,expert=2,tensor=2", help="sizes of its axes, 8 in all")
    parser.add_argument("--megabytes", type=int, default=500, help="about the size of the checkpoint")
    parser.add_argument("--stored", choices=("BF16", "F32", "FP8"), default="BF16", help="type of its tensors")
    arguments = parser.parse_args()
    sizes = {axis: int(size) for axis, size in (part.split("=") for part in arguments.mesh.split(","))}
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape([sizes.get(axis, 1) for axis in _AXES]), _AXES)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_checkpoint(folder, arguments.megabytes, arguments.stored, mtp_depths=1)
        config, weights = open_hf(folder, "bfloat16")
        shardings = traverse_util.flatten_dict(variable_shardings(config, mesh))
        stored = sum(int(np.prod(t.shape)) * DTYPES[t.dtype].itemsize for t in weights.tensors.values())
        figures = {str(n): _figures(weights, config, shardings, n, stored) for n in (1, 2, 4, 8)}
    result = {
        "benchmark": "load_hf_sharded",
        "mesh": arguments.mesh,
        "stored": arguments.stored,
        "checkpoint_bytes": stored,
        "processes": figures,
        **machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
