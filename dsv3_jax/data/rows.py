"""Rows of a batch, each a pure function of (seed, number): packed documents, and mixtures of sources.

The documents of an epoch follow one another in an order drawn from (seed, epoch), each between its marks, and epoch follows
epoch: one endless stream of tokens. It is cut into rows of `sequence_length` targets, so that every token of every epoch is a
target exactly once and nothing is padded (the report packs documents without masking attention between them, arXiv
2412.19437, section 4.1). Neighbouring rows come from the same document, so rows are shuffled too, within blocks of one epoch
or of a large part of a long one. A row is computed from its number alone: a run resumes at any step, on any number of
processes, without reading the rows before it.

A corpus of many parts is shuffled part by part, the parts in an order of their own, so that neither its ids nor the orders
of its documents have to fit into memory at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np

from dsv3_jax.config.checks import check
from dsv3_jax.data.storage import Part

# Rows, and tokens, of the largest shuffled block. It reads from about 130 parts of 32M tokens, whose orders of documents are
# kept; for a corpus of fewer parts those of four epochs are kept.
_MOST_ROWS = 2**20
_MOST_TOKENS = 2**32
_MOST_ORDERS = 160
# Rows of the smallest block of a mixture.
_LEAST_BLOCK = 1024


class Row(NamedTuple):
    """One row of a batch: T tokens, their targets, loss weights, and where their documents start."""

    tokens_T: np.ndarray
    """int32."""
    targets_T: np.ndarray
    """int32; targets_T[t] follows tokens_T[t]."""
    loss_weight_T: np.ndarray
    """float32; weight of each target in the loss: 1, or 0 if it is excluded."""
    segment_starts_T: np.ndarray
    """int32; position in the row at which the document of each token begins, -1 for padding."""


class Rows(Protocol):
    """All rows of a run by their number, without end: the same on every process and in every run of one seed."""

    def __getitem__(self, number: int) -> Row:
        """Return the row of this number."""

    def epochs(self, rows: int) -> float:
        """Return the epochs, passes through the documents, in the first `rows` rows."""


class TokenStream:
    """Every document of every epoch, one after the other, without end."""

    def __init__(self, parts: Sequence[Part], eos: int, seed: int) -> None:
        """Args: parts: the documents with their marks; eos: the token before the first document; seed: of the orders."""
        self._parts = parts
        self._eos = eos
        self._seed = seed
        self.epoch_length = sum(part.num_tokens for part in parts)
        """Tokens of one epoch, marks included."""
        # A row, and the shuffled rows around it, touch two neighbouring epochs.
        self._epoch = functools.lru_cache(maxsize=4)(self._shuffle_parts)
        self._part = functools.lru_cache(maxsize=min(_MOST_ORDERS, 4 * len(parts)))(self._shuffle_documents)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens start..stop-1 of the stream, int32, and the positions among them at which documents begin."""
        pieces, opens = [np.full(max(-start, 0), self._eos)], []
        done, position = pieces[0].size, max(start, 0)
        while position < stop:
            epoch, in_epoch = divmod(position, self.epoch_length)
            parts, part_ends = self._epoch(epoch)
            turn = int(np.searchsorted(part_ends, in_epoch, side="right"))
            part, in_part = int(parts[turn]), in_epoch - (int(part_ends[turn - 1]) if turn else 0)
            lasts, ends = self._part(epoch, part)
            document = int(np.searchsorted(ends, in_part, side="right"))
            left = int(ends[document]) - in_part
            first = int(lasts[document]) - left
            pieces.append(self._parts[part].read(first, first + min(left, stop - position)))
            if in_part == (ends[document - 1] if document else 0):
                opens.append(done)
            done += pieces[-1].size
            position += pieces[-1].size
        return np.concatenate(pieces).astype(np.int32), np.array(opens, np.int64)

    def _shuffle_parts(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shuffled parts of an epoch, and the position in the epoch after each."""
        order = np.random.default_rng([self._seed, 2, epoch]).permutation(len(self._parts))
        return order, np.cumsum(np.array([self._parts[part].num_tokens for part in order], np.int64))

    def _shuffle_documents(self, epoch: int, part: int) -> tuple[np.ndarray, np.ndarray]:
        """Shuffle the documents of a part; return, in new order, the end of each in the part and its end after shuffling."""
        ends = self._parts[part].ends()
        order = np.random.default_rng([self._seed, 0, epoch, part]).permutation(ends.size)
        return ends[order], np.cumsum(np.diff(ends, prepend=0)[order])


class PackedRows:
    """Rows of text: the stream cut into rows, in an order drawn from the seed."""

    def __init__(self, stream: TokenStream, sequence_length: int, seed: int) -> None:
        """Args: stream: the training text; sequence_length: T; seed: of the order of the rows.

        Raises:
          ValueError: if the text does not fill one row.
        """
        check(
            stream.epoch_length >= sequence_length,
            f"the training text is {stream.epoch_length} tokens, less than one row of train.sequence_length "
            f"({sequence_length}); give more text or a shorter train.sequence_length",
        )
        self._stream = stream
        self._length = sequence_length
        self._seed = seed
        self._rows_per_block = min(stream.epoch_length // sequence_length, _MOST_ROWS, max(_MOST_TOKENS // sequence_length, 1))
        self._block = functools.lru_cache(maxsize=4)(self._shuffle)

    def __getitem__(self, number: int) -> Row:
        """Return the row of this number; it starts with the token before its first target."""
        block, turn = divmod(number, self._rows_per_block)
        start = (block * self._rows_per_block + int(self._block(block)[turn])) * self._length
        tokens, opens = self._stream.read(start - 1, start + self._length)
        starts_T = segment_starts(opens, 1, self._length)[0]
        return Row(tokens[:-1], tokens[1:], np.ones(self._length, np.float32), starts_T)

    def epochs(self, rows: int) -> float:
        """Return the epochs in the first `rows` rows."""
        return rows * self._length / self._stream.epoch_length

    def _shuffle(self, block: int) -> np.ndarray:
        return np.random.default_rng([self._seed, 1, block]).permutation(self._rows_per_block)


def segment_starts(opens: np.ndarray, rows: int, length: int) -> np.ndarray:
    """For a stream cut into rows, return the position in its row at which the document of each token begins.

    Args:
      opens: positions in the stream at which documents begin; those behind the last row are ignored.
      rows: R.
      length: T.

    Returns:
      int32 [R, T]; 0 for a document that began in an earlier row.
    """
    starts_RT = np.zeros((rows, length), np.int32)
    opens = opens[opens < starts_RT.size]
    starts_RT.reshape(-1)[opens] = opens % length
    return np.maximum.accumulate(starts_RT, axis=1)


class MixedRows:
    """Rows of one or several sources, each with its share of the rows; a `Rows`. A single source keeps its row numbers."""

    def __init__(self, sources: Mapping[str, Rows], shares: Mapping[str, float], seed: int) -> None:
        """Args: sources: rows by name; shares: positive weights of any sum; seed: of the order within blocks."""
        self._sources = dict(sources)
        # Exact, so that a quota is the same on every machine for row numbers of any size.
        weights = [Fraction(shares[name]) for name in sources]
        self._shares = [weight / sum(weights) for weight in weights]
        # Long enough for every source to give a row of each block; otherwise quotas could fall from one block to the next.
        self._block_rows = max(_LEAST_BLOCK, math.ceil(1 / min(self._shares)))
        self._seed = seed
        self._block = functools.lru_cache(maxsize=4)(self._shuffle)

    def __getitem__(self, number: int) -> Row:
        """Return the row of this number."""
        block, turn = divmod(number, self._block_rows)
        sources, indices = self._block(block)
        source = int(sources[turn])
        return list(self._sources.values())[source][self._quotas(block)[source] + int(indices[turn])]

    def rows_by_source(self, rows: int) -> dict[str, int]:
        """Return the number of rows that each source gives to the first `rows` rows."""
        block, turn = divmod(rows, self._block_rows)
        taken = np.bincount(self._block(block)[0][:turn], minlength=len(self._sources)).tolist()
        return {name: q + more for name, q, more in zip(self._sources, self._quotas(block), taken, strict=True)}

    def epochs_by_source(self, rows: int) -> dict[str, float]:
        """Return the epochs of each source in the first `rows` rows."""
        counts = self.rows_by_source(rows)
        return {name: source.epochs(counts[name]) for name, source in self._sources.items()}

    def epochs(self, rows: int) -> float:
        """Return the most epochs of any source in the first `rows` rows."""
        return max(self.epochs_by_source(rows).values())

    def _quotas(self, blocks: int) -> list[int]:
        """Return the rows of each source in that many blocks: its share, rounded by largest remainders to the right sum."""
        exact = [share * blocks * self._block_rows for share in self._shares]
        quotas = [math.floor(value) for value in exact]
        by_remainder = sorted(range(len(exact)), key=lambda source: (quotas[source] - exact[source], source))
        for source in by_remainder[: blocks * self._block_rows - sum(quotas)]:
            quotas[source] += 1
        return quotas

    def _shuffle(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For every row of a block, return its source, and its index among the rows of that source in the block."""
        counts = np.subtract(self._quotas(block + 1), self._quotas(block))
        sources = np.random.default_rng([self._seed, 3, block]).permutation(np.repeat(np.arange(len(counts)), counts))
        indices = np.empty_like(sources)
        for source, count in enumerate(counts):
            indices[sources == source] = np.arange(count)
        return sources, indices
