"""Rows of several sources, each with its share of the rows.

Which source gives row n is a pure function of n and the seed. Rows go by blocks, whose rows are shuffled: after every block
each source has given its share of all rows so far, to within one row, whatever the shares. The rows of a source come
in its own sequence, through its own epochs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from dsv3_jax.data.rows import Row, Rows

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
