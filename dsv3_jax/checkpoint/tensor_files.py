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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""The tensor types a checkpoint may hold, by their name in a header."""
NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPES.items()}

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

    def bands(self, rows: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """Its data, `rows` rows of the first axis at a time: (which rows, array in the dtype of the file)."""
        assert self.shape, "a scalar has no rows"
        dtype, row_shape = DTYPES[self.dtype], self.shape[1:]
        row_values = math.prod(row_shape)
        if rows is None:
            rows = max(1, _BAND_BYTES // max(1, row_values * dtype.itemsize))
        with self.file.open("rb") as data:
            data.seek(self.offset)
            for start in range(0, self.shape[0], rows):
                stop = min(start + rows, self.shape[0])
                content = data.read((stop - start) * row_values * dtype.itemsize)
                values = np.frombuffer(content, dtype)  # Raises if the file has shrunk since its header was read.
                yield slice(start, stop), values.reshape(stop - start, *row_shape)

    def read(self) -> np.ndarray:
        """All of its data, in the dtype of the file."""
        return np.concatenate([band for _, band in self.bands()])


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


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """Tensors to be written next to each other, made only when their turn comes."""

    tensors: tuple[tuple[str, np.dtype, tuple[int, ...]], ...]
    """(name, dtype, shape) of each."""
    make: Callable[[], tuple[np.ndarray, ...]]
    """Their data, in the same order."""

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.tensors)


def write_file(file: epath.Path, content: Sequence[Outgoing]) -> None:
    """Writes a safetensors file that torch programs accept, holding one `Outgoing` in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in itertools.chain.from_iterable(outgoing.tensors for outgoing in content):
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES_OF_DTYPES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # The format wants the data aligned.
    with file.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for outgoing in content:
            for (name, dtype, shape), array in zip(outgoing.tensors, outgoing.make(), strict=True):
                assert (array.dtype, array.shape) == (dtype, shape), (name, array.dtype, array.shape)
                out.write(np.ascontiguousarray(array).view(np.uint8).data)


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
