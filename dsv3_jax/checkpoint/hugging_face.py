"""Hugging Face checkpoints of DeepSeek-V3, in and out: `load_hf` and `save_hf`.

Loading fills one array of the tree at a time from bands of its tensors' rows, so that host memory stays near the size
of the model; on CPU the filled memory becomes the jax array without a copy. Saving takes one tensor at a time from the
arrays. A tree loaded in the dtype of its file writes that file back, bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from dsv3_jax.checkpoint.folder import INDEX, CheckpointError, find_tensors, read_config
from dsv3_jax.checkpoint.fp8 import EXPORT_CONFIG, FP8, SCALE_SUFFIX, block_size, dequantise, quantise, scale_shape
from dsv3_jax.checkpoint.names import Leaf, copies, leaves, natural_order
from dsv3_jax.checkpoint.tensor_files import DTYPES, Outgoing, StoredTensor, shards, write_file
from dsv3_jax.config import ModelConfig

Variables = dict[str, Any]

# So many rows are read and transposed at once: they and their transpose stay in cache.
_BAND = 512
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "tokenizer.model", "tiktoken.model", "tokenization_*.py",
)  # fmt: skip


def load_hf(path: Any, dtype: Any = jnp.float32, mesh: Any = None) -> tuple[ModelConfig, Variables]:
    """Reads a Hugging Face folder: config.json, and safetensors in one file or in many with an index.

    Args:
      path: the folder; `gs://` paths work where their driver is installed.
      dtype: computation and parameter dtype of the result; FP8 weights are dequantised in float32 first. Router biases
        are float32 whatever it is.
      mesh: None; loading onto a device mesh comes with the parallel code.

    Returns:
      The config, and the variables {"params": ..., "router": ...}: plain nested dicts of jax arrays.

    Raises:
      CheckpointError: (a ValueError) listing all that is missing, unexpected, misshapen, of a wrong type or unreadable,
        before any array is made; or the copies of embedding and head in the MTP layers that differ from the originals.
      ValueError: if there is no such folder or config, or the config asks for what is not supported.
      NotImplementedError: if a mesh is given.
    """
    if mesh is not None:
        raise NotImplementedError(f"load_hf cannot load onto a mesh yet, and got {mesh}; pass mesh=None")
    folder = epath.Path(path)
    file_config = read_config(folder)
    try:
        config, block = ModelConfig.from_hf(file_config), block_size(file_config)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    config = config.with_dtype(dtype)
    if jax.dtypes.canonicalize_dtype(config.param_dtype) != config.param_dtype:
        raise ValueError(f"dtype is {config.param_dtype}, which jax has disabled; set jax_enable_x64 or use float32")
    tensors = find_tensors(folder, config, block)
    _check_copies(folder, config, tensors, block)

    arrays = {}
    for leaf in leaves(config):
        filled = _filled(leaf, tensors, _leaf_dtype(leaf, config), block)
        arrays[leaf.path] = jax.device_put(filled)
    return config, {"router": {}, **traverse_util.unflatten_dict(arrays)}


def save_hf(
    path: Any,
    config: ModelConfig,
    variables: Variables,
    *,
    max_shard_bytes: int = 5 * 10**9,
    tokenizer_from: Any = None,
    fp8: bool = False,
) -> None:
    """Writes the folder that transformers and `load_hf` read: config.json, safetensors and their index.

    The folder appears under its name only when it is whole. Tensors have `config.param_dtype`, router biases float32;
    MTP layers carry their copies of embedding and head, as published.

    Args:
      path: the folder to make; it may exist if it is empty.
      config: the model.
      variables: what `load_hf` or `init_variables` gives.
      max_shard_bytes: largest safetensors file, unless a single tensor is larger.
      tokenizer_from: a folder whose tokenizer files are copied along.
      fp8: store linear layers but head, router gate and `eh_proj` as E4M3 in blocks of 128 x 128.

    Raises:
      ValueError: if the folder exists and is not empty, `tokenizer_from` holds no tokenizer, or (`CheckpointError`)
        the variables are not those of `config`.
    """
    require_no_folder(path)
    arrays = _checked_arrays(config, variables)
    tokenizer_files = [] if tokenizer_from is None else _tokenizer_files(epath.Path(tokenizer_from))
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be positive")
    with _new_folder(epath.Path(path)) as folder:
        _write_tensors(folder, shards(_outgoing(config, arrays, fp8), max_shard_bytes))
        file_config = config.to_hf() | ({"quantization_config": EXPORT_CONFIG} if fp8 else {})
        (folder / "config.json").write_text(json.dumps(file_config, indent=2) + "\n")
        for file in tokenizer_files:
            file.copy(folder / file.name)


def require_no_folder(path: Any) -> None:
    """Raises ValueError if `path` exists, unless it is an empty folder: nothing is ever overwritten."""
    target = epath.Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder; choose another path or remove it")


def _leaf_dtype(leaf: Leaf, config: ModelConfig) -> np.dtype:
    return np.dtype(jnp.dtype("float32" if leaf.is_bias else config.param_dtype))


# Loading.


def _check_copies(
    folder: epath.Path, config: ModelConfig, tensors: dict[str, StoredTensor], block: tuple[int, int] | None
) -> None:
    """Raises if an MTP layer's copy of embedding or head is not the original: here they are one array."""
    differing = []
    for copy, original in copies(config).items():
        if copy not in tensors:
            continue
        pairs = zip(_bands(tensors, copy, block), _bands(tensors, original, block), strict=True)
        if not all(_same_values(ours, theirs) for (_, ours), (_, theirs) in pairs):
            differing.append(f"{copy} from {original}")
    if differing:
        raise CheckpointError(folder, {"MTP copies that differ": differing})


def _same_values(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.astype(np.float32), b.astype(np.float32), equal_nan=True)


def _filled(leaf: Leaf, tensors: dict[str, StoredTensor], dtype: np.dtype, block: tuple[int, int] | None) -> np.ndarray:
    """The array of `leaf`, read from its tensors: [*stack, *part] in `dtype`."""
    array = _aligned_empty(leaf.shape, dtype)
    for name, part in zip(leaf.names, array.reshape(-1, *leaf.part), strict=True):
        stored = part.reshape(leaf.stored[::-1]).T if leaf.is_matrix else part
        for rows, values in _bands(tensors, name, block):
            stored[rows] = values.astype(dtype, copy=False)  # Twice as fast as converting while transposing.
    return array


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory at an address that jax's CPU client takes over without a copy."""
    alignment, nbytes = 64, math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def _bands(tensors: dict[str, StoredTensor], name: str, block: tuple[int, int] | None) -> Iterator[tuple[slice, np.ndarray]]:
    """The values of a tensor, some rows at a time; FP8 dequantised to float32."""
    tensor = tensors[name]
    if DTYPES[tensor.dtype] != FP8:
        yield from tensor.bands(_BAND)
        return
    assert block is not None
    scale = tensors[name + SCALE_SUFFIX].read()
    blocks_a_band = max(1, _BAND // block[0])
    for rows, values in tensor.bands(blocks_a_band * block[0]):
        first = rows.start // block[0]
        yield rows, dequantise(values, scale[first : first + blocks_a_band], block)


# Saving.


def _checked_arrays(config: ModelConfig, variables: Variables) -> list[tuple[Leaf, Any]]:
    """Every leaf and its array.

    Raises:
      CheckpointError: listing every array that is missing, unexpected, misshapen or of a wrong type.
    """
    arrays, needed = traverse_util.flatten_dict(variables), {leaf.path: leaf for leaf in leaves(config)}
    problems = {
        "missing arrays": ["/".join(path) for path in needed if path not in arrays],
        "unexpected arrays": ["/".join(map(str, path)) for path in arrays if path not in needed],
        "misshapen arrays": [
            f"{'/'.join(path)} is {list(arrays[path].shape)}, not {list(leaf.shape)}"
            for path, leaf in needed.items()
            if path in arrays and arrays[path].shape != leaf.shape
        ],
        "arrays of a wrong type": [
            f"{'/'.join(path)} is {arrays[path].dtype}, not {_leaf_dtype(leaf, config)}"
            for path, leaf in needed.items()
            if path in arrays and arrays[path].dtype != _leaf_dtype(leaf, config)
        ],
    }
    if found := {kind: items for kind, items in problems.items() if items}:
        raise CheckpointError("the tree of variables", found)
    return [(leaf, _host_view(arrays[path])) for path, leaf in needed.items()]


def _host_view(array: Any) -> Any:
    """The same memory as a numpy array if that is the host's; an array on an accelerator is left there."""
    on_accelerator = isinstance(array, jax.Array) and any(device.platform != "cpu" for device in array.devices())
    return array if on_accelerator else np.asarray(array)


def _outgoing(config: ModelConfig, arrays: list[tuple[Leaf, Any]], fp8: bool) -> list[Outgoing]:
    """Every tensor of the file, layer by layer."""
    outgoing: dict[str, Outgoing] = {}
    for leaf, array in arrays:
        for index, name in zip(np.ndindex(*leaf.stack), leaf.names, strict=True):
            tensor = partial(_stored, leaf, array, index)
            if fp8 and leaf.is_fp8:
                scales = (name + SCALE_SUFFIX, np.dtype(np.float32), scale_shape(leaf.stored))
                outgoing[name] = Outgoing(((name, FP8, leaf.stored), scales), partial(_quantised, name, tensor))
            else:
                outgoing[name] = Outgoing(((name, _leaf_dtype(leaf, config), leaf.stored),), partial(_alone, tensor))
    for copy, original in copies(config).items():
        ((_, dtype, shape),) = outgoing[original].tensors
        outgoing[copy] = Outgoing(((copy, dtype, shape),), outgoing[original].make)
    return [outgoing[name] for name in sorted(outgoing, key=natural_order)]


def _stored(leaf: Leaf, array: Any, index: tuple[int, ...]) -> np.ndarray:
    """One tensor of a leaf as the file holds it."""
    part = np.asarray(_take(array, index) if isinstance(array, jax.Array) else array[index])
    return part.reshape(leaf.stored[::-1]).T if leaf.is_matrix else part


@jax.jit
def _take(array: jax.Array, index: tuple[int, ...]) -> jax.Array:
    """array[index], compiled once for all indices, so that one part at a time leaves the device."""
    return array[index]


def _alone(tensor: partial[np.ndarray]) -> tuple[np.ndarray]:
    return (tensor(),)


def _quantised(name: str, tensor: partial[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    try:
        return quantise(tensor())
    except ValueError as error:
        raise ValueError(f"{name} cannot be exported: {error}") from None


def _write_tensors(folder: epath.Path, files: list[list[Outgoing]]) -> None:
    """The safetensors files and their index."""
    weight_map: dict[str, str] = {}
    for i, content in enumerate(files, 1):
        file = folder / f"model-{i:05d}-of-{len(files):05d}.safetensors"
        write_file(file, content)
        weight_map |= {name: file.name for outgoing in content for name, _, _ in outgoing.tensors}
    total = sum(outgoing.nbytes for content in files for outgoing in content)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _tokenizer_files(folder: epath.Path) -> list[epath.Path]:
    files = [file for pattern in _TOKENIZER_FILES for file in sorted(folder.glob(pattern))]
    if not files:
        raise ValueError(f"{folder} holds no tokenizer file (such as tokenizer.json); name a folder that does")
    return files


@contextlib.contextmanager
def _new_folder(target: epath.Path) -> Iterator[epath.Path]:
    """A folder to fill beside `target`, renamed to it if all goes well and removed if not."""
    target = target.resolve()
    require_no_folder(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial_folder = target.parent / f".{target.name}.partial-{os.getpid()}"
    partial_folder.mkdir()
    try:
        yield partial_folder
        if target.exists():
            target.rmdir()
        partial_folder.rename(target)
    except BaseException:
        partial_folder.rmtree()
        raise
