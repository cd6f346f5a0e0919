"""Packed rows: every token once an epoch, shuffled, none lost; where documents begin; corpora of many parts."""

from __future__ import annotations

import collections
import itertools

import chex
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from dsv3_jax.data import rows as rows_module
from dsv3_jax.data.rows import PackedRows, TokenStream
from dsv3_jax.data.storage import Part

BOS, EOS = 0, 1


def flat_tokens(lengths: list[int]) -> np.ndarray:
    """Documents of the given lengths, marks and all; apart from the marks every token is another number."""
    numbers = itertools.count(2)
    return np.concatenate([[BOS, *itertools.islice(numbers, length - 2), EOS] for length in lengths]).astype(np.uint16)


def in_parts(tokens: np.ndarray, documents_a_part: int) -> list[Part]:
    ends = [0, *(np.flatnonzero(tokens == EOS) + 1)]
    cuts = [*ends[::documents_a_part], ends[-1]]
    return [Part.closed_by(EOS, tokens[a:b]) for a, b in itertools.pairwise(cuts) if a < b]


def stream_of(tokens: np.ndarray, seed: int = 3, documents_a_part: int = 1000) -> TokenStream:
    return TokenStream(in_parts(tokens, documents_a_part), EOS, seed)


def rows_of(tokens: np.ndarray, length: int = 16, seed: int = 3, documents_a_part: int = 1000) -> PackedRows:
    return PackedRows(stream_of(tokens, seed, documents_a_part), length, seed)


def documents_in(stream: np.ndarray) -> list[tuple[int, ...]]:
    ends = np.flatnonzero(stream == EOS) + 1
    return [tuple(part.tolist()) for part in np.split(stream, ends)[:-1]]


@pytest.mark.parametrize("documents_a_part", [1000, 3, 1])
def test_an_epoch_is_every_document_once_in_an_order_of_its_own(documents_a_part: int) -> None:
    tokens = flat_tokens([5, 9, 2, 30, 17, 4, 4, 8])
    stream = stream_of(tokens, 0, documents_a_part)
    epochs = [stream.read(epoch * tokens.size, (epoch + 1) * tokens.size)[0] for epoch in range(6)]
    orders = [documents_in(epoch) for epoch in epochs]
    for order in orders:
        assert sorted(order) == sorted(documents_in(tokens))
    assert len({tuple(order) for order in orders}) == 6
    np.testing.assert_array_equal(stream.read(0, 6 * tokens.size)[0], np.concatenate(epochs))
    np.testing.assert_array_equal(stream.read(-1, 3)[0], [EOS, *epochs[0][:3]])
    assert documents_in(stream_of(tokens, 1, documents_a_part).read(0, tokens.size)[0]) != orders[0]


@hypothesis.settings(deadline=None)
@hypothesis.given(
    strategies.lists(strategies.integers(2, 40), min_size=1, max_size=12), strategies.integers(1, 5), strategies.data()
)
def test_any_stretch_of_the_stream_is_that_part_of_the_whole(
    lengths: list[int], documents_a_part: int, data: strategies.DataObject
) -> None:
    tokens = flat_tokens(lengths)
    stream = stream_of(tokens, 0, documents_a_part)
    whole, opens = stream.read(0, 3 * tokens.size)
    start, stop = sorted(data.draw(strategies.tuples(*[strategies.integers(0, whole.size)] * 2)))
    part, part_opens = stream.read(start, stop)
    np.testing.assert_array_equal(part, whole[start:stop])
    np.testing.assert_array_equal(part_opens, opens[(opens >= start) & (opens < stop)] - start)
    np.testing.assert_array_equal(whole[opens], BOS)
    assert opens.size == 3 * len(lengths)


# 160 tokens: a whole number of rows, and not; in one block, and in blocks of three rows.
@pytest.mark.parametrize(("length", "most"), [(16, 2**20), (13, 2**20), (16, 3)])
@pytest.mark.parametrize("documents_a_part", [1000, 2])
def test_every_token_of_every_epoch_is_a_target_once(
    length: int, most: int, documents_a_part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_MOST_ROWS", most)
    tokens = flat_tokens([40, 7, 60, 23, 30])
    rows = rows_of(tokens, length, documents_a_part=documents_a_part)
    # As many shuffled blocks as make whole epochs.
    num_rows = 160 * (160 // length) * 3
    epochs = num_rows * length // 160
    targets = np.concatenate([rows[index].targets_T for index in range(num_rows)])
    assert collections.Counter(targets.tolist()) == collections.Counter(np.tile(tokens, epochs).tolist())
    assert rows.epochs(num_rows) == epochs


def test_targets_follow_their_tokens() -> None:
    tokens = flat_tokens([40, 7, 60, 23, 30])
    rows = rows_of(tokens)
    # In the stream a token is followed by the next of its document, an end by any beginning.
    following = {int(a): int(b) for a, b in itertools.pairwise(tokens) if a not in (BOS, EOS)}
    beginnings = {int(first) for first in tokens[1:][tokens[:-1] == BOS]}
    for index in range(100):
        row = rows[index]
        np.testing.assert_array_equal(row.tokens_T[1:], row.targets_T[:-1])
        for token, target in zip(row.tokens_T.tolist(), row.targets_T.tolist(), strict=True):
            if token == EOS:
                assert target == BOS
            elif token == BOS:
                assert target in beginnings
            else:
                assert target == following[token]


def test_starts_say_where_the_document_of_each_token_begins() -> None:
    tokens = flat_tokens([40, 7, 60, 23, 30, 3, 2])
    rows = rows_of(tokens)
    for index in range(100):
        row, begins = rows[index], 0
        for place, (token, start) in enumerate(zip(row.tokens_T.tolist(), row.segment_starts_T.tolist(), strict=True)):
            begins = place if token == BOS else begins
            assert start == begins
        assert (row.loss_weight_T == 1).all()
    chex.assert_type(
        [row.tokens_T, row.targets_T, row.segment_starts_T, row.loss_weight_T], [np.int32, np.int32, np.int32, np.float32]
    )


def test_ends_are_those_that_are_stored_and_not_ids_that_look_so() -> None:
    tokens = np.array([5, EOS, 6, EOS, EOS, 7, 8, EOS], np.uint16)
    stream = TokenStream([Part(tokens, np.array([4, 8]))], EOS, 0)
    read, opens = stream.read(0, 8)
    assert opens.tolist() == [0, 4]
    assert sorted([tuple(read[:4].tolist()), tuple(read[4:].tolist())]) == [(1, 7, 8, 1), (5, 1, 6, 1)]
    assert set(PackedRows(stream, 8, 0)[0].segment_starts_T.tolist()) <= {0, 1, 5}


def test_rows_of_a_batch_lie_apart() -> None:
    rows = rows_of(flat_tokens([1600]))
    first = [int(rows[index].targets_T[1]) // 16 for index in range(100)]
    assert sorted(first) == list(range(100))
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(first)) < 10


def test_a_row_hangs_on_its_number_alone() -> None:
    tokens = flat_tokens([90, 70, 33, 12, 64])
    forward, backward = rows_of(tokens, documents_a_part=2), rows_of(tokens, documents_a_part=2)
    numbers = [0, 5, 17, 160, 1_000_003]
    for number, row in zip(reversed(numbers), [backward[number] for number in reversed(numbers)], strict=True):
        chex.assert_trees_all_equal(forward[number], row)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"15 tokens, less than one row of train\.sequence_length \(16\); give more text"):
        rows_of(flat_tokens([15]))
    assert rows_of(flat_tokens([16]))[0].tokens_T[0] == EOS
