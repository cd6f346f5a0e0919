"""The safetensors format, read and written a tensor at a time.

A file is eight bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, and the bytes of the
tensors. Headers alone say whether a checkpoint is whole; no byte of it is ever executed. The data is read rather than
memory-mapped, so that what is resident is what is being converted.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from etils import epath

from dsv3_jax.files import to_disk

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""The tensor types a checkpoint may hold, by their name in a header."""
NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPES.items()}

Box = tuple[tuple[int, int], tuple[int, int]]
"""(first, one past the last) of the rows, and of the columns, of a part of a matrix."""

_LARGEST_HEADER = 100 * 2**20
_BAND_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor as a header describes it."""

    file: epath.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the tensor as a matrix: its first axis, and the others in one."""
        return self.shape[0], math.prod(self.shape[1:])

    def bands(self, rows: int | None = None, box: Box | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """The data in `box`, some rows at a time: (which rows of the tensor, array in the dtype of the file).

        A box as wide as the tensor takes one read a band. Of a narrower one each row is a read of its own, from the
        first column wanted to the last. Either way not a byte beside the box is asked for, and reads go forward, so
        that a remote file system's read-ahead can merge them.

        Args:
          rows: bands end at its multiples.
          box: part of the tensor as a matrix; all of it by default.
        """
        assert self.shape, "a scalar has no rows"
        (first, last), (left, right) = box or ((0, self.shape[0]), (0, self.matrix_shape[1]))
        dtype, width = DTYPES[self.dtype], self.matrix_shape[1]
        row_bytes, wanted_bytes = width * dtype.itemsize, (right - left) * dtype.itemsize
        row_shape = self.shape[1:] if right - left == width else (right - left,)
        if rows is None:
            rows = max(1, _BAND_BYTES // max(1, wanted_bytes))
        with self.file.open("rb") as opened:
            data = getattr(opened, "raw", opened)  # The buffer of a local file would read more than is asked for.
            while first < last:
                stop = min((first // rows + 1) * rows, last)
                start = self.offset + first * row_bytes
                if wanted_bytes == row_bytes:
                    content = _read_at(data, start, (stop - first) * row_bytes)
                else:
                    starts = range(start + left * dtype.itemsize, start + (stop - first) * row_bytes, row_bytes)
                    content = b"".join([_read_at(data, row_start, wanted_bytes) for row_start in starts])
                values = np.frombuffer(content, dtype)  # Reshaping raises if the file has shrunk since its header was read.
                yield slice(first, stop), values.reshape(stop - first, *row_shape)
                first = stop

    def read(self, box: Box | None = None) -> np.ndarray:
        """All of that, in the dtype of the file."""
        return np.concatenate([band for _, band in self.bands(box=box)])


def _read_at(data: BinaryIO, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` on, fewer only if the file ends."""
    data.seek(offset)
    content = data.read(size)
    while len(content) < size and (more := data.read(size - len(content))):
        content += more
    return content


def read_header(file: epath.Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file.

    Raises:
      ValueError: saying what is wrong with the file, if it is not one, is cut short, or contradicts itself.
    """
    size = file.stat().length
    with file.open("rb") as content:
        start = content.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ValueError("it is truncated or not a safetensors file")
        header = content.read(length)
    try:
        entries = json.loads(header, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not JSON ({error})") from None
    if not isinstance(entries, dict):
        raise ValueError("its header is not a JSON object")
    entries.pop("__metadata__", None)

    tensors, ranges = {}, []
    for name, entry in entries.items():
        tensors[name], data_range = _stored_tensor(file, 8 + length, name, entry)
        ranges.append(data_range)
    ranges.sort()
    for (_, end, name), (begin, _, following) in itertools.pairwise(ranges):
        if begin != end:
            raise ValueError(f"the data of {name!r} and {following!r} overlap or leave a gap")
    expected = 8 + length + (ranges[-1][1] if ranges else 0)
    if (ranges and ranges[0][0] != 0) or size != expected:
        raise ValueError(f"it has {size} bytes where its header describes {expected}; it is truncated or damaged")
    return tensors


def _stored_tensor(file: epath.Path, data_start: int, name: str, entry: Any) -> tuple[StoredTensor, tuple[int, int, str]]:
    """The tensor of a header's entry, and (first byte, byte after the last, name) within the data."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        well_formed = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        well_formed = False
    if not well_formed or begin > end:
        raise ValueError(f"its header describes {name!r} as {entry!r}")
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"its header gives {name!r} {end - begin} bytes, which is not {dtype} of {list(shape)}")
    return StoredTensor(file, dtype, shape, data_start + begin), (begin, end, name)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused if a key comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice")
    return found


Described = tuple[str, np.dtype, tuple[int, ...]]
"""(name, dtype, shape) of a tensor to be written."""


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """Tensors to be written next to each other, made only when their turn comes."""

    tensors: tuple[Described, ...]
    fetch: Callable[[], Any]
    """Brings what they are made from to this process; all processes call it where it has to travel."""
    encode: Callable[[Any], tuple[np.ndarray, ...]]
    """Makes their data of what was fetched, in the order of `tensors`."""

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.tensors)


def write_file(file: epath.Path, tensors: Iterable[Described], arrays: Iterable[np.ndarray]) -> None:
    """Writes a safetensors file that torch programs accept, to the disk; takes from `arrays` one tensor's data at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, tensors = 0, list(tensors)
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES_OF_DTYPES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # The format wants the data aligned.
    with file.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for (name, dtype, shape), array in zip(tensors, arrays, strict=True):
            assert (array.dtype, array.shape) == (dtype, shape), (name, array.dtype, array.shape)
            out.write(np.ascontiguousarray(array).view(np.uint8).data)
    to_disk(file)  # By the process that wrote it: on a shared file system another cannot.


def shards(content: Iterable[Outgoing], max_bytes: int) -> list[list[Outgoing]]:
    """`content` in order, cut so that no file exceeds `max_bytes` unless one entry alone does."""
    cut: list[list[Outgoing]] = [[]]
    filled = 0
    for outgoing in content:
        if cut[-1] and filled + outgoing.nbytes > max_bytes:
            cut.append([])
            filled = 0
        cut[-1].append(outgoing)
        filled += outgoing.nbytes
    return cut
