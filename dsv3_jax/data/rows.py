"""Rows of a batch, each a pure function of its number: documents packed into a stream that is cut into rows.

The documents of an epoch follow one another in an order drawn from (seed, epoch), each between its marks, and
epoch follows epoch: one endless stream of tokens. It is cut into rows of `sequence_length` targets, so that every
token of every epoch is a target exactly once and nothing is padded (the report packs documents without masking
attention between them, arXiv 2412.19437, section 4.1). Rows that lie together come from the same document, so
the rows of each stretch as long as an epoch, or as a large part of a long one, are shuffled too. A row is computed
from its number alone: a run resumes at any step, on any number of processes, without reading what came before.

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

# Rows, and tokens, of the longest stretch that is shuffled. It reads from some 130 parts of 32M tokens, whose orders of
# documents are kept; and of a corpus of fewer parts those of four epochs.
_MOST_ROWS = 2**20
_MOST_TOKENS = 2**32
_MOST_ORDERS = 160


class Row(NamedTuple):
    """One row of a batch."""

    tokens_T: np.ndarray
    """int32."""
    targets_T: np.ndarray
    """int32; targets_T[t] follows tokens_T[t]."""
    loss_weight_T: np.ndarray
    """float32; what the loss of each target counts: 1, or 0 where it is not to be learnt."""
    segment_starts_T: np.ndarray
    """int32; where in the row the document of each token begins, -1 for padding."""


class Rows(Protocol):
    """All rows of a run, by their number: the same on every process and in every run of one seed, without end."""

    def __getitem__(self, number: int) -> Row:
        """The row of this number."""

    def epochs(self, rows: int) -> float:
        """How often the first `rows` rows go through the documents."""


class TokenStream:
    """Every document of every epoch, one after the other, without end."""

    def __init__(self, parts: Sequence[Part], eos: int, seed: int) -> None:
        """Args: parts: the documents, their marks included; eos: stands before the first; seed: of the orders."""
        self._parts = parts
        self._eos = eos
        self._seed = seed
        self.epoch_length = sum(part.num_tokens for part in parts)
        """Tokens of one epoch, marks included."""
        # A row, and the shuffled rows around it, touch two neighbouring epochs.
        self._epoch = functools.lru_cache(maxsize=4)(self._shuffle_parts)
        self._part = functools.lru_cache(maxsize=min(_MOST_ORDERS, 4 * len(parts)))(self._shuffle_documents)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens start..stop-1 of the stream, int32, and where among them documents begin. Before the first stands an end."""
        pieces, opens = [np.full(max(-start, 0), self._eos)], []
        done, place = pieces[0].size, max(start, 0)
        while place < stop:
            epoch, in_epoch = divmod(place, self.epoch_length)
            parts, part_ends = self._epoch(epoch)
            turn = int(np.searchsorted(part_ends, in_epoch, side="right"))
            part, in_part = int(parts[turn]), in_epoch - (int(part_ends[turn - 1]) if turn else 0)
            lasts, ends = self._part(epoch, part)
            document = int(np.searchsorted(ends, in_part, side="right"))
            left = int(ends[document]) - in_part
            first = int(lasts[document]) - left
            pieces.append(self._parts[part].read(first, first + min(left, stop - place)))
            if in_part == (ends[document - 1] if document else 0):
                opens.append(done)
            done += pieces[-1].size
            place += pieces[-1].size
        return np.concatenate(pieces).astype(np.int32), np.array(opens, np.int64)

    def _shuffle_parts(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The parts of an epoch in their order, and where each one ends in it."""
        order = _generator(self._seed, 2, epoch).permutation(len(self._parts))
        return order, np.cumsum(np.array([self._parts[part].num_tokens for part in order], np.int64))

    def _shuffle_documents(self, epoch: int, part: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of a part in the order of this epoch: where each ends in the part, and where in that order."""
        ends = self._parts[part].ends()
        order = _generator(self._seed, 0, epoch, part).permutation(ends.size)
        lengths = np.diff(ends, prepend=0)
        return ends[order], np.cumsum(lengths[order])


class PackedRows:
    """Rows of text: the stream cut into rows, in an order drawn from the seed."""

    def __init__(self, stream: TokenStream, sequence_length: int, seed: int) -> None:
        """Args: sequence_length: T; seed: of the order of the rows.

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
        """The row of this number; it opens with the token before its first target."""
        block, turn = divmod(number, self._rows_per_block)
        start = (block * self._rows_per_block + int(self._block(block)[turn])) * self._length
        tokens, opens = self._stream.read(start - 1, start + self._length)
        opens = opens[opens < self._length]  # The last token is a target only.
        segment_starts_T = np.zeros(self._length, np.int32)
        segment_starts_T[opens] = opens
        return Row(tokens[:-1], tokens[1:], np.ones(self._length, np.float32), np.maximum.accumulate(segment_starts_T))

    def epochs(self, rows: int) -> float:
        """How often the first `rows` rows go through the documents."""
        return rows * self._length / self._stream.epoch_length

    def _shuffle(self, block: int) -> np.ndarray:
        return _generator(self._seed, 1, block).permutation(self._rows_per_block)


def _generator(*numbers: int) -> np.random.Generator:
    """Of the seed, the purpose, and what is shuffled."""
    return np.random.default_rng(numbers)


# ----------------------------------------------------------------------------------------------------------------------
# Rows of several sources, each with its share of the rows.


_LEAST_BLOCK = 1024


class MixedRows:
    """Rows of every source; a `Rows`."""

    def __init__(self, sources: Mapping[str, Rows], shares: Mapping[str, float], seed: int) -> None:
        """Args: sources: rows by name; shares: of each, positive, of any sum; seed: of the order within blocks."""
        self._names = list(sources)
        self._sources = list(sources.values())
        # Exact, so that a quota is the same on every machine however large the number of the row.
        weights = [Fraction(shares[name]) for name in self._names]
        self._shares = [weight / sum(weights) for weight in weights]
        # So long that every source gives a row of each block, without which quotas could fall from one block to the next.
        self._block_rows = max(_LEAST_BLOCK, math.ceil(1 / min(self._shares)))
        self._seed = seed
        self._block = functools.lru_cache(maxsize=4)(self._shuffle)

    def __getitem__(self, number: int) -> Row:
        """The row of this number."""
        block, turn = divmod(number, self._block_rows)
        sources, places = self._block(block)
        source = int(sources[turn])
        return self._sources[source][self._quotas(block)[source] + int(places[turn])]

    def rows_by_source(self, rows: int) -> dict[str, int]:
        """How many of the first `rows` rows each source gives."""
        block, turn = divmod(rows, self._block_rows)
        taken = np.bincount(self._block(block)[0][:turn], minlength=len(self._names))
        counts = (quota + int(more) for quota, more in zip(self._quotas(block), taken, strict=True))
        return dict(zip(self._names, counts, strict=True))

    def epochs_by_source(self, rows: int) -> dict[str, float]:
        """How often the first `rows` rows go through the documents of each source."""
        counts = self.rows_by_source(rows)
        return {name: source.epochs(counts[name]) for name, source in zip(self._names, self._sources, strict=True)}

    def epochs(self, rows: int) -> float:
        """How often the first `rows` rows go through the documents of the source that is gone through the most."""
        return max(self.epochs_by_source(rows).values())

    def _quotas(self, blocks: int) -> list[int]:
        """Rows of each source in that many blocks: its share, rounded so that the sum is right (largest remainders)."""
        exact = [share * blocks * self._block_rows for share in self._shares]
        quotas = [math.floor(value) for value in exact]
        by_remainder = sorted(range(len(exact)), key=lambda source: (quotas[source] - exact[source], source))
        for source in by_remainder[: blocks * self._block_rows - sum(quotas)]:
            quotas[source] += 1
        return quotas

    def _shuffle(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Which source gives each row of a block, and the how-manieth of its rows in the block that is."""
        counts = np.subtract(self._quotas(block + 1), self._quotas(block))
        sources = np.random.default_rng([self._seed, 3, block]).permutation(np.repeat(np.arange(len(counts)), counts))
        places = np.empty_like(sources)
        for source, count in enumerate(counts):
            places[sources == source] = np.arange(count)
        return sources, places
