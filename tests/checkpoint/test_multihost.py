"""Parts of sharded arrays, bit for bit and without gathering the rest; and two real processes that load and save."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.checkpoint import multihost
from dsv3_jax.checkpoint.hugging_face import load_hf, open_hf, save_hf
from dsv3_jax.checkpoint.names import copies
from tests.checkpoint.tiny import SHARDED_CONFIG, make_mesh, random_tensors, run_two, write

_SPECS = [
    PartitionSpec(),
    PartitionSpec(None, "expert", "fsdp", "tensor"),
    PartitionSpec(None, ("fsdp", "expert"), None, "tensor"),
    PartitionSpec("fsdp", "expert"),
    PartitionSpec(None, None, None, ("fsdp", "expert", "tensor")),
]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("spec", _SPECS, ids=str)
def test_a_part_has_every_bit(spec: PartitionSpec, dtype: type) -> None:
    """Of random bits: negative zeros, denormals, infinities and NaNs of all kinds are among them."""
    bits = np.random.default_rng(0).bytes(2 * 8 * 6 * 16 * np.dtype(dtype).itemsize)
    values = np.frombuffer(bits, dtype).reshape(2, 8, 6, 16).copy()
    values[1, 5, :, :2] = -0.0, np.nan
    array = jax.device_put(values, NamedSharding(make_mesh(fsdp=2, expert=2, tensor=2), spec))
    for index in [(0, 0), (1, 5), (1, 7)]:
        part = np.asarray(multihost.take(array, index)).view(dtype)
        assert part.tobytes() == values[index].tobytes()


def test_only_the_part_travels() -> None:
    """Plain indexing under jit would gather all layers and experts on every device."""
    array = jax.device_put(
        np.zeros((4, 64, 32, 32), np.float32), NamedSharding(make_mesh(expert=8), PartitionSpec(None, "expert"))
    )
    compiled = multihost._gathering(array.sharding, 4, 2).lower(array, (jnp.int32(3), jnp.int32(7))).compile()
    memory, part = compiled.memory_analysis(), 32 * 32 * 4
    assert memory.output_size_in_bytes == part
    assert memory.temp_size_in_bytes <= 4 * part < array.nbytes / 8


def test_with_one_process_an_error_passes() -> None:
    error = OSError("disk")
    with pytest.raises(OSError, match="disk") as caught, multihost.all_or_none(1):
        raise error
    assert caught.value is error
    with multihost.first_alone(1) as first:
        assert first
    assert multihost.same_everywhere(7, 1) == 7


@pytest.mark.slow
def test_two_processes_load_and_save_what_one_does(tmp_path: Path) -> None:
    tensors = random_tensors(SHARDED_CONFIG)
    source = write(tmp_path / "in", tensors, SHARDED_CONFIG, files=4)
    (source / "tokenizer.json").write_text("{}")
    shutil.copytree(source, tmp_path / "damaged")
    tensors["model.layers.4.embed_tokens.weight"][70, 1] += 1  # Among the rows that process 1 compares.
    write(tmp_path / "damaged", tensors, SHARDED_CONFIG, files=4)
    first, second = (result for result, _ in run_two("process.py", tmp_path))

    config, weights = open_hf(source, jnp.bfloat16)
    _, variables = load_hf(source, jnp.bfloat16)
    copied = sum(2 * np.prod(weights.tensors[copy].shape) for copy in copies(config))
    stored = sum(tensor.nbytes for tensor in tensors.values())
    print(f"bytes read: {first['bytes_read']}, {second['bytes_read']}; tensors {stored}, of which copies {copied}")
    replicated = sum(leaf.nbytes for leaf in jax.tree.leaves(variables) if leaf.size < 1000)  # Norms and biases.
    assert first["bytes_read"] == second["bytes_read"] < 0.55 * (stored + copied)
    assert stored + copied < first["bytes_read"] + second["bytes_read"] <= stored + copied + replicated

    for name, fp8 in (("out", False), ("fp8", True)):
        save_hf(tmp_path / "alone" / name, config, variables, max_shard_bytes=60_000, fp8=fp8)
        alone = {file.name: file.read_bytes() for file in (tmp_path / "alone" / name).iterdir()}
        together = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        assert together.pop("tokenizer.json", None) == (None if fp8 else b"{}")
        assert together == alone
        assert len(alone) > 7, "several files for each process"

    assert first["failed"] == "RuntimeError: process 1 failed, and prints the reason; nothing is kept, so save again"
    assert second["failed"] == "OSError: no space left on device"
    for result in (first, second):
        assert "model.layers.4.embed_tokens.weight from model.embed_tokens.weight" in result["refused"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["alone", "damaged", "fp8", "in", "out"]
