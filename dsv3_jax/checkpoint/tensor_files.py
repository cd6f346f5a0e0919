"""The safetensors format, read and written a tensor at a time.

A file is eight bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, and the bytes of the tensors.
Headers alone show whether a checkpoint is complete; no byte of it is ever executed. Our own code, because the safetensors
library neither opens `gs://` files nor reads and writes parts of a tensor: it maps files into memory, where pages that were
read stay resident, and it writes a file from tensors that are all in memory.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from etils import epath

from dsv3_jax.config.checks import check
from dsv3_jax.files import to_disk

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""The dtypes that can be read and written, by their names in a header."""
NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPES.items()}

Box = tuple[tuple[int, int], tuple[int, int]]
"""A part of a matrix: (first, one past the last) of its rows, and of its columns."""

_LARGEST_HEADER = 100 * 2**20


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """File, dtype, shape and position of a tensor, as the header of the safetensors file states them."""

    file: epath.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Position of its first byte in the file."""

    @property
    def is_fp8(self) -> bool:
        """True if the dtype is FP8 (E4M3)."""
        return self.dtype == "F8_E4M3"

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the tensor as a matrix, with all axes but the first as columns."""
        return self.shape[0], math.prod(self.shape[1:])

    def bands(self, rows: int, box: Box) -> Iterator[tuple[slice, np.ndarray]]:
        """Read the data in `box` some rows at a time, and yield (slice of rows, array in the dtype of the file).

        A band as wide as the tensor is one read; of a narrower one, each row is a read of its own. No byte outside the box is
        requested, and reads go forward, so that the read-ahead of a remote file system can merge them.

        Args:
          rows: most rows of a band; bands end at multiples of it.
          box: part of the tensor as a matrix.
        """
        assert self.shape, "a scalar has no rows"
        (first, last), (left, right) = box
        dtype, width = DTYPES[self.dtype], self.matrix_shape[1]
        row_bytes, wanted_bytes = width * dtype.itemsize, (right - left) * dtype.itemsize
        row_shape = self.shape[1:] if right - left == width else (right - left,)
        with self.file.open("rb") as opened:
            data = getattr(opened, "raw", opened)  # The buffer of a local file would read more than is requested.
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


def _read_at(data: BinaryIO, offset: int, size: int) -> bytes:
    """Seek to `offset` and return the next `size` bytes; fewer only if the file ends before."""
    data.seek(offset)
    content = data.read(size)
    while len(content) < size and (more := data.read(size - len(content))):
        content += more
    return content


def read_header(file: epath.Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file, and return its tensors by name; no tensor data are read.

    Raises:
      ValueError: with the reason, if it is no safetensors file, is truncated, or its header is malformed.
    """
    size = file.stat().length
    with file.open("rb") as content:
        start = content.read(8)
        length = int.from_bytes(start, "little")
        is_complete = len(start) == 8 and length <= min(size - 8, _LARGEST_HEADER)
        check(is_complete, f"it is truncated or not a safetensors file ({size} bytes, header of {length})")
        header = content.read(length)
    try:
        entries = json.loads(header, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not JSON ({error})") from None
    check(isinstance(entries, dict), "its header is not a JSON object")
    entries.pop("__metadata__", None)

    tensors = {name: _stored_tensor(file, 8 + length, name, entry) for name, entry in entries.items()}
    ranges = sorted((*entry["data_offsets"], name) for name, entry in entries.items())
    for (_, end, name), (begin, _, following) in itertools.pairwise(ranges):
        check(begin == end, f"the data of {name!r} and {following!r} overlap or leave a gap")
    expected = 8 + length + (ranges[-1][1] if ranges else 0)
    check(
        size == expected and (not ranges or ranges[0][0] == 0),
        f"it has {size} bytes where its header describes {expected}; it is truncated or damaged",
    )
    return tensors


def _stored_tensor(file: epath.Path, data_start: int, name: str, entry: Any) -> StoredTensor:
    """Return the tensor that `entry` of a header describes; `data_start` is where offset 0 lies. ValueError if malformed."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        is_well_formed = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        is_well_formed = False
    check(is_well_formed and begin <= end, f"its header describes {name!r} as {entry!r}, not as dtype, shape and data_offsets")
    if dtype in DTYPES:
        fits = end - begin == math.prod(shape) * DTYPES[dtype].itemsize
        check(fits, f"its header gives {name!r} {end - begin} bytes, which is not {dtype} of {list(shape)}")
    return StoredTensor(file, dtype, shape, data_start + begin)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the dict of a JSON object's `pairs`; raise ValueError if a key comes twice."""
    found, counts = dict(pairs), collections.Counter(name for name, _ in pairs)
    check(len(found) == len(pairs), f"{counts.most_common(1)[0][0]!r} comes twice in it" if counts else "")
    return found


Described = tuple[str, np.dtype, tuple[int, ...]]
"""(name, dtype, shape) of a tensor to be written."""


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """One or two tensors (a weight and its scales) to write in turn; data are fetched and encoded only then."""

    tensors: tuple[Described, ...]
    fetch: Callable[[], Any]
    """Brings the data they are made of to this process; all processes call it if these are sharded over them."""
    encode: Callable[[Any], tuple[np.ndarray, ...]]
    """Converts the result of `fetch` to one array for each of `tensors`, in their order."""

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.tensors)


def write_file(file: epath.Path, tensors: Iterable[Described], arrays: Iterable[np.ndarray]) -> None:
    """Write `tensors`, with data from `arrays` one at a time, as a safetensors file for torch, and sync it to the disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, tensors = 0, list(tensors)
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES_OF_DTYPES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # The format requires aligned data.
    with file.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for (name, dtype, shape), array in zip(tensors, arrays, strict=True):
            assert (array.dtype, array.shape) == (dtype, shape), (name, array.dtype, array.shape)
            out.write(np.ascontiguousarray(array).view(np.uint8).data)
    to_disk(file)  # By the process that wrote it: on a shared file system another cannot.


def shards(content: Iterable[Outgoing], max_bytes: int) -> list[list[Outgoing]]:
    """Return `content` split, in order, into a list for each file of at most `max_bytes`; a larger entry is a file alone."""
    cut: list[list[Outgoing]] = []
    filled = 0
    for outgoing in content:
        if not cut or filled + outgoing.nbytes > max_bytes:
            cut.append([])
            filled = 0
        cut[-1].append(outgoing)
        filled += outgoing.nbytes
    return cut
