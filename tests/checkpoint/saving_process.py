"""One of two processes of four devices that save together: started by `test_run_failing_saves_together`.

    python saving_process.py INDEX PORT FOLDER

Process 1 cannot write its part of step 2, process 0 cannot finish step 3; then all is well, and the newest is damaged.
Prints one JSON line: what this process made of each.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.path import async_path
from orbax.checkpoint._src.serialization import serialization

from dsv3_jax.checkpoint.run import Checkpoints
from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import CheckpointConfig, Config
from dsv3_jax.parallel.multihost import by_first_process
from tests.checkpoint.tiny import make_mesh

RUN = Config(checkpoint=CheckpointConfig(keep=3))
SHAPE = 64, 256
"""So that no device's part is small enough to be stored with the index, which process 0 writes."""


def trees(step: int, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Arrays that both processes hold parts of."""
    values = np.random.default_rng(step).standard_normal(SHAPE).astype(np.float32)
    split = jax.make_array_from_callback(
        values.shape, NamedSharding(mesh, PartitionSpec("fsdp", "expert")), lambda index: values[index]
    )
    count = jax.jit(lambda: jnp.int32(step), out_shardings=NamedSharding(mesh, PartitionSpec()))()
    return {"variables": {"w": split}, "optimizer": {"count": count}}


def main() -> None:
    """The process."""
    index, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
    mesh = make_mesh(fsdp=4, expert=2)
    kept: list[RunDirectory] = []
    by_first_process(lambda: kept.append(RunDirectory.create_or_resume(str(folder), RUN, resume=False)))
    write, rename = serialization.async_serialize_from_host, async_path.rename

    async def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    outcome: dict[str, Any] = {"failed": [], "seconds": []}
    with jax.set_mesh(mesh), Checkpoints(RunDirectory(str(folder)), RUN.checkpoint) as checkpoints:
        for step in range(1, 6):
            if step == 2 and index == 1:
                serialization.async_serialize_from_host = full
            if step == 3 and index == 0:
                async_path.rename = full
            begun = time.perf_counter()
            checkpoints.save(step, **trees(step, mesh))
            checkpoints.wait()
            outcome["seconds"].append(time.perf_counter() - begun)
            outcome["failed"].append(checkpoints.failed)
            serialization.async_serialize_from_host, async_path.rename = write, rename
        outcome["steps"] = sorted(checkpoints._manager.all_steps())

    by_first_process(lambda: _damage(folder / "checkpoints" / "5"))
    with jax.set_mesh(mesh), Checkpoints(RunDirectory(str(folder)), RUN.checkpoint) as checkpoints:
        found = checkpoints.restore_newest(**trees(0, mesh))
        assert found is not None
        outcome["restored"] = found.record.step
        for a, b in zip(jax.tree.leaves(found.items), jax.tree.leaves(trees(found.record.step, mesh)), strict=True):
            for one, other in zip(a.addressable_shards, b.addressable_shards, strict=True):
                np.testing.assert_array_equal(np.asarray(one.data), np.asarray(other.data))
        outcome["checksums"] = {path: one.checksum for path, one in found.record.arrays["variables"].items()}
        checkpoints.save(5, **trees(5, mesh))
    outcome["last"] = checkpoints.failed
    print(json.dumps(outcome))


def _damage(checkpoint: Path) -> None:
    """Spoils what process 1 wrote, and only it reads: it asks for the same parts again."""
    for file in (checkpoint / "variables" / "ocdbt.process_1" / "d").iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


if __name__ == "__main__":
    main()
