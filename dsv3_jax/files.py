"""Files that are whole under their names, whatever ends the process or the machine: for all that a later start depends on."""

from __future__ import annotations

import contextlib
import io
import os

import numpy as np
from etils import epath


def write_whole(path: epath.Path, data: str | bytes) -> None:
    """Writes a file so that a reader sees what it held before or all of `data`, never a part."""
    if "://" in str(path):
        _write(path, data)  # An object in a store is replaced whole by itself.
        return
    part = part_of(path)
    try:
        _write(part, data)
        to_disk(part)  # Else a machine that goes down may leave the new name without the new bytes.
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            if part.is_file():  # Not a folder, which etils would remove as well.
                part.unlink()
        raise


def write_arrays(path: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz atomically."""
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]  # Its own keywords are no names of stacks.
    write_whole(path, file.getvalue())


def read_arrays(path: epath.Path) -> dict[str, np.ndarray]:
    """Read an .npz.

    Raises:
      ValueError: if the file is missing or damaged.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    try:
        with np.load(io.BytesIO(path.read_bytes())) as arrays:
            return dict(arrays)
    except Exception as error:  # What a damaged archive raises has no narrower type.
        raise ValueError(f"{path} cannot be read ({error}); remove it") from error


def part_of(path: epath.Path) -> epath.Path:
    """The file that `write_whole` fills beside `path`; one that is found was left by a process that was killed meanwhile."""
    return path.with_name(path.name + ".part")


def to_disk(path: epath.Path) -> None:
    """Returns when the bytes of a file are on the disk; an object in a store is there as soon as it is written."""
    if "://" not in str(path):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def folder_to_disk(folder: epath.Path) -> None:
    """`to_disk` for all that is in a folder, at any depth, and for its names."""
    if "://" in str(folder):
        return
    for path, _, names in folder.walk():
        for name in names:
            to_disk(path / name)
        names_to_disk(path)


def names_to_disk(folder: epath.Path) -> None:
    """The same for the names in a folder, as far as its file system can."""
    if "://" in str(folder):
        return
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _write(path: epath.Path, data: str | bytes) -> None:
    try:
        if isinstance(data, str):
            path.write_text(data)
        else:
            path.write_bytes(data)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # A write does not say of which file.
