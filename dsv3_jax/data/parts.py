"""Documents as token ids, in parts: the array of a corpus that fits into memory, or the shards of a prepared one.

Where documents end is kept beside the ids and not looked for among them, since a document may hold any id.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from dsv3_jax.data.npy_file import NpyFile


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
