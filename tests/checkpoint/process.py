"""One of two processes of four devices that load a checkpoint and save it together: started by `test_multihost`.

    python process.py INDEX PORT FOLDER

Prints one JSON line: bytes read, and how a save ended in which process 1 found its disk full.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.checkpoint import hugging_face
from dsv3_jax.checkpoint.hugging_face import load_hf, load_variables, open_hf, save_hf
from dsv3_jax.checkpoint.loading import CheckpointError
from tests.checkpoint.tiny import make_mesh


def _failed_save(folder: Path, config: Any, variables: Any, index: int) -> str:
    """How a save ends if the disk of process 1 is full after its first file."""
    write_file, files = hugging_face.write_file, []

    def full_disk(file: Any, tensors: Any, arrays: Any) -> None:
        if index == 1 and files:
            next(iter(arrays))
            raise OSError("no space left on device")
        files.append(file)
        write_file(file, tensors, arrays)

    hugging_face.write_file = full_disk
    try:
        save_hf(folder, config, variables, max_shard_bytes=60_000)
        return "saved"
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        hugging_face.write_file = write_file


def _refused_copy(folder: Path, mesh: jax.sharding.Mesh) -> str:
    try:
        load_hf(folder, mesh=mesh)
        return "loaded"
    except CheckpointError as error:
        return str(error)


def main() -> None:
    """The process."""
    index, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
    assert (len(jax.devices()), len(jax.local_devices())) == (8, 4)
    mesh = make_mesh(fsdp=2, expert=2, tensor=2)
    config, weights = open_hf(folder / "in", jnp.bfloat16)
    variables = load_variables(config, weights, mesh)

    _, alone = load_hf(folder / "in", jnp.bfloat16)
    for array, whole in zip(jax.tree.leaves(variables), jax.tree.leaves(alone), strict=True):
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(whole)[shard.index], strict=True)

    save_hf(folder / "out", config, variables, max_shard_bytes=60_000, tokenizer_from=folder / "in")
    save_hf(folder / "fp8", config, variables, max_shard_bytes=60_000, fp8=True)
    failed = _failed_save(folder / "failed", config, variables, index)
    refused = _refused_copy(folder / "damaged", mesh)
    print(json.dumps({"bytes_read": weights.bytes_read, "failed": failed, "refused": refused}))


if __name__ == "__main__":
    main()
