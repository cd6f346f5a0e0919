"""Hugging Face checkpoints, read: files checked from config.json, index and headers alone, then arrays made of their tensors.

All problems of a folder are collected and reported at once, before any array is made, since each attempt at a checkpoint of
600 GiB is expensive. Pickles are named and never opened.

An array of the tree stacks tensors of layers and experts. A device's slice of it takes some of those tensors, and a rectangle
of each: a range of `out` is rows of the stored [out, in] matrix, a range of `in` is columns. A process reads the rectangles of
its own devices, each once, adjacent ones together, and nothing else; only FP8 scales whose block is cut by the edge of a slice
are read on both sides of it. Host memory holds those slices of one array at a time that share tensors; on CPU it becomes the
jax array.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from dsv3_jax.checkpoint.fp8 import SCALE_SUFFIX, dequantise, scale_shape
from dsv3_jax.checkpoint.names import IGNORED_SUFFIX, Leaf, copies, leaves, mtp_layers, natural_order
from dsv3_jax.checkpoint.tensor_files import DTYPES, Box, StoredTensor, read_header
from dsv3_jax.config import ModelConfig
from dsv3_jax.config.checks import check

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_PICKLES = ".bin", ".pt", ".pth", ".pkl", ".ckpt"
_LISTED = 20

Ranges = tuple[tuple[int, int], ...]
"""A slice of an array: (first, one past the last) index on each axis."""
# Rows that are read and transposed at once: they and their transpose stay in cache.
_BAND = 512


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message lists all of its problems."""

    def __init__(self, path: Any, problems: dict[str, list[str]]) -> None:
        """Keep `problems` (kind -> items), and join them into the message: each kind with its count and first 20 items."""
        self.problems = problems
        kinds = (f"{kind} ({len(items)}): {_some(items, _LISTED)}" for kind, items in problems.items())
        super().__init__(f"{path} cannot be used; correct all of this: {'; '.join(kinds)}")


def _some(items: Sequence[str], number: int = 3) -> str:
    return ", ".join(items[:number]) + (f" and {len(items) - number} more" if len(items) > number else "")


def read_config(folder: epath.Path) -> dict[str, Any]:
    """Return `folder`/config.json, parsed.

    Raises:
      ValueError: if there is no such folder or file, or the file holds no JSON object.
    """
    file = folder / "config.json"
    check(folder.exists(), f"there is no folder {folder}; give the path of a downloaded Hugging Face checkpoint")
    check(folder.is_dir(), f"{folder} is a file; give the folder that holds config.json and the safetensors files")
    check(file.exists(), f"{folder} holds no config.json; give the folder of a Hugging Face checkpoint")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); download it again") from None
    check(isinstance(config, dict), f"{file} holds {type(config).__name__}, not a JSON object; download it again")
    return config


# ----------------------------------------------------------------------------------------------------------------------
# Files and headers.


@dataclasses.dataclass
class _Found:
    """Result of `find_tensors` while it collects: tensors by name, and problems by kind."""

    tensors: dict[str, StoredTensor] = dataclasses.field(default_factory=dict)
    problems: dict[str, list[str]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    unreadable: set[str] = dataclasses.field(default_factory=set)
    """Names that the index lists for files that are unreadable or lack them; no further problem is added for these."""


def find_tensors(folder: epath.Path, config: ModelConfig, block: tuple[int, int] | None) -> dict[str, StoredTensor]:
    """Read the headers of a folder; return its tensors by name, if they are those of `config` in shape and type.

    Args:
      folder: a Hugging Face folder.
      config: its model.
      block: (rows, columns) of the block of an FP8 scale, None if the config names no FP8 quantisation.

    Raises:
      CheckpointError: listing every missing, unexpected or misshapen tensor and every unusable file.
    """
    found = _Found()
    if _read_files(folder, found):
        _compare(found, config, block)
    if problems := {kind: items for kind, items in found.problems.items() if items}:
        raise CheckpointError(folder, problems)
    return found.tensors


def _read_files(folder: epath.Path, found: _Found) -> bool:
    """Read the headers of all files into `found`; return False, and add a problem, if the folder lists no tensors."""
    single, index = folder / SINGLE_FILE, folder / INDEX
    if single.exists() and index.exists():
        found.problems["ambiguous files"].append(f"both {SINGLE_FILE} and {INDEX} are there; remove one of the two")
        return False
    if index.exists():
        return _read_indexed(folder, found)
    if single.exists():
        return _read_file(single, found)
    names = sorted(entry.name for entry in folder.iterdir())
    kind, problem = "missing files", f"neither {SINGLE_FILE} nor {INDEX} is there; download the weights"
    if shards := [name for name in names if name.endswith(".safetensors")]:
        problem = f"{INDEX}, which says what {_some(shards)} should hold, is missing; download it"
    elif pickles := [name for name in names if name.endswith(_PICKLES)]:
        kind, problem = "pickle files", f"{_some(pickles)}; pickles are never opened, save the model as safetensors"
    found.problems[kind].append(problem)
    return False


def _read_indexed(folder: epath.Path, found: _Found) -> bool:
    try:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
        is_usable = all(isinstance(name, str) and epath.Path(name).name == name for name in files)
    except (ValueError, KeyError, TypeError, AttributeError):
        is_usable = False
    if not is_usable:
        problem = f"{INDEX} has no weight_map from tensors to files of this folder; download it again"
        found.problems["unusable files"].append(problem)
        return False
    for name in files:
        if not _read_file(folder / name, found):
            found.unreadable |= {tensor for tensor, file in weight_map.items() if file == name}
    for tensor, file in weight_map.items():
        if tensor not in found.unreadable and (tensor not in found.tensors or found.tensors[tensor].file.name != file):
            found.problems["tensors not where the index says"].append(f"{tensor} in {file}")
            found.unreadable.add(tensor)
    return True


def _read_file(file: epath.Path, found: _Found) -> bool:
    """Add the tensors of one file's header to `found`; return False, with a problem added, if it is missing or unreadable."""
    if not file.exists():
        found.problems["missing files"].append(file.name)
        return False
    try:
        tensors = read_header(file)
    except (ValueError, OSError) as error:
        found.problems["unusable files"].append(f"{file.name}: {error}; download it again")
        return False
    for name in sorted(tensors.keys() & found.tensors.keys()):
        found.problems["tensors in two files"].append(f"{name} in {found.tensors[name].file.name} and {file.name}")
    found.tensors |= tensors
    return True


def _compare(found: _Found, config: ModelConfig, block: tuple[int, int] | None) -> None:
    """Compare `found` with what `config` needs; add missing, unexpected, misshapen and mistyped tensors as problems."""
    needed = {name: leaf for leaf in leaves(config) for name in leaf.names}
    described = needed | {copy: needed[original] for copy, original in copies(config).items()}
    present = sorted(described.keys() & found.tensors.keys(), key=natural_order)
    scales = {name + SCALE_SUFFIX for name in present if found.tensors[name].is_fp8}
    missing = (needed.keys() | scales) - found.tensors.keys() - found.unreadable
    unexpected = {name for name in found.tensors.keys() - described.keys() - scales if not name.endswith(IGNORED_SUFFIX)}
    unexpected -= _without_depths(found, config, unexpected)

    layers = mtp_layers(config)
    prefixes = tuple(f"{layer}." for layer in layers)
    if layers and not any(name.startswith(prefixes) for name in (*found.tensors, *found.unreadable)):
        found.problems["missing MTP layers"].append(
            f"{', '.join(layers)}; the file was saved without them (transformers drops them), so set "
            "num_nextn_predict_layers to 0 in config.json to use the main model alone"
        )
        missing = {name for name in missing if not name.startswith(prefixes)}
    found.problems["missing tensors"] += sorted(missing, key=natural_order)
    found.problems["unexpected tensors"] += sorted(unexpected, key=natural_order)
    for name in present:
        _check_tensor(found, name, described[name], block)


def _without_depths(found: _Found, config: ModelConfig, unexpected: set[str]) -> set[str]:
    """Return, and report, the tensors of MTP layers that a config without MTP depths passes over, as transformers does."""
    behind = {name: name.split(".")[2] for name in unexpected if re.match(r"model\.layers\.[0-9]+\.", name)}
    layers = sorted({
        layer
        for layer in behind.values()
        if int(layer) >= config.num_hidden_layers and f"model.layers.{layer}.eh_proj.weight" in found.tensors
    })  # fmt: skip
    if config.num_nextn_predict_layers or not layers:
        return set()
    passed_over = {name for name, layer in behind.items() if layer in layers}
    print(
        f"num_nextn_predict_layers is 0: passed over {len(passed_over)} tensors of the MTP layers {', '.join(layers)}",
        file=sys.stderr,
        flush=True,
    )
    return passed_over


def _check_tensor(found: _Found, name: str, leaf: Leaf, block: tuple[int, int] | None) -> None:
    tensor, scale = found.tensors[name], found.tensors.get(name + SCALE_SUFFIX)
    misshapen, mistyped = found.problems["misshapen tensors"], found.problems["tensors of a wrong type"]
    if tensor.shape != leaf.stored:
        misshapen.append(f"{name} is {list(tensor.shape)}, not {list(leaf.stored)}")
    elif tensor.dtype not in DTYPES:
        mistyped.append(f"{name} is {tensor.dtype}; only {', '.join(DTYPES)} can be read")
    elif tensor.is_fp8 and not leaf.is_matrix:
        mistyped.append(f"{name} is {tensor.dtype}; only matrices of linear layers can be FP8")
    elif tensor.is_fp8 and block is None:
        mistyped.append(f"{name} is {tensor.dtype}, but config.json has no quantization_config")
    elif tensor.is_fp8 and block is not None and scale is not None:
        expected = scale_shape(leaf.stored, block)
        if scale.shape != expected:
            misshapen.append(f"{name}{SCALE_SUFFIX} is {list(scale.shape)}, not {list(expected)}")
        if scale.dtype not in DTYPES or scale.is_fp8:
            mistyped.append(f"{name}{SCALE_SUFFIX} is {scale.dtype}")


# ----------------------------------------------------------------------------------------------------------------------
# Arrays from tensors.


@dataclasses.dataclass
class Weights:
    """Reader of the tensors of a checkpoint, a box at a time; it counts the bytes."""

    folder: epath.Path
    tensors: dict[str, StoredTensor]
    """Positions of the tensors in their files, by name, from `find_tensors`."""
    block: tuple[int, int] | None
    """(rows, columns) of an FP8 block; None without FP8."""
    bytes_read: int = 0
    """Bytes of tensor data read so far, scales included, headers excluded."""

    def bands(self, name: str, box: Box, *, bits: bool = False) -> Iterator[tuple[slice, np.ndarray]]:
        """Read `box` of a tensor in bands of rows; yield (slice of rows, values): FP8 as float32, or as uint8 with `bits`."""
        if bits or not self.tensors[name].is_fp8:
            for rows, values in self._read(name, _BAND, box):
                yield rows, values.view(np.uint8) if bits else values
            return
        assert self.block is not None
        height, width = self.block
        (top, bottom), (left, right) = box
        blocks = (top // height, -(-bottom // height)), (left // width, -(-right // width))
        ((_, scale),) = self._read(name + SCALE_SUFFIX, blocks[0][1], blocks)
        for rows, values in self._read(name, max(1, _BAND // height) * height, box):
            touched = slice(rows.start // height - blocks[0][0], -(-rows.stop // height) - blocks[0][0])
            yield rows, dequantise(values, scale[touched], self.block, (rows.start % height, left % width))

    def _read(self, name: str, rows: int, box: Box) -> Iterator[tuple[slice, np.ndarray]]:
        for band, values in self.tensors[name].bands(rows, box):
            self.bytes_read += values.nbytes
            yield band, values


def load_array(weights: Weights, leaf: Leaf, dtype: np.dtype, sharding: Sharding | None) -> jax.Array:
    """Read the slices of this process's devices, and return the array of `leaf`; on one device if `sharding` is None."""
    if sharding is None:
        ((_, values),) = read_slices(weights, leaf, dtype, [tuple((0, size) for size in leaf.shape)])
        return jax.device_put(values)
    shards: list[jax.Array] = []
    holders = held_slices(leaf.shape, sharding, sharding.addressable_devices)
    for ranges, values in read_slices(weights, leaf, dtype, holders):
        shards += [jax.device_put(values, device) for device in holders[ranges]]
        jax.block_until_ready(shards)  # An accelerator has its copy before more host memory is filled.
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards, dtype=dtype)


def held_slices(shape: tuple[int, ...], sharding: Sharding, devices: Collection[jax.Device]) -> dict[Ranges, list[jax.Device]]:
    """Return slice -> devices that hold it, for the distinct slices that `devices` hold of an array of `shape`."""
    holders: dict[Ranges, list[jax.Device]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        if device in devices:
            ranges = tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))
            holders.setdefault(ranges, []).append(device)
    return holders


def read_slices(
    weights: Weights, leaf: Leaf, dtype: np.dtype, slices: Collection[Ranges]
) -> Iterator[tuple[Ranges, np.ndarray]]:
    """Read `slices` of the array of `leaf` from its tensors, and yield each as (slice, values in `dtype`), in any order.

    With dtype uint8, FP8 tensors give their bits, without scales. Slices of the same tensors are filled together, and are in
    memory together. `slices` are those of any set of devices: one process's, or another's to count its bytes.
    """
    stacks: dict[Ranges, list[Ranges]] = {}
    for ranges in slices:
        stacks.setdefault(ranges[: len(leaf.stack)], []).append(ranges)
    for stack, members in stacks.items():
        yield from _filled(weights, leaf, dtype, stack, members)


def _filled(
    weights: Weights, leaf: Leaf, dtype: np.dtype, stack: Ranges, slices: Sequence[Ranges]
) -> list[tuple[Ranges, np.ndarray]]:
    """Read the tensors in the ranges `stack` of a leaf's stack axes; return (slice, values) for each of `slices`."""
    names = np.ravel(np.array(leaf.names, object).reshape(leaf.stack)[tuple(slice(*axis) for axis in stack)])
    arrays = [_aligned_empty(tuple(stop - start for start, stop in ranges), dtype) for ranges in slices]
    boxes = [_box(leaf, ranges[len(stack) :]) for ranges in slices]
    reads = _joined(sorted(zip(boxes, arrays, strict=True), key=lambda part: part[0]))
    for i, name in enumerate(names):
        for box, targets in reads.items():
            (top, _), (left, _) = box
            for rows, values in weights.bands(name, box, bits=dtype == np.uint8):
                values = values.reshape(rows.stop - rows.start, -1).astype(dtype, copy=False)
                for (first, last), array in targets:
                    part = array.reshape(len(names), -1)[i]
                    part = part.reshape(last - first, -1).T if leaf.is_matrix else part.reshape(-1, last - first)
                    # Converted above: twice as fast as converting while transposing.
                    part[rows.start - top : rows.stop - top] = values[:, first - left : last - left]
    return list(zip(slices, arrays, strict=True))


def _joined(parts: Sequence[tuple[Box, np.ndarray]]) -> dict[Box, list[tuple[tuple[int, int], np.ndarray]]]:
    """Join sorted boxes of the same rows and adjacent columns; return box to read -> [(range of columns, array to fill)]."""
    joined: dict[Box, list[tuple[tuple[int, int], np.ndarray]]] = {}
    last: Box | None = None
    for (rows, columns), array in parts:
        targets = [(columns, array)]
        if last is not None and last[0] == rows and last[1][1] == columns[0]:
            targets = joined.pop(last) + targets
            columns = last[1][0], columns[1]
        last = rows, columns
        joined[last] = targets
    return joined


def _box(leaf: Leaf, part: Ranges) -> Box:
    """Return the box (rows, columns) of a stored tensor of `leaf` that holds the slice `part` of its axes."""
    split = leaf.num_in if leaf.is_matrix else 1
    first, second = _flat(leaf, leaf.part[:split], part[:split]), _flat(leaf, leaf.part[split:], part[split:])
    return (second, first) if leaf.is_matrix else (first, second)


def _flat(leaf: Leaf, shape: tuple[int, ...], ranges: Ranges) -> tuple[int, int]:
    """Return `ranges` of axes as one range of the flattened axes; ValueError if they are not contiguous there."""
    first = last = 0
    for size, (start, stop) in zip(shape, ranges, strict=True):
        first, last = first * size + start, last * size + stop - 1
    check(
        last + 1 - first == math.prod(stop - start for start, stop in ranges),
        f"{'/'.join(leaf.path)} is sharded such that a device holds {ranges} of its axes {shape}, which is no range of rows or "
        "columns of the stored matrix; shard the heads, not their width",
    )
    return first, last + 1


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialised array at an address of 64 bytes alignment, which jax's CPU client takes over without a copy."""
    alignment, nbytes = 64, math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + nbytes].view(dtype).reshape(shape)


# ----------------------------------------------------------------------------------------------------------------------
# The MTP layers' copies of embedding and head, which are one array here.


def differing_copies(weights: Weights, config: ModelConfig, mesh: Mesh | None) -> list[str]:
    """Read and compare the MTP layers' copies of embedding and head; return "<copy> from <original>" for each that differs.

    Each process of `mesh` reads an equal share of the rows, so that each byte is read once, and all return the same list.
    """
    pairs = [(copy, original) for copy, original in copies(config).items() if copy in weights.tensors]
    share = (0, 1) if mesh is None else share_of_process(mesh, jax.process_index())
    differing = compare_copies(weights, pairs, share)
    if share[1] > 1 and pairs:
        assert mesh is not None
        differing = _anywhere(mesh, differing)
    return [f"{copy} from {original}" for (copy, original), differs in zip(pairs, differing, strict=True) if differs]


def share_of_process(mesh: Mesh, process: int) -> tuple[int, int]:
    """Return (index of `process` among the processes with devices in `mesh`, their number)."""
    processes = sorted({device.process_index for device in mesh.devices.flat})
    return processes.index(process), len(processes)


def compare_copies(weights: Weights, pairs: Sequence[tuple[str, str]], share: tuple[int, int]) -> list[bool]:
    """Read share i of n of the rows of each pair of tensors, `share` = (i, n); return, by pair, True if they differ there."""
    differing = []
    for pair in pairs:
        rows, columns = weights.tensors[pair[0]].matrix_shape
        box = (rows * share[0] // share[1], rows * (share[0] + 1) // share[1]), (0, columns)
        bands = zip(*(weights.bands(name, box) for name in pair), strict=True)
        values = ((copy.astype(np.float32), original.astype(np.float32)) for (_, copy), (_, original) in bands)
        differing.append(not all(np.array_equal(copy, original, equal_nan=True) for copy, original in values))
    return differing


def _anywhere(mesh: Mesh, flags: list[bool]) -> list[bool]:
    """Return, on all processes of `mesh` and for each flag, True if any of these processes has it set."""
    everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    ours = np.array([flags])
    theirs = jax.make_array_from_callback((mesh.size, len(flags)), everywhere, lambda _: ours)
    together = jax.jit(lambda x: x.any(axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))(theirs)
    return np.asarray(together.addressable_data(0)).tolist()
