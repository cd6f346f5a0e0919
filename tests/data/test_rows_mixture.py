"""Mixed rows: exact shares, each source in its own sequence, a pure function of the number and the seed."""

from __future__ import annotations

import collections
from fractions import Fraction

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from dsv3_jax.data.rows import MixedRows, Row


class Named:
    """Rows that say their source and number."""

    def __init__(self, source: int, rows_an_epoch: int) -> None:
        self._source = source
        self._rows_an_epoch = rows_an_epoch

    def __getitem__(self, number: int) -> Row:
        return Row(np.array([self._source, number]), *np.zeros((3, 2)))

    def epochs(self, rows: int) -> float:
        return rows / self._rows_an_epoch


def mixed(weights: list[float], seed: int = 0) -> MixedRows:
    sources = {f"s{number}": Named(number, 100 * (number + 1)) for number in range(len(weights))}
    return MixedRows(sources, dict(zip(sources, weights, strict=True)), seed)


def read(rows: MixedRows, start: int, stop: int) -> list[tuple[int, int]]:
    return [tuple(rows[number].tokens_T.tolist()) for number in range(start, stop)]


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(strategies.lists(strategies.floats(0.01, 10.0), min_size=1, max_size=5), strategies.integers(0, 10**9))
def test_shares_are_within_one_row_after_every_block(weights: list[float], block: int) -> None:
    rows = mixed(weights)
    size = rows._block_rows
    exact = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    for blocks in (0, 1, 2, block, block + 1):
        counts = list(rows.rows_by_source(blocks * size).values())
        assert sum(counts) == blocks * size
        assert all(abs(count - share * blocks * size) < 1 for count, share in zip(counts, exact, strict=True))
    within = np.subtract(*(list(rows.rows_by_source(at * size).values()) for at in (block + 1, block)))
    assert (within >= 0).all()
    assert all(abs(count - share * size) < 2 for count, share in zip(within.tolist(), exact, strict=True))


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, 1.0, 1.0], [5.0, 0.02], [1.0]])
def test_each_source_is_read_in_its_own_sequence(weights: list[float]) -> None:
    rows = mixed(weights)
    seen = read(rows, 0, 2500)
    for source in range(len(weights)):
        numbers = [number for name, number in seen if name == source]
        assert numbers == list(range(len(numbers)))
    for stop in (0, 1, 700, 1024, 2500):
        counts = collections.Counter(source for source, _ in seen[:stop])
        assert rows.rows_by_source(stop) == {f"s{number}": counts[number] for number in range(len(weights))}
        assert rows.epochs_by_source(stop) == {
            f"s{number}": counts[number] / (100 * (number + 1)) for number in range(len(weights))
        }
    assert rows.epochs(2500) == max(rows.epochs_by_source(2500).values())


def test_a_row_hangs_on_its_number_and_the_seed_alone() -> None:
    numbers = [10**9, 3, 2047, 1024, 0]
    one = [tuple(mixed([0.7, 0.3])[number].tokens_T.tolist()) for number in numbers]
    rows = mixed([0.7, 0.3])
    assert [tuple(rows[number].tokens_T.tolist()) for number in sorted(numbers)] == [
        row for _, row in sorted(zip(numbers, one, strict=True))
    ]
    assert read(mixed([0.7, 0.3], seed=1), 0, 100) != read(mixed([0.7, 0.3]), 0, 100)
    # Weights count by their proportions.
    assert read(mixed([7, 3]), 0, 3000)[:50] == read(mixed([14, 6]), 0, 3000)[:50]


def test_a_single_source_keeps_its_row_numbers() -> None:
    assert read(mixed([0.3], seed=5), 1000, 3000) == [(0, number) for number in range(1000, 3000)]


def test_sources_are_shuffled_among_each_other() -> None:
    sources = np.array([source for source, _ in read(mixed([0.5, 0.5]), 0, 1024)])
    halves = sources.reshape(8, 128).sum(axis=1)
    assert (abs(halves - 64) < 30).all()  # 5 standard deviations
    assert 400 < (np.diff(sources) != 0).sum() < 630
