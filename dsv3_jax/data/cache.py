"""Files that are made once and kept in `data.cache_dir`: the trained tokenizer and the tokenised text.

The name of such a file holds a digest of everything it was made from, so a change of the corpus or of the
tokenizer makes another file and never reads a stale one. A file appears whole or not at all; one that cannot
be read is made again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

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
