"""Atomic file writes that survive a crash or a power loss, for all files that a later start depends on."""

from __future__ import annotations

import contextlib
import io
import os

import numpy as np
from etils import epath

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "tokenizer.model", "tiktoken.model", "tokenization_*.py"),
    "generation_config.json",
)
"""Files of a checkpoint that travel with its tokenizer, through runs and exports."""


def tokenizer_files(folder: epath.Path) -> list[epath.Path]:
    """Return those of `TOKENIZER_FILES` that a folder holds."""
    return [file for pattern in TOKENIZER_FILES for file in sorted(folder.glob(pattern))]


def write_whole(path: epath.Path, data: str | bytes) -> None:
    """Write a file atomically and sync it: a reader sees its old content or all of `data`, even after an error or a crash."""
    if "://" in str(path):
        _write(path, data)  # A store replaces objects atomically.
        return
    part = part_of(path)
    try:
        _write(part, data)
        to_disk(part)  # Else a power loss could leave the new name without the new bytes.
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            if part.is_file():  # Not a folder, which etils would remove as well.
                part.unlink()
        raise


def write_arrays(path: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz file of `arrays` by name, atomically, as `write_whole`."""
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]  # No array is named as one of its own keywords.
    write_whole(path, file.getvalue())


def read_arrays(path: epath.Path) -> dict[str, np.ndarray]:
    """Return all arrays of an .npz file by name, in memory.

    Raises:
      ValueError: if the file is missing or damaged.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; name an .npz file that does")
    try:
        with np.load(io.BytesIO(path.read_bytes())) as arrays:
            return dict(arrays)
    except Exception as error:  # The errors of a damaged archive have no narrower type.
        raise ValueError(f"{path} cannot be read ({error}); remove it") from error


def part_of(path: epath.Path) -> epath.Path:
    """Return `path` with `.part` added: the temporary file that `write_whole` fills; a killed process may leave one."""
    return path.with_name(path.name + ".part")


def to_disk(path: epath.Path) -> None:
    """Flush a file to the disk (fsync); do nothing for a `://` path, as objects in a store are durable once written."""
    if "://" not in str(path):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def folder_to_disk(folder: epath.Path) -> None:
    """Flush all files and names in a folder and its subfolders to the disk (fsync); do nothing for a `://` path."""
    if "://" in str(folder):
        return
    for path, _, names in folder.walk():
        for name in names:
            to_disk(path / name)
        names_to_disk(path)


def names_to_disk(folder: epath.Path) -> None:
    """Flush the names in a folder, not its files, to the disk; do nothing if its file system cannot, or for a `://` path."""
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
        raise OSError(error.errno, error.strerror, str(path)) from error  # The error of a write lacks the file name.
