"""Hugging Face checkpoints of DeepSeek-V3: `load_hf` reads them, and `save_hf` writes them, sharded arrays included.

Loading fills one array at a time from bands of the rows of its tensors, so that host memory stays near the size of the model;
on a mesh, a process reads and holds only the slices of its own devices (`loading`). Saving fetches one tensor at a time from
the arrays. Variables loaded in the dtype of their file are written back bit for bit.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import NamedSharding

from dsv3_jax.checkpoint.fp8 import EXPORT_CONFIG, FP8, SCALE_SUFFIX, block_size, quantise, scale_shape
from dsv3_jax.checkpoint.loading import INDEX, CheckpointError, Weights, differing_copies, find_tensors, load_array, read_config
from dsv3_jax.checkpoint.multihost import all_or_none, first_alone, same_everywhere, take
from dsv3_jax.checkpoint.names import Leaf, copies, leaves, natural_order
from dsv3_jax.checkpoint.tensor_files import Outgoing, shards, write_file
from dsv3_jax.config import ModelConfig
from dsv3_jax.config.checks import check
from dsv3_jax.config.run import with_generation_config
from dsv3_jax.files import folder_to_disk, names_to_disk, tokenizer_files
from dsv3_jax.kernels.quantized import QuantizedArray, is_quantized
from dsv3_jax.model.sharding import scale_sharding, variable_shardings

Variables = dict[str, Any]


def load_hf(
    path: Any, dtype: Any = jnp.float32, mesh: jax.sharding.Mesh | None = None, *, keep_fp8: bool = False
) -> tuple[ModelConfig, Variables]:
    """Read a Hugging Face folder: config.json, and safetensors in one file or in many with an index.

    Args:
      path: the folder; `gs://` paths work where their driver is installed.
      dtype: computation and parameter dtype of the result; FP8 weights are dequantised in float32 first. Router biases
        are always float32.
      mesh: devices to shard the arrays over, as `variable_shardings` says; None puts them on one device. With several
        processes, all of the mesh's call this together, and each reads the slices of its own devices.
      keep_fp8: for inference: linear layers and experts in FP8 blocks stay in FP8, as a `QuantizedArray` each instead of an
        array, and are dequantised in the matmuls.

    Returns:
      The config, and the variables {"params": ..., "router": ...}: plain nested dicts of jax arrays.

    Raises:
      CheckpointError: (a ValueError) listing every tensor that is missing, unexpected, misshapen, of a wrong type or
        unreadable, before any array is made; or the copies of embedding and head in the MTP layers that differ from the
        originals.
      ValueError: if there is no such folder or config, the config is not supported or does not divide over the mesh, jax has
        disabled `dtype` (float64), or `keep_fp8` is set for a checkpoint without FP8.
    """
    config, weights = open_hf(path, dtype)
    return config, load_variables(config, weights, mesh, keep_fp8=keep_fp8)


def open_hf(path: Any, dtype: Any) -> tuple[ModelConfig, Weights]:
    """Return the config in `dtype`, and `Weights` to read with `load_variables`; only headers are read. Raises as `load_hf`."""
    folder = epath.Path(path)
    config, block = _read_model(folder)
    config = config.with_dtype(dtype)
    is_enabled = jax.dtypes.canonicalize_dtype(config.param_dtype) == config.param_dtype
    check(is_enabled, f"dtype is {config.param_dtype}, which jax has disabled; set jax_enable_x64 or use float32")
    return config, Weights(folder, find_tensors(folder, config, block), block)


def is_fp8(path: Any) -> bool:
    """Return True if the config.json of a Hugging Face folder has a `quantization_config` (FP8). Raises as `load_hf`."""
    return _read_model(epath.Path(path))[1] is not None


def named_dtype(path: Any) -> str:
    """Return the dtype in the config.json of a Hugging Face folder, "bfloat16" if it names none. Raises as `load_hf`."""
    return _read_model(epath.Path(path))[0].dtype


def _read_model(folder: epath.Path) -> tuple[ModelConfig, tuple[int, int] | None]:
    """Return the model of a folder's config.json, and the (rows, columns) of its FP8 blocks, None without FP8."""
    file_config = read_config(folder)
    try:
        model = ModelConfig.from_hf(file_config), block_size(file_config)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    return with_generation_config(model[0], str(folder)), model[1]


def load_variables(
    config: ModelConfig, weights: Weights, mesh: jax.sharding.Mesh | None = None, *, keep_fp8: bool = False
) -> Variables:
    """Check that MTP copies equal their originals, read all arrays and return them; arguments and errors as for `load_hf`."""
    check(
        not keep_fp8 or weights.block is not None,
        f"{weights.folder} holds no FP8 blocks (config.json has no quantization_config); leave keep_fp8 out",
    )
    shardings = {} if mesh is None else traverse_util.flatten_dict(variable_shardings(config, mesh))
    if differing := differing_copies(weights, config, mesh):
        problem = "MTP copies that differ (set num_nextn_predict_layers to 0 in config.json to use the main model alone)"
        raise CheckpointError(weights.folder, {problem: differing})

    def load(leaf: Leaf) -> Any:
        # The published recipe quantises it, and so does the file, in all of its layers.
        if keep_fp8 and leaf.is_fp8 and all(weights.tensors[name].is_fp8 for name in leaf.names):
            return _load_quantized(weights, leaf, shardings.get(leaf.path))
        return load_array(weights, leaf, leaf.dtype(config), shardings.get(leaf.path))

    arrays = {leaf.path: load(leaf) for leaf in leaves(config)}
    return {"router": {}, **traverse_util.unflatten_dict(arrays)}


def _load_quantized(weights: Weights, leaf: Leaf, sharding: NamedSharding | None) -> QuantizedArray:
    """Read a leaf in FP8: bits as uint8, split by `sharding`, and float32 scales, split over stack axes (experts) only."""
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


# ----------------------------------------------------------------------------------------------------------------------
# Saving. Every process goes through all tensors in the same order, since parts of them travel between processes. File i
# belongs to process i modulo their number, and tensors of a round of files are taken in turn: all processes write at once.


def save_hf(
    path: Any,
    config: ModelConfig,
    variables: Variables,
    *,
    max_shard_bytes: int = 5 * 10**9,
    tokenizer_from: Any = None,
    fp8: bool = False,
) -> None:
    """Write a Hugging Face folder that transformers and `load_hf` read: config.json, safetensors and their index.

    The folder appears under its name only when it is complete. Tensors have `config.param_dtype`, router biases float32;
    MTP layers carry their copies of embedding and head, as published. Arrays sharded over several processes are written by
    all of them together, each some of the files: all call this with the same arguments, on a file system they share. No
    array is gathered, only one tensor of it at a time.

    Args:
      path: the folder to make; it may exist if it is empty.
      config: the model.
      variables: from `load_hf` or `init_variables`.
      max_shard_bytes: most bytes of tensors in a safetensors file, unless a single tensor is larger.
      tokenizer_from: a folder whose `TOKENIZER_FILES` are copied along.
      fp8: store linear layers but head, router gate and `eh_proj` as E4M3 in blocks of 128 x 128, with scales as
        `config.scale_fmt` says.

    Raises:
      ValueError: if the folder exists and is not empty, `tokenizer_from` holds no tokenizer, `fp8` meets an infinite or NaN
        weight, or (`CheckpointError`) the variables are not those of `config`, or were loaded with `keep_fp8`.
      RuntimeError: if another of several processes failed. After any error, nothing is kept.
    """
    spread = any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in jax.tree.leaves(variables))
    processes = jax.process_count() if spread else 1
    with all_or_none(processes):
        check_no_folder(path)
        arrays = _checked_arrays(config, variables)
        files = [] if tokenizer_from is None else _tokenizer_files(epath.Path(tokenizer_from))
        check(max_shard_bytes >= 1, f"max_shard_bytes is {max_shard_bytes}; it must be positive")
    with new_folder(epath.Path(path), processes) as folder:
        with first_alone(processes) as first:
            if first:
                quantization = EXPORT_CONFIG | ({"scale_fmt": config.scale_fmt} if config.scale_fmt else {})
                file_config = config.to_hf() | ({"quantization_config": quantization} if fp8 else {})
                (folder / "config.json").write_text(json.dumps(file_config, indent=2) + "\n")
                for file in files:
                    file.copy(folder / file.name)
                _write_generation_config(folder / "generation_config.json", config)
        _write_tensors(folder, shards(_outgoing_tensors(config, arrays, fp8), max_shard_bytes), processes)


def check_no_folder(path: Any) -> None:
    """Raise ValueError if `path` exists, unless it is an empty folder: nothing is ever overwritten."""
    target = epath.Path(path)
    is_free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    check(is_free, f"{target} exists and is not an empty folder; choose another path or remove it")


def _tokenizer_files(folder: epath.Path) -> list[epath.Path]:
    files = tokenizer_files(folder)
    check(bool(files), f"{folder} holds no tokenizer file (such as tokenizer.json); name a folder that does")
    return files


def _write_generation_config(file: epath.Path, config: ModelConfig) -> None:
    """Write the tokens that end a turn into a generation_config.json, unless it names just these."""
    values = json.loads(file.read_text()) if file.exists() else {"bos_token_id": config.bos_token_id}
    named = values.get("eos_token_id")
    if config.eos_token_ids and {*config.eos_token_ids} != {*(named if isinstance(named, list) else [named])}:
        ends = list(config.eos_token_ids)
        values = {**values, "eos_token_id": ends if len(ends) > 1 else ends[0]}
        file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}, indent=2) + "\n")


def _checked_arrays(config: ModelConfig, variables: Variables) -> list[tuple[Leaf, Any]]:
    """Return every leaf with its array: a numpy view of an array on one CPU device, others unchanged.

    Raises:
      CheckpointError: listing every array that is missing, unexpected, misshapen or of a wrong type.
    """
    arrays, needed = traverse_util.flatten_dict(variables), {leaf.path: leaf for leaf in leaves(config)}
    problems: dict[str, list[str]] = collections.defaultdict(list)
    for path, leaf in needed.items():
        name, array, dtype = "/".join(path), arrays.get(path), leaf.dtype(config)
        if array is None:
            problems["missing arrays"].append(name)
        elif array.shape != leaf.shape:
            problems["misshapen arrays"].append(f"{name} is {list(array.shape)}, not {list(leaf.shape)}")
        elif is_quantized(array):
            problems["arrays in FP8, which are for inference; load the model without keep_fp8 to write it"].append(name)
        elif array.dtype != dtype:
            problems["arrays of a wrong type"].append(f"{name} is {array.dtype}, not {dtype}")
    for path in arrays:
        if path not in needed:
            problems["unexpected arrays"].append("/".join(map(str, path)))
    if problems:
        raise CheckpointError("the tree of variables", problems)
    return [(leaf, _host_view(arrays[path])) for path, leaf in needed.items()]


def _host_view(array: Any) -> Any:
    """Return a numpy view of an array that is numpy's or on a single CPU device; any other jax array itself."""
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    is_contiguous = len(array.sharding.device_set) == 1 and array.is_fully_addressable
    return np.asarray(array) if is_contiguous and all(d.platform == "cpu" for d in array.devices()) else array


def _outgoing_tensors(config: ModelConfig, arrays: Sequence[tuple[Leaf, Any]], fp8: bool) -> list[Outgoing]:
    """Return what to write for every tensor, scales and MTP copies included, layer by layer; nothing is fetched yet."""
    outgoing: dict[str, Outgoing] = {}
    for leaf, array in arrays:
        dtype = leaf.dtype(config)
        for index, name in zip(np.ndindex(*leaf.stack), leaf.names, strict=True):
            fetch, stored = partial(take, array, index), partial(_stored, leaf, dtype)
            if fp8 and leaf.is_fp8:
                tensors = (name, FP8, leaf.stored), (name + SCALE_SUFFIX, np.dtype(np.float32), scale_shape(leaf.stored))
                outgoing[name] = Outgoing(tensors, fetch, partial(_quantised, name, stored, config.scale_fmt))
            else:
                outgoing[name] = Outgoing(((name, dtype, leaf.stored),), fetch, stored)
    for copy, original in copies(config).items():
        ((_, dtype, shape),) = outgoing[original].tensors
        outgoing[copy] = dataclasses.replace(outgoing[original], tensors=((copy, dtype, shape),))
    return [outgoing[name] for name in sorted(outgoing, key=natural_order)]


def _stored(leaf: Leaf, dtype: np.dtype, part: Any) -> tuple[np.ndarray, ...]:
    """Return (array,): a tensor of a leaf in its dtype and layout on disk, [out, in] for a matrix, from the bits of `take`."""
    values = np.asarray(part).view(dtype)
    return (values.reshape(leaf.stored[::-1]).T if leaf.is_matrix else values,)


def _quantised(name: str, stored: partial[tuple[np.ndarray, ...]], scale_fmt: str | None, part: Any) -> tuple[np.ndarray, ...]:
    (weight,) = stored(part)
    try:
        return quantise(weight, scale_fmt=scale_fmt)
    except ValueError as error:
        raise ValueError(f"{name} cannot be exported: {error}") from None


def _write_tensors(folder: epath.Path, files: list[list[Outgoing]], processes: int) -> None:
    """Write the safetensors files, file i on process i modulo `processes`, and then their index on process 0.

    A process that fails to write goes on fetching tensors with the others, and raises its error after the last file.
    """
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    me = jax.process_index() if processes > 1 else 0
    with all_or_none(processes):
        check(folder.exists(), f"process {me} does not see {folder}; save to a file system that all processes share")
    with all_or_none(processes):
        failure: Exception | None = None
        for start in range(0, len(files), processes):
            turns, mine = _turns(files[start : start + processes], me), start + me
            try:
                if failure is None and mine < len(files):
                    tensors = [tensor for outgoing in files[mine] for tensor in outgoing.tensors]
                    encoded = (outgoing.encode(part) for outgoing, part in turns)
                    write_file(folder / names[mine], tensors, itertools.chain.from_iterable(encoded))
            except Exception as error:
                if processes == 1:
                    raise
                failure = error
            for _ in turns:  # The remaining tensors of the other processes.
                pass
        if failure is not None:
            raise failure
    with first_alone(processes) as first:
        if first:
            content = [(name, outgoing) for name, file in zip(names, files, strict=True) for outgoing in file]
            weight_map = {tensor: name for name, outgoing in content for tensor, _, _ in outgoing.tensors}
            index = {"metadata": {"total_size": sum(outgoing.nbytes for _, outgoing in content)}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _turns(files: Sequence[Sequence[Outgoing]], me: int) -> Iterator[tuple[Outgoing, Any]]:
    """Fetch the first tensor of each file, then the second of each, and so on; yield (outgoing, data) of file `me` only."""
    for turn in itertools.zip_longest(*files):
        mine: list[tuple[Outgoing, Any]] = []
        for number, outgoing in enumerate(turn):
            if outgoing is not None:
                part = outgoing.fetch()
                mine += [(outgoing, part)] if number == me else []
        yield from mine


@contextlib.contextmanager
def new_folder(target: epath.Path, processes: int) -> Iterator[epath.Path]:
    """Make and yield a folder next to `target`; at the end rename it to `target`, or remove it if a process failed.

    Its files are synced to the disk before the rename, as far as process 0 can do it: other processes sync those they write.
    """
    target = target.resolve()
    # Not the process id, which another container may have as well.
    number = same_everywhere(secrets.randbelow(2**31), processes)
    partial_folder, is_ours = target.parent / f".{target.name}.partial-{number:08x}", False
    try:
        with first_alone(processes) as first:
            if first:
                target.parent.mkdir(parents=True, exist_ok=True)
                partial_folder.mkdir()
                is_ours = True
        yield partial_folder
        with first_alone(processes) as first:
            if first:
                folder_to_disk(partial_folder)
                check_no_folder(target)  # Another export may have been faster.
                if target.exists():
                    target.rmdir() if "://" in str(target) else os.rmdir(target)  # That of etils removes new files as well.
                partial_folder.rename(target)
                names_to_disk(target.parent)
    except BaseException:
        if is_ours and partial_folder.exists():
            partial_folder.rmtree()
        raise
