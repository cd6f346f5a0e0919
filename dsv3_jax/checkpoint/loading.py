"""From the tensors of a checkpoint to arrays: whole on one device, or on each of many devices its slice.

A leaf of the tree stacks tensors of layers and experts, and a device's slice of it is some of those tensors and of each
of them a rectangle: a range of `out` is rows of the stored [out, in] matrix, a range of `in` is columns. A process reads
the rectangles its own devices hold. Each is read once, however many of them hold it, and rectangles that lie side by
side are read as one; nothing else is read. Only FP8 scales whose block is cut by the edge of a slice are read on both
sides of it. Host memory holds those slices of one array at a time that share tensors; on CPU it becomes the jax array.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from dsv3_jax.checkpoint.fp8 import FP8, SCALE_SUFFIX, dequantise
from dsv3_jax.checkpoint.names import Leaf, copies
from dsv3_jax.checkpoint.tensor_files import DTYPES, Box, StoredTensor
from dsv3_jax.config import ModelConfig

Ranges = tuple[tuple[int, int], ...]
"""A slice of an array: (first, one past the last) of each axis."""

# So many rows are read and transposed at once: they and their transpose stay in cache.
_BAND = 512


class Weights:
    """The values of a checkpoint's tensors, and how many bytes of them have been read."""

    def __init__(self, folder: epath.Path, tensors: dict[str, StoredTensor], block: tuple[int, int] | None) -> None:
        """As `find_tensors` takes and gives them."""
        self.folder, self.tensors, self.block = folder, tensors, block
        self.bytes_read = 0
        """Of tensor data, scales included; headers are not counted."""

    def box(self, name: str) -> Box:
        """All of a tensor."""
        rows, columns = self.tensors[name].matrix_shape
        return (0, rows), (0, columns)

    def is_fp8(self, name: str) -> bool:
        """Whether a tensor is FP8 blocks."""
        return DTYPES[self.tensors[name].dtype] == FP8

    def bits(self, name: str, box: Box) -> Iterator[tuple[slice, np.ndarray]]:
        """The bits of the values in a part of an FP8 tensor, some rows at a time: (which rows of it, uint8)."""
        assert self.is_fp8(name), name
        return ((rows, values.view(np.uint8)) for rows, values in self._read(name, _BAND, box))

    def bands(self, name: str, box: Box) -> Iterator[tuple[slice, np.ndarray]]:
        """The values in a part of a tensor, some rows at a time: (which rows of it, values); FP8 made float32."""
        if not self.is_fp8(name):
            yield from self._read(name, _BAND, box)
            return
        assert self.block is not None
        height, width = self.block
        (top, bottom), (left, right) = box
        blocks = (top // height, -(-bottom // height)), (left // width, -(-right // width))
        scale = self.tensors[name + SCALE_SUFFIX].read(blocks)
        self.bytes_read += scale.nbytes
        for rows, values in self._read(name, max(1, _BAND // height) * height, box):
            touched = slice(rows.start // height - blocks[0][0], -(-rows.stop // height) - blocks[0][0])
            yield rows, dequantise(values, scale[touched], self.block, (rows.start % height, left % width))

    def _read(self, name: str, rows: int, box: Box) -> Iterator[tuple[slice, np.ndarray]]:
        for band, values in self.tensors[name].bands(rows, box):
            self.bytes_read += values.nbytes
            yield band, values


def load_array(weights: Weights, leaf: Leaf, dtype: np.dtype, sharding: Sharding | None) -> jax.Array:
    """The array of `leaf`, of which this process fills what its devices hold; on one device if `sharding` is None."""
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
    """The distinct slices of an array of `shape` that `devices` hold, each with its holders."""
    holders: dict[Ranges, list[jax.Device]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        if device in devices:
            ranges = tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))
            holders.setdefault(ranges, []).append(device)
    return holders


def read_slices(
    weights: Weights, leaf: Leaf, dtype: np.dtype, slices: Collection[Ranges]
) -> Iterator[tuple[Ranges, np.ndarray]]:
    """Those slices of the array of `leaf`, read from its tensors: (slice, values in `dtype`), in an order of its own.

    Of FP8 tensors, uint8 gives the bits as the file has them, without their scales.
    Slices of the same tensors are filled together, and held in memory together. `slices` are what some set of devices
    holds: one process's, or, to count what each of many would read, any other.
    """
    depth = len(leaf.stack)
    stacks: dict[Ranges, list[_Slice]] = {}
    for ranges in slices:
        stacks.setdefault(ranges[:depth], []).append(_Slice(ranges, _box(leaf, ranges[depth:])))
    for stack, members in stacks.items():
        yield from _filled(weights, leaf, dtype, stack, members)


_Target = tuple[tuple[int, int], np.ndarray]
"""A range of the columns of a matrix, and the slice that holds them of each tensor."""


@dataclasses.dataclass
class _Slice:
    """A slice of an array, and the part of each of its tensors that it takes."""

    ranges: Ranges
    box: Box


def _filled(
    weights: Weights, leaf: Leaf, dtype: np.dtype, stack: Ranges, members: Sequence[_Slice]
) -> list[tuple[Ranges, np.ndarray]]:
    """The slices that take the tensors at the indices `stack`."""
    names = np.ravel(np.array(leaf.names, object).reshape(leaf.stack)[tuple(slice(*axis) for axis in stack)])
    arrays = [_aligned_empty(tuple(stop - start for start, stop in member.ranges), dtype) for member in members]
    reads = _joined(members, arrays)
    for i, name in enumerate(names):
        for box, targets in reads.items():
            (top, _), (left, _) = box
            for rows, values in weights.bits(name, box) if dtype == np.uint8 else weights.bands(name, box):
                values = values.reshape(rows.stop - rows.start, -1).astype(dtype, copy=False)
                for (first, last), array in targets:
                    part = array.reshape(len(names), -1)[i]
                    part = part.reshape(last - first, -1).T if leaf.is_matrix else part.reshape(-1, last - first)
                    # Converted above: twice as fast as converting while transposing.
                    part[rows.start - top : rows.stop - top] = values[:, first - left : last - left]
    return [(member.ranges, array) for member, array in zip(members, arrays, strict=True)]


def _joined(members: Sequence[_Slice], arrays: Sequence[np.ndarray]) -> dict[Box, list[_Target]]:
    """What to read of each tensor: boxes, those side by side made one, and which of their columns go to which array."""
    joined: dict[Box, list[_Target]] = {}
    last: Box | None = None
    for member, array in sorted(zip(members, arrays, strict=True), key=lambda pair: pair[0].box):
        rows, columns = member.box
        targets = [(columns, array)]
        if last is not None and last[0] == rows and last[1][1] == columns[0]:
            targets = joined.pop(last) + targets
            columns = last[1][0], columns[1]
        last = rows, columns
        joined[last] = targets
    return joined


def _box(leaf: Leaf, part: Ranges) -> Box:
    """Where a tensor of `leaf` holds a slice of its part of the array."""
    if not leaf.is_matrix:
        return _flat(leaf, leaf.part[:1], part[:1]), _flat(leaf, leaf.part[1:], part[1:])
    return _flat(leaf, leaf.part[leaf.num_in :], part[leaf.num_in :]), _flat(
        leaf, leaf.part[: leaf.num_in], part[: leaf.num_in]
    )


def _flat(leaf: Leaf, shape: tuple[int, ...], ranges: Ranges) -> tuple[int, int]:
    """The range that `ranges` are once the axes are flattened."""
    first = last = 0
    for size, (start, stop) in zip(shape, ranges, strict=True):
        first, last = first * size + start, last * size + stop - 1
    if last + 1 - first != math.prod(stop - start for start, stop in ranges):
        raise ValueError(
            f"{'/'.join(leaf.path)} is sharded such that a device holds {ranges} of its axes {shape}, which is no range of "
            "rows or columns of the stored matrix; shard the heads, not their width"
        )
    return first, last + 1


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory at an address that jax's CPU client takes over without a copy."""
    alignment, nbytes = 64, math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + nbytes].view(dtype).reshape(shape)


# The copies of embedding and head in the MTP layers: here they are one array.


def differing_copies(weights: Weights, config: ModelConfig, mesh: Mesh | None) -> list[str]:
    """The MTP layers' copies of embedding and head that are not the original, as every process of `mesh` knows them.

    Each of its processes compares an equal share of their rows, so that all of them together read every byte once.
    """
    pairs = [(copy, original) for copy, original in copies(config).items() if copy in weights.tensors]
    share = (0, 1) if mesh is None else share_of_process(mesh, jax.process_index())
    differing = compare_copies(weights, pairs, share)
    if share[1] > 1 and pairs:
        assert mesh is not None
        differing = _anywhere(mesh, differing)
    return [f"{copy} from {original}" for (copy, original), differs in zip(pairs, differing, strict=True) if differs]


def share_of_process(mesh: Mesh, process: int) -> tuple[int, int]:
    """(which of the mesh's processes it is, how many they are)."""
    processes = sorted({device.process_index for device in mesh.devices.flat})
    return processes.index(process), len(processes)


def compare_copies(weights: Weights, pairs: Sequence[tuple[str, str]], share: tuple[int, int]) -> list[bool]:
    """Whether each pair of tensors differs in part `share[0]` of `share[1]` of their rows."""
    differing = []
    for copy, original in pairs:
        (_, rows), columns = weights.box(copy)
        box = (rows * share[0] // share[1], rows * (share[0] + 1) // share[1]), columns
        bands = zip(weights.bands(copy, box), weights.bands(original, box), strict=True)
        differing.append(not all(_same_values(ours, theirs) for (_, ours), (_, theirs) in bands))
    return differing


def _same_values(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.astype(np.float32), b.astype(np.float32), equal_nan=True)


def _anywhere(mesh: Mesh, flags: list[bool]) -> list[bool]:
    """Which flags are set in any process of `mesh`."""
    everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    ours = np.array([flags])
    theirs = jax.make_array_from_callback((mesh.size, len(flags)), everywhere, lambda _: ours)
    together = jax.jit(lambda x: x.any(axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))(theirs)
    return np.asarray(together.addressable_data(0)).tolist()
