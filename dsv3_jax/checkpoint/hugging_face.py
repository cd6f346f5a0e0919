"""Hugging Face checkpoints of DeepSeek-V3, in and out: `load_hf` and `save_hf`.

Loading fills one array of the tree at a time from bands of its tensors' rows, so that host memory stays near the size
of the model; on a mesh a process reads and holds the slices of its own devices alone (`loading`). Saving takes one
tensor at a time from the arrays (`saving`). A tree loaded in the dtype of its file writes that file back, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import NamedSharding

from dsv3_jax.checkpoint.folder import CheckpointError, check_no_folder, find_tensors, read_config
from dsv3_jax.checkpoint.fp8 import EXPORT_CONFIG, SCALE_SUFFIX, block_size, scale_shape
from dsv3_jax.checkpoint.loading import Weights, differing_copies, load_array
from dsv3_jax.checkpoint.multihost import all_or_none, first_alone
from dsv3_jax.checkpoint.names import Leaf, leaves
from dsv3_jax.checkpoint.saving import checked_arrays, new_folder, outgoing_tensors, processes_of, write_tensors
from dsv3_jax.checkpoint.tensor_files import shards
from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.quantized import QuantizedArray
from dsv3_jax.model.sharding import scale_sharding, variable_shardings

Variables = dict[str, Any]

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "tokenizer.model", "tiktoken.model", "tokenization_*.py",
)  # fmt: skip


def load_hf(
    path: Any, dtype: Any = jnp.float32, mesh: jax.sharding.Mesh | None = None, *, keep_fp8: bool = False
) -> tuple[ModelConfig, Variables]:
    """Reads a Hugging Face folder: config.json, and safetensors in one file or in many with an index.

    Args:
      path: the folder; `gs://` paths work where their driver is installed.
      dtype: computation and parameter dtype of the result; FP8 weights are dequantised in float32 first. Router biases
        are float32 whatever it is.
      mesh: devices to shard the arrays over, as `variable_shardings` says; None puts them on one device. With several
        processes, all of the mesh's call this together, and each reads what its own devices hold.
      keep_fp8: for inference: linear layers and experts that the file has as FP8 blocks stay so, a `QuantizedArray` each in
        place of an array, and are dequantised where they are multiplied with.

    Returns:
      The config, and the variables {"params": ..., "router": ...}: plain nested dicts of jax arrays.

    Raises:
      CheckpointError: (a ValueError) listing all that is missing, unexpected, misshapen, of a wrong type or unreadable,
        before any array is made; or the copies of embedding and head in the MTP layers that differ from the originals.
      ValueError: if there is no such folder or config, the config asks for what is not supported or does not divide over
        the mesh, or FP8 is to be kept where there is none.
    """
    config, weights = open_hf(path, dtype)
    return config, load_variables(config, weights, mesh, keep_fp8=keep_fp8)


def open_hf(path: Any, dtype: Any) -> tuple[ModelConfig, Weights]:
    """The first half of `load_hf`: reads config.json and every header, and checks them.

    The second is `load_variables`; between and after them `weights.bytes_read` tells what was read of tensor data.
    """
    folder = epath.Path(path)
    config, block = _read_model(folder)
    config = config.with_dtype(dtype)
    if jax.dtypes.canonicalize_dtype(config.param_dtype) != config.param_dtype:
        raise ValueError(f"dtype is {config.param_dtype}, which jax has disabled; set jax_enable_x64 or use float32")
    return config, Weights(folder, find_tensors(folder, config, block), block)


def is_fp8(path: Any) -> bool:
    """Whether the config.json of a Hugging Face folder names FP8 blocks. Raises as `load_hf`."""
    return _read_model(epath.Path(path))[1] is not None


def named_dtype(path: Any) -> str:
    """The dtype that the config.json of a Hugging Face folder names, "bfloat16" if none. Raises as `load_hf`."""
    return _read_model(epath.Path(path))[0].dtype


def _read_model(folder: epath.Path) -> tuple[ModelConfig, tuple[int, int] | None]:
    """The model of a folder's config.json, and its FP8 blocks."""
    file_config = read_config(folder)
    try:
        return ModelConfig.from_hf(file_config), block_size(file_config)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None


def load_variables(
    config: ModelConfig, weights: Weights, mesh: jax.sharding.Mesh | None = None, *, keep_fp8: bool = False
) -> Variables:
    """The second half of `load_hf`: makes the arrays of what `open_hf` found."""
    if keep_fp8:
        check_fp8(weights)
    shardings = {} if mesh is None else traverse_util.flatten_dict(variable_shardings(config, mesh))
    if differing := differing_copies(weights, config, mesh):
        raise CheckpointError(weights.folder, {"MTP copies that differ": differing})

    def load(leaf: Leaf) -> Any:
        if keep_fp8 and stays_fp8(weights, leaf):
            return load_quantized(weights, leaf, shardings.get(leaf.path))
        return load_array(weights, leaf, leaf.dtype(config), shardings.get(leaf.path))

    arrays = {leaf.path: load(leaf) for leaf in leaves(config)}
    return {"router": {}, **traverse_util.unflatten_dict(arrays)}


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
    MTP layers carry their copies of embedding and head, as published. Arrays that are spread over several processes are
    written by all of them together, each some of the files: all call this with the same arguments, and the folder has to
    be on a file system they share. No array is ever gathered, only one tensor of it at a time.

    Args:
      path: the folder to make; it may exist if it is empty.
      config: the model.
      variables: what `load_hf` or `init_variables` gives.
      max_shard_bytes: largest safetensors file, unless a single tensor is larger.
      tokenizer_from: a folder whose tokenizer files are copied along.
      fp8: store linear layers but head, router gate and `eh_proj` as E4M3 in blocks of 128 x 128.

    Raises:
      ValueError: if the folder exists and is not empty, `tokenizer_from` holds no tokenizer, or (`CheckpointError`)
        the variables are not those of `config`, or were loaded with `keep_fp8`.
      RuntimeError: if another of several processes failed; then nothing is kept.
    """
    processes = processes_of(variables)
    with all_or_none(processes):
        check_no_folder(path)
        arrays = checked_arrays(config, variables)
        tokenizer_files = [] if tokenizer_from is None else _tokenizer_files(epath.Path(tokenizer_from))
        if max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be positive")
    with new_folder(epath.Path(path), processes) as folder:
        with first_alone(processes) as first:
            if first:
                file_config = config.to_hf() | ({"quantization_config": EXPORT_CONFIG} if fp8 else {})
                (folder / "config.json").write_text(json.dumps(file_config, indent=2) + "\n")
                for file in tokenizer_files:
                    file.copy(folder / file.name)
        write_tensors(folder, shards(outgoing_tensors(config, arrays, fp8), max_shard_bytes), processes)


def _tokenizer_files(folder: epath.Path) -> list[epath.Path]:
    files = [file for pattern in _TOKENIZER_FILES for file in sorted(folder.glob(pattern))]
    if not files:
        raise ValueError(f"{folder} holds no tokenizer file (such as tokenizer.json); name a folder that does")
    return files


# ----------------------------------------------------------------------------------------------------------------------
# FP8 tensors of a checkpoint as they are: 8-bit values and their scales, in place of the arrays they stand for.


def check_fp8(weights: Weights) -> None:
    """Raises ValueError if the checkpoint has no FP8 blocks to keep."""
    if weights.block is None:
        raise ValueError(f"{weights.folder} holds no FP8 blocks (config.json has no quantization_config); leave keep_fp8 out")


def stays_fp8(weights: Weights, leaf: Leaf) -> bool:
    """Whether an array can be kept: the published recipe quantises it, and so does the file, in all of its layers."""
    return leaf.is_fp8 and all(weights.is_fp8(name) for name in leaf.names)


def load_quantized(weights: Weights, leaf: Leaf, sharding: NamedSharding | None) -> QuantizedArray:
    """What takes the place of the array of `leaf`; its values are split as that would be, and its scales by experts alone."""
    assert weights.block is not None
    rows, columns = scale_shape(leaf.stored, weights.block)
    scales = dataclasses.replace(
        leaf, names=tuple(name + SCALE_SUFFIX for name in leaf.names), part=(columns, rows), stored=(rows, columns)
    )
    by_experts = None if sharding is None else scale_sharding(sharding, len(leaf.stack))
    return QuantizedArray(
        values=load_array(weights, leaf, np.dtype(np.uint8), sharding),
        scale_inv=load_array(weights, scales, np.dtype(np.float32), by_experts),
        block=(weights.block[1], weights.block[0]),
        num_in=leaf.num_in,
    )
