"""Held-out text: windows that score every byte of it once, and what general compressors make of the same bytes.

Bits per byte is the sum of the model's losses over all held-out tokens, in bits, over the number of UTF-8 bytes
they spell: it compares models whatever their tokenizer (the report's bits-per-byte rows, arXiv 2412.19437, table 3),
and with gzip and xz.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.checks import require
from dsv3_jax.data.rows import Row
from dsv3_jax.data.sources import Document
from dsv3_jax.data.tokenizer import Tokenizer, document_marks


class HeldoutBatch(NamedTuple):
    """Windows of held-out tokens, the token that follows each, and whether that one is scored."""

    tokens_BT: np.ndarray
    """int32."""
    targets_BT: np.ndarray
    """int32."""
    weights_BT: np.ndarray
    """float32; 1 where the target is text, 0 where it is a mark between documents, a prompt, or padding."""
    starts_BT: np.ndarray | None = None
    """int32; where in its window the document of each token begins, -1 for padding; None where attention crosses documents."""


class HeldoutWindows:
    """All batches of the held-out documents, each of the same shape.

    The documents stand one after the other between their marks, as in training, cut into windows that do not
    overlap; the first token of a window is the last target of the window before it.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: Tokenizer,
        model: ModelConfig,
        *,
        batch_size: int,
        sequence_length: int,
        across_documents: bool = True,
    ) -> None:
        """Tokenizes the documents.

        Args:
          across_documents: whether attention crosses documents, so that a batch need not say where they start.

        Raises:
          ValueError: if there is no document, if the tokenizer does not give a document back unchanged, so that
            its tokens would not stand for all of the bytes, or if it gives ids outside the model's vocabulary.
        """
        require(len(documents) > 0, "there is no held-out text to score")
        bos, eos = document_marks(model)
        opening = [] if bos is None else [bos]
        tokens, scored, opens = [eos], [False], []
        encoded = tokenizer.encode_documents([document.text for document in documents])
        require_reproduced(documents, encoded, tokenizer)
        for ids in encoded:
            opens.append(len(tokens))
            tokens += [*opening, *ids, eos]
            scored += [*[False] * len(opening), *[True] * len(ids), False]
        highest = max(tokens)
        require(
            highest < model.vocab_size,
            f"the tokenizer gives token id {highest}, outside the model's vocabulary of {model.vocab_size}; use the "
            "tokenizer.json that the model was trained with",
        )
        windows = -(-(len(tokens) - 1) // sequence_length)
        rows = Row(
            _windows(np.array(tokens[:-1], np.int32), windows, sequence_length),
            _windows(np.array(tokens[1:], np.int32), windows, sequence_length),
            _windows(np.array(scored[1:], np.float32), windows, sequence_length),
            _starts(opens, len(tokens) - 1, windows, sequence_length),
        )
        self._set(rows, sum(document.num_bytes for document in documents), batch_size, across_documents)

    @classmethod
    def of_rows(cls, rows: Sequence[Row], num_bytes: int, batch_size: int, *, across_documents: bool) -> HeldoutWindows:
        """Windows made elsewhere; their weights are 1 at the tokens that spell the `num_bytes` bytes, each once."""
        require(len(rows) > 0, "there is no held-out text to score")
        windows = cls.__new__(cls)
        windows._set(Row(*map(np.stack, zip(*rows, strict=True))), num_bytes, batch_size, across_documents)
        return windows

    def _set(self, rows: Row, num_bytes: int, batch_size: int, across_documents: bool) -> None:
        """Args: rows: all windows, [R, T]."""
        self.num_bytes = num_bytes
        self.num_tokens = int(np.count_nonzero(rows.weights_T))
        """Scored tokens: those that spell the bytes."""
        self._rows = rows
        self._batch_size = batch_size
        self._across_documents = across_documents

    def __len__(self) -> int:
        """Batches."""
        return -(-len(self._rows.tokens_T) // self._batch_size)

    def __iter__(self) -> Iterator[HeldoutBatch]:
        """All batches; each scored token is in exactly one."""
        return self._batches(np.arange(len(self._rows.tokens_T)))

    def sample(self, num_batches: int) -> Iterator[HeldoutBatch]:
        """At most `num_batches` batches of windows spread evenly over the text: always the same ones."""
        windows = len(self._rows.tokens_T)
        rows = min(num_batches * self._batch_size, windows)
        return self._batches(np.arange(rows) * windows // rows)

    def bits_per_byte(self, nats: float) -> float:
        """Bits per byte, from the summed loss of all scored tokens in nats."""
        return nats / math.log(2) / self.num_bytes

    def _batches(self, rows: np.ndarray) -> Iterator[HeldoutBatch]:
        for start in range(0, len(rows), self._batch_size):
            chosen = rows[start : start + self._batch_size]
            padding = ((0, self._batch_size - len(chosen)), (0, 0))
            tokens, targets, weights = (np.pad(array[chosen], padding) for array in self._rows[:3])
            starts = np.pad(self._rows.starts_T[chosen], padding, constant_values=-1)
            yield HeldoutBatch(tokens, targets, weights, None if self._across_documents else starts)


def require_reproduced(documents: Sequence[Document], encoded: Sequence[Sequence[int]], tokenizer: Tokenizer) -> None:
    """Raises ValueError, naming a document, unless its ids stand for all of its bytes."""
    for document, ids in zip(documents, encoded, strict=True):
        require(
            tokenizer.decode(ids) == document.text,
            f"the tokenizer does not reproduce {document.name!r}, so bits per byte would be wrong; use a byte-level one",
        )


def _windows(values: np.ndarray, windows: int, length: int) -> np.ndarray:
    """A flat array as [windows, length], zeros at its end."""
    return np.pad(values, (0, windows * length - len(values))).reshape(windows, length)


def _starts(opens: Sequence[int], count: int, windows: int, length: int) -> np.ndarray:
    """[windows, length]: where in its window the document of each of `count` tokens begins, -1 for what is left."""
    begins = np.zeros(windows * length, np.int64)
    opens_at = np.array([place for place in opens if place < count], np.int64)
    begins[opens_at] = opens_at
    firsts = np.repeat(np.arange(windows) * length, length)
    starts = np.maximum(np.maximum.accumulate(begins), firsts) - firsts
    starts[count:] = -1
    return starts.astype(np.int32).reshape(windows, length)


def compressor_bits_per_byte(documents: Sequence[Document]) -> dict[str, float | None]:
    """Bits per byte of `gzip -9` and `xz -9` on the documents put together: the bytes the model is scored on.

    Returns:
      {"gzip": ..., "xz": ...}; "xz" is None where this Python was built without lzma.
    """
    data = "".join(document.text for document in documents).encode("utf-8")
    sizes: dict[str, int | None] = {"gzip": len(gzip.compress(data, compresslevel=9)), "xz": None}
    try:
        import lzma  # an optional part of Python
    except ImportError:
        pass
    else:
        sizes["xz"] = len(lzma.compress(data, preset=9))
    return {name: size if size is None else 8 * size / len(data) for name, size in sizes.items()}
