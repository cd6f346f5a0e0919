"""Loading onto meshes: the same bits as on one device, and of the files only what a process's devices hold."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.checkpoint.fp8 import SCALE_SUFFIX
from dsv3_jax.checkpoint.hugging_face import load_hf, load_variables, open_hf
from dsv3_jax.checkpoint.loading import (
    CheckpointError,
    Weights,
    compare_copies,
    held_slices,
    load_array,
    read_slices,
    share_of_process,
)
from dsv3_jax.checkpoint.names import copies, leaves
from dsv3_jax.config import ModelConfig
from dsv3_jax.model.sharding import variable_shardings
from tests.checkpoint.tiny import (
    BF16,
    MESHES,
    SHARDED_CONFIG,
    make_mesh,
    quantization_config,
    random_tensors,
    with_fp8,
    write,
)

_STORED = ["BF16", "F32", "FP8"]
_CASES = [
    ("FP8", "fsdp 2, expert 2, tensor 2"),
    ("FP8", "fsdp 8"),
    ("FP8", "tensor 8"),
    ("BF16", "expert 8"),
    ("BF16", "fsdp 2, expert 4"),
    ("BF16", "context 2, expert 2, tensor 2"),
    ("F32", "data 2, expert 2, tensor 2"),
    ("F32", "fsdp 8"),
]
"""Every mesh, and every type along every axis that splits something; the meshes cut the blocks of FP8 in both directions."""
_ITEMSIZE = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each type."""
    root = tmp_path_factory.mktemp("checkpoints")
    fp8_config = {**SHARDED_CONFIG, "quantization_config": quantization_config()}
    return {
        "BF16": write(root / "BF16", random_tensors(SHARDED_CONFIG, BF16), SHARDED_CONFIG, files=3),
        "F32": write(root / "F32", random_tensors(SHARDED_CONFIG, np.dtype(np.float32)), SHARDED_CONFIG),
        "FP8": write(root / "FP8", with_fp8(random_tensors(SHARDED_CONFIG)), fp8_config, files=3),
    }


@functools.cache
def _shardings(mesh: Mesh) -> dict[tuple[str, ...], NamedSharding]:
    return traverse_util.flatten_dict(variable_shardings(ModelConfig.from_hf(SHARDED_CONFIG), mesh))


@pytest.mark.parametrize(("stored", "mesh"), _CASES)
def test_the_same_bits_as_on_one_device(folders: dict[str, Path], stored: str, mesh: str) -> None:
    dtype = jnp.float32 if stored == "F32" else jnp.bfloat16
    config, expected = load_hf(folders[stored], dtype)
    devices = make_mesh(**MESHES[mesh])
    sharded_config, variables = load_hf(folders[stored], dtype, devices)
    assert sharded_config == config
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, expected)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, variables), jax.tree.map(np.asarray, expected))
    assert {path: leaf.sharding for path, leaf in traverse_util.flatten_dict(variables).items()} == _shardings(devices)


def _devices_of(mesh: Mesh, process: int, processes: int) -> list[jax.Device]:
    """What would be the devices of one of so many processes."""
    return np.array(jax.devices()).reshape(processes, -1)[process].tolist()


def _read_as(weights: Weights, config: ModelConfig, mesh: Mesh, process: int, processes: int) -> int:
    """Bytes that such a process would read."""
    devices = _devices_of(mesh, process, processes)
    before = weights.bytes_read
    assert not any(compare_copies(weights, list(copies(config).items()), (process, processes)))
    for leaf in leaves(config):
        slices = held_slices(leaf.shape, _shardings(mesh)[leaf.path], devices)
        assert {ranges for ranges, _ in read_slices(weights, leaf, leaf.dtype(config), slices)} == set(slices)
    return weights.bytes_read - before


def _held_bytes(weights: Weights, config: ModelConfig, mesh: Mesh, process: int, processes: int) -> int:
    """Stored bytes of what its devices hold, each element counted once: by marking them. Without scales."""
    devices = _devices_of(mesh, process, processes)
    total = 0
    for leaf in leaves(config):
        held = np.zeros(leaf.shape, bool)
        for device, index in _shardings(mesh)[leaf.path].devices_indices_map(leaf.shape).items():
            if device in devices:
                held[index] = True
        total += int(held.sum()) * _ITEMSIZE[weights.tensors[leaf.names[0]].dtype]  # A leaf's tensors are of one type here.
    return total


def _sizes(weights: Weights) -> dict[str, int]:
    """Bytes of every tensor."""
    return {name: math.prod(tensor.shape) * _ITEMSIZE[tensor.dtype] for name, tensor in weights.tensors.items()}


def _copy_bytes(weights: Weights, config: ModelConfig) -> int:
    """Bytes of the MTP layers' copies; comparing them takes as many again of the originals."""
    return sum(_sizes(weights)[copy] for copy in copies(config))


@pytest.mark.parametrize("mesh", MESHES)
def test_a_process_reads_what_its_devices_hold(folders: dict[str, Path], mesh: str) -> None:
    config, weights = open_hf(folders["BF16"], jnp.bfloat16)
    assert weights.bytes_read == 0
    devices, compared = make_mesh(**MESHES[mesh]), 2 * _copy_bytes(weights, config)
    for processes in (1, 2, 4, 8):
        read = [_read_as(weights, config, devices, process, processes) for process in range(processes)]
        held = [_held_bytes(weights, config, devices, process, processes) for process in range(processes)]
        # Four tensors are compared, of 80 rows, which these numbers of processes divide.
        assert read == [wanted + compared // processes for wanted in held]
        replicas = sum(held) / (sum(_sizes(weights).values()) - compared / 2)
        assert MESHES[mesh].get("data", 1) <= replicas * 1.001 if processes > 1 else replicas == 1
        if processes == 8 and "tensor" not in mesh:
            assert replicas < 1.2, "besides the norms and the router all is split"


@pytest.mark.parametrize("mesh", ["fsdp 2, expert 2, tensor 2", "fsdp 8"])
def test_of_fp8_only_scales_at_edges_are_read_twice(folders: dict[str, Path], mesh: str) -> None:
    config, weights = open_hf(folders["FP8"], jnp.bfloat16)
    devices = make_mesh(**MESHES[mesh])
    scales = sum(size for name, size in _sizes(weights).items() if name.endswith(SCALE_SUFFIX))
    compared = 2 * _copy_bytes(weights, config)
    for process in range(4):
        without_scales = _held_bytes(weights, config, devices, process, 4) + compared // 4
        assert without_scales < _read_as(weights, config, devices, process, 4) <= without_scales + scales
    before = weights.bytes_read
    load_variables(config, weights, devices)
    everything = sum(_sizes(weights).values()) + compared // 2
    assert everything <= weights.bytes_read - before < everything + scales


def test_on_one_device_every_byte_is_read_once(folders: dict[str, Path]) -> None:
    for stored in _STORED:
        config, weights = open_hf(folders[stored], jnp.float32)
        load_variables(config, weights)
        assert weights.bytes_read == sum(_sizes(weights).values()) + _copy_bytes(weights, config)


@pytest.mark.parametrize("row", [0, 41, 79])
def test_a_copy_that_differs_is_found_by_the_process_that_has_its_row(tmp_path: Path, row: int) -> None:
    tensors = random_tensors(SHARDED_CONFIG)
    copy = "model.layers.4.shared_head.head.weight"
    tensors[copy][row, 3] += 1
    folder = write(tmp_path, tensors, SHARDED_CONFIG)
    with pytest.raises(CheckpointError, match=f"{copy} from lm_head.weight"):
        load_hf(folder, mesh=make_mesh(fsdp=8))
    config, weights = open_hf(folder, jnp.float32)
    pairs = list(copies(config).items())
    found = [compare_copies(weights, pairs, (process, 4)) for process in range(4)]
    assert [any(differing) for differing in found] == [process == row // 20 for process in range(4)]


def test_share_of_process() -> None:
    assert share_of_process(make_mesh(fsdp=8), jax.process_index()) == (0, 1)


@pytest.mark.parametrize("spec", [(None, None, None, "tensor"), (None, None, "tensor", "fsdp")], ids=str)
def test_a_split_of_the_heads_width_is_refused(folders: dict[str, Path], spec: tuple[Any, ...]) -> None:
    config, weights = open_hf(folders["BF16"], jnp.float32)
    (leaf,) = [leaf for leaf in leaves(config) if leaf.path == ("params", "moe_layers", "self_attn", "kv_b_proj", "kernel")]
    mesh = make_mesh(tensor=2, fsdp=2, data=2)
    with pytest.raises(ValueError, match="shard the heads, not their width"):
        load_array(weights, leaf, leaf.dtype(config), NamedSharding(mesh, PartitionSpec(*spec)))
