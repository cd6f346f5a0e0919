"""Token files: arrays read slice by slice, the parts of a tokenised corpus, atomic writes, and files cached under a digest.

Arrays are read with ordinary reads, not memory-mapped. If a mapped file is cut short during a run, the next access ends the
process with SIGBUS, and a file that is replaced goes unnoticed; here both are errors that name the file. The system's page
cache keeps data that is read often, as it would for a mapping.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from etils import epath

from dsv3_jax.config.checks import check

Made = TypeVar("Made")
_REMEDY = "put it back, or make it again, and use --resume"
_log = logging.getLogger(__name__)


class NpyFile:
    """A one-dimensional array in an .npy file; `file[start:stop]` reads a slice."""

    def __init__(self, path: Path) -> None:
        """Raises: ValueError, naming the file, if it is missing, damaged, or not a one-dimensional array."""
        self._path = path
        self._stamp = stamp(path)
        try:
            # The short-lived mapping compares the length of the file with its header.
            mapped = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is missing or damaged ({error}); copy it there, or make it again") from error
        check(mapped.ndim == 1, f"{path} holds {mapped.dtype}{list(mapped.shape)}, no flat array; make it again")
        self.dtype: np.dtype = mapped.dtype
        self.size: int = mapped.size
        self._offset = mapped.offset

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return the elements start..stop-1; ValueError, naming the file, if it is gone, cut short or replaced."""
        start, stop, step = part.indices(self.size)
        assert step == 1
        count = max(stop - start, 0)
        check(stamp(self._path) == self._stamp, f"{self._path} was changed while the run goes on; {_REMEDY}")
        try:
            read = np.fromfile(self._path, self.dtype, count, offset=self._offset + start * self.dtype.itemsize)
        except OSError as error:
            raise ValueError(f"{self._path} cannot be read ({error}); {_REMEDY}") from error
        check(read.size == count, f"{self._path} was cut short while the run goes on; {_REMEDY}")
        return read


class Part:
    """Tokenised documents one after the other, with their marks: an array, or two files of a prepared folder."""

    def __init__(self, tokens: np.ndarray | NpyFile, ends: np.ndarray | NpyFile) -> None:
        """Args: tokens: ids [N]; ends: position after each document, int64 [documents], ascending to N."""
        self._tokens = tokens
        self._ends = ends
        self.num_tokens = tokens.size

    @classmethod
    def closed_by(cls, eos: int, tokens: np.ndarray | NpyFile) -> Part:
        """Return the part whose documents end with `eos` and do not contain it otherwise."""
        ends = np.flatnonzero(tokens[:] == eos) + 1
        assert ends[-1] == tokens.size
        return cls(tokens, ends)

    def ends(self) -> np.ndarray:
        """Return the position after each document, int64 [documents]."""
        return self._ends[:]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the ids start..stop-1; ValueError, naming the file, if it has changed."""
        return self._tokens[start:stop]


def stamp(path: Path) -> tuple[int, int]:
    """Return size and modification time of a file, to detect changes; ValueError if it is missing."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ValueError(f"{path} is missing ({error.strerror}); {_REMEDY}") from error
    return stat.st_size, stat.st_mtime_ns


def read_json(path: Path | epath.Path, remedy: str) -> dict[str, Any]:
    """Return the JSON object in a file; ValueError, ending with `remedy`, if there is none."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or is not JSON ({error}); {remedy}") from error
    check(isinstance(content, dict), f"{path} holds no JSON object; {remedy}")
    return content


# ----------------------------------------------------------------------------------------------------------------------
# Atomic writes, and files that are made once and kept in `data.cache_dir`.


@contextlib.contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; if the block succeeds, sync that file and rename it to `path`, else remove it."""
    draft = path.with_name(f".draft-{secrets.token_hex(8)}-{path.name}")
    try:
        yield draft
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def digest(*parts: str | bytes) -> str:
    """Return a hexadecimal digest of `parts`, each with its length, so that ("ab", "c") differs from ("a", "bc")."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def load_or_make(path: Path, load: Callable[[Path], Made], write: Callable[[Path], None]) -> Made:
    """Return `load(path)`; if the file is missing or `load` raises ValueError, call `write` first.

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
        with draft_of(path) as draft:
            write(draft)
    except OSError as error:
        raise ValueError(f"data.cache_dir {str(path.parent)!r} cannot be written ({error}); name a folder that can") from error
    return load(path)


def cached_tokens(
    path: Path,
    dtype: np.dtype,
    count: int,
    is_last: Callable[[np.ndarray], np.ndarray],
    make: Callable[[], Iterable[np.ndarray]],
) -> NpyFile:
    """Return the joined arrays of `count` documents, kept at `path`; make them if they are missing or damaged.

    Args:
      path: an .npy file.
      dtype: of the array.
      count: number of documents.
      is_last: marks the last element of each document.
      make: yields the array of each document.
    """

    def load(path: Path) -> NpyFile:
        tokens = NpyFile(path)
        check(tokens.dtype == dtype, f"holds {tokens.dtype}, not {dtype}")
        ends = np.flatnonzero(is_last(tokens[:]))
        check(ends.size == count and ends[-1] == tokens.size - 1, "documents are missing")
        return tokens

    return load_or_make(path, load, lambda draft: np.save(draft, np.concatenate(list(make()))))
