"""An array on disk, read piece by piece.

With ordinary reads and not by a mapping: of a mapped file that is cut short while a run goes on, the next access ends the
process with SIGBUS, and a file that is replaced goes on unnoticed. Here both are errors that name the file. The system's page
cache keeps what is read often, as it would for a mapping.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from dsv3_jax.config.checks import check

_REMEDY = "put it back, or make it again, and use --resume"


class NpyFile:
    """A one-dimensional array in an .npy file; `file[start:stop]` reads that part."""

    def __init__(self, path: Path) -> None:
        """Raises: ValueError, naming the file, if it is missing, damaged, or holds another kind of array."""
        self._path = path
        self._stamp = stamp(path)
        try:
            # Maps the file for a moment, which compares its length with its header.
            mapped = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is missing or damaged ({error}); copy it there, or make it again") from error
        check(mapped.ndim == 1, f"{path} holds {mapped.dtype}{list(mapped.shape)}, no flat array; make it again")
        self.dtype: np.dtype = mapped.dtype
        self.size: int = mapped.size
        self._offset = mapped.offset

    def __getitem__(self, part: slice) -> np.ndarray:
        """The elements start..stop-1.

        Raises:
          ValueError: naming the file, if it is gone, cut short or another than when it was opened.
        """
        start, stop, step = part.indices(self.size)
        assert step == 1
        check(stamp(self._path) == self._stamp, f"{self._path} was changed while the run goes on; {_REMEDY}")
        try:
            read = np.fromfile(self._path, self.dtype, max(stop - start, 0), offset=self._offset + start * self.dtype.itemsize)
        except OSError as error:
            raise ValueError(f"{self._path} cannot be read ({error}); {_REMEDY}") from error
        check(read.size == max(stop - start, 0), f"{self._path} was cut short while the run goes on; {_REMEDY}")
        return read


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of a file, by which a change shows; ValueError if it is missing."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ValueError(f"{path} is missing ({error.strerror}); {_REMEDY}") from error
    return stat.st_size, stat.st_mtime_ns


# ----------------------------------------------------------------------------------------------------------------------
# Documents as token ids, in parts: the array of a corpus that fits into memory, or the shards of a prepared one.


class Part(Protocol):
    """Documents one after the other, marks included."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""

    def ends(self) -> np.ndarray:
        """Where each document ends, int64, growing; the last is `num_tokens`."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids start..stop-1; ValueError, naming the file, if they are no longer there."""


class ArrayPart:
    """A part in memory, or in one file."""

    def __init__(self, tokens: np.ndarray | NpyFile, ends: np.ndarray) -> None:
        """Args: tokens: ids [N]; ends: int64 [documents], the last of them N."""
        assert ends[-1] == tokens.size
        self._tokens = tokens
        self._ends = ends

    @classmethod
    def closed_by(cls, eos: int, tokens: np.ndarray | NpyFile) -> ArrayPart:
        """Documents that `eos` ends, and that hold no other."""
        return cls(tokens, np.flatnonzero(tokens[:] == eos) + 1)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return self._tokens.size

    def ends(self) -> np.ndarray:
        """Where each document ends."""
        return self._ends

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids start..stop-1."""
        return self._tokens[start:stop]


# ----------------------------------------------------------------------------------------------------------------------
# Files that are made once and kept in `data.cache_dir`: the trained tokenizer and the tokenised text.


Made = TypeVar("Made")
_log = logging.getLogger(__name__)


def digest(*parts: str | bytes) -> str:
    """Hexadecimal digest of `parts`, each taken with its length so that two lists never run together."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def load_or_make(path: Path, load: Callable[[Path], Made], write: Callable[[Path], None]) -> Made:
    """Reads `path` with `load`; where it is missing, or `load` raises ValueError, it is written by `write` first.

    Raises:
      ValueError: if the cache folder cannot be written.
    """
    if path.exists():
        try:
            return load(path)
        except ValueError as error:
            _log.warning("making %s again: %s", path, error)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A draft in the same folder: os.replace is atomic only within one file system.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".draft-") as folder:
            draft = Path(folder) / path.name
            write(draft)
            os.replace(draft, path)
    except OSError as error:
        raise ValueError(f"data.cache_dir {str(path.parent)!r} cannot be written ({error}); name a folder that can") from error
    return load(path)
