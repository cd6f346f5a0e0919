"""Peak host memory of `load_hf`, as a multiple of the size of the loaded model.

    python benchmarks/load_hf_memory.py [--megabytes 1000] [--stored BF16|F32|FP8] [--dtype bfloat16]

Writes a random checkpoint of about that size to a temporary folder, loads it in a process of its own, and prints one
JSON line: `peak_ratio` is the growth of the peak resident size over the bytes of the loaded arrays. 1 is the least
there is on CPU, where the arrays themselves live in that memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from machine import machine

from dsv3_jax.checkpoint.hugging_face import load_hf, save_hf
from dsv3_jax.checkpoint.names import leaves
from dsv3_jax.config import ModelConfig

_LAYERS = 4


def _config(megabytes: int, param_dtype: str, mtp_depths: int) -> ModelConfig:
    """Return a model of about that size with most bytes in stacked experts, as in the published one."""
    itemsize = jnp.dtype(param_dtype).itemsize
    width = 512
    experts = max(8, round(megabytes * 1e6 * 0.85 / itemsize / (_LAYERS * 3 * width * 256)) // 8 * 8)
    return ModelConfig(
        vocab_size=max(256, round(megabytes * 1e6 * 0.12 / itemsize / (2 * width)) // 64 * 64),
        hidden_size=width,
        num_hidden_layers=_LAYERS,
        num_nextn_predict_layers=mtp_depths,
        first_k_dense_replace=1,
        num_attention_heads=8,
        q_lora_rank=192,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        intermediate_size=1024,
        moe_intermediate_size=256,
        n_routed_experts=experts,
        n_group=4,
        topk_group=2,
        dtype=param_dtype,
        param_dtype=param_dtype,
    )


def write_checkpoint(folder: Path, megabytes: int, stored: str, mtp_depths: int = 0) -> None:
    """Write a random checkpoint of about that size, MTP depths not counted."""
    config = _config(megabytes, "float32" if stored == "F32" else "bfloat16", mtp_depths)
    rng = np.random.default_rng(0)
    variables: dict[str, dict] = {"params": {}, "router": {}}
    for leaf in leaves(config):
        node = variables
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype(config))
    save_hf(folder, config, variables, fp8=stored == "FP8", max_shard_bytes=200 * 10**6)


def _load(folder: str, dtype: str) -> None:
    """Load in the measured process and print the memory it took."""
    jnp.zeros(1).block_until_ready()
    resident = _status_bytes("VmRSS")
    start = time.perf_counter()
    _, variables = load_hf(folder, dtype=dtype)
    jax.block_until_ready(variables)
    seconds = time.perf_counter() - start
    peak = _status_bytes("VmHWM")
    model = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    result = {"model_bytes": model, "peak_bytes": peak - resident, "seconds": seconds}
    print(json.dumps(result))


def _status_bytes(field: str) -> int:
    """A size from /proc; unlike getrusage's, its peak does not include that of the process we were forked from."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def main() -> None:
    """Print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="about the size of the checkpoint")
    parser.add_argument("--stored", choices=("BF16", "F32", "FP8"), default="BF16", help="type of its tensors")
    parser.add_argument("--dtype", default="bfloat16", help="type they are loaded in")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not sys.platform.startswith("linux"):
        sys.exit("resident sizes are read from /proc; run this on Linux")
    if arguments.load:
        _load(arguments.load, arguments.dtype)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_checkpoint(folder, arguments.megabytes, arguments.stored)
        command = [sys.executable, __file__, "--load", str(folder), "--dtype", arguments.dtype]
        measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    result = {
        "benchmark": "load_hf_memory",
        "stored": arguments.stored,
        "dtype": arguments.dtype,
        "peak_ratio": round(measured["peak_bytes"] / measured["model_bytes"], 3),
        **measured,
        "bytes_per_second": round(measured["model_bytes"] / measured["seconds"]),
        **machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
