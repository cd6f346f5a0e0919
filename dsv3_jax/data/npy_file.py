"""An array on disk, read piece by piece.

With ordinary reads and not by a mapping: of a mapped file that is cut short while a run goes on, the next access ends the
process with SIGBUS, and a file that is replaced goes on unnoticed. Here both are errors that name the file. The system's page
cache keeps what is read often, as it would for a mapping.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dsv3_jax.config.checks import require

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
        require(mapped.ndim == 1, f"{path} holds {mapped.dtype}{list(mapped.shape)}, no flat array; make it again")
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
        require(stamp(self._path) == self._stamp, f"{self._path} was changed while the run goes on; {_REMEDY}")
        try:
            read = np.fromfile(self._path, self.dtype, max(stop - start, 0), offset=self._offset + start * self.dtype.itemsize)
        except OSError as error:
            raise ValueError(f"{self._path} cannot be read ({error}); {_REMEDY}") from error
        require(read.size == max(stop - start, 0), f"{self._path} was cut short while the run goes on; {_REMEDY}")
        return read


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of a file, by which a change shows; ValueError if it is missing."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ValueError(f"{path} is missing ({error.strerror}); {_REMEDY}") from error
    return stat.st_size, stat.st_mtime_ns
