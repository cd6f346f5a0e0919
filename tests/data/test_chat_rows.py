"""Rows of conversations: whole, side by side, each answer learnt once an epoch and no prompt ever."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from dsv3_jax.data import chat as module
from dsv3_jax.data.chat import ChatRows, Encoded, chat_windows

Shape = tuple[tuple[int, int], ...]  # prompt and answer of each turn
TURNS = strategies.tuples(strategies.integers(1, 12), strategies.integers(1, 8))
SHAPES = strategies.lists(strategies.lists(TURNS, min_size=1, max_size=3).map(tuple), min_size=1, max_size=30)


def encoded(shapes: Sequence[Shape]) -> list[Encoded]:
    """Conversations in which every token is another number."""
    numbers = itertools.count(1)
    made = []
    for shape in shapes:
        in_loss = np.concatenate([np.repeat([False, True], turn) for turn in shape])
        made.append(Encoded(np.array([next(numbers) for _ in in_loss], np.int32), in_loss, in_loss, "x" * int(in_loss.sum())))
    return made


def stored(conversations: Sequence[Encoded]) -> np.ndarray:
    parts = []
    for one in conversations:
        parts.append(one.ids.astype(np.uint32) | (one.is_in_loss.astype(np.uint32) << np.uint32(31)))
        parts[-1][-1] |= np.uint32(1 << 30 | 1 << 27)
    return np.concatenate(parts)


def rows_of(shapes: Sequence[Shape], length: int = 32, seed: int = 0) -> ChatRows:
    return ChatRows(stored(encoded(shapes)), length, seed)


@hypothesis.settings(deadline=None)
@hypothesis.given(SHAPES)
def test_every_answer_is_learnt_once_an_epoch_and_no_prompt(shapes: list[Shape]) -> None:
    conversations, length = encoded(shapes), 64  # None is longer than 60.
    rows = ChatRows(stored(conversations), length, 0)
    answers = np.concatenate([one.ids[one.is_in_loss] for one in conversations]).tolist()
    number = 0
    for _ in range(3):
        seen: collections.Counter[int] = collections.Counter()
        targets: collections.Counter[int] = collections.Counter()
        while sum(seen.values()) < len(answers):
            row = rows[number]
            seen.update(row.targets_T[row.loss_weight_T == 1].tolist())
            targets.update(row.targets_T[row.segment_starts_T >= 0].tolist())
            number += 1
        assert seen == collections.Counter(answers)
        # No token is lost but the first of each conversation, which has nothing before it.
        assert targets == collections.Counter(np.concatenate([one.ids[1:] for one in conversations]).tolist())


@hypothesis.settings(deadline=None)
@hypothesis.given(SHAPES)
def test_conversations_lie_whole_side_by_side(shapes: list[Shape]) -> None:
    conversations = encoded(shapes)
    by_first = {int(one.ids[0]): one for one in conversations}
    rows = ChatRows(stored(conversations), 64, 3)
    for number in range(8):
        row, place = rows[number], 0
        while place < 64 and row.segment_starts_T[place] >= 0:
            one = by_first[int(row.tokens_T[place])]
            stop = place + one.ids.size - 1
            np.testing.assert_array_equal(row.tokens_T[place:stop], one.ids[:-1])
            np.testing.assert_array_equal(row.targets_T[place:stop], one.ids[1:])
            np.testing.assert_array_equal(row.loss_weight_T[place:stop], one.is_in_loss[1:])
            assert (row.segment_starts_T[place:stop] == place).all()
            place = stop
        assert place > 0
        assert (row.segment_starts_T[place:] == -1).all()
        assert not row.loss_weight_T[place:].any()
        assert not row.tokens_T[place:].any()


def test_long_conversations_are_cut_at_the_end_of_a_row_and_counted() -> None:
    # 49 targets, of which 32 fit; 40 of prompt, so that no answer fits; and one that fits.
    rows = rows_of([((20, 30),), ((40, 5),), ((3, 4),)])
    assert rows.report == (
        "102 tokens in 2 rows, 40.6% of them padding; conversations cut at the end of a row: 2 (tokens: 29), of which left "
        "out, as no answer begins before: 1"
    )
    in_loss = sorted(int(target) for number in (0, 1) for target in rows[number].targets_T[rows[number].loss_weight_T == 1])
    assert in_loss == [*range(21, 34), *range(99, 103)]
    with pytest.raises(ValueError, match=r"every one of the 1 conversations has a prompt of more than train\.sequence_length"):
        rows_of([((40, 5),)])


def test_a_row_hangs_on_its_number_and_the_seed_alone() -> None:
    shapes: list[Shape] = [((1 + n % 9, 2 + n % 5),) for n in range(100)]
    forward, backward = rows_of(shapes), rows_of(shapes)
    numbers = [0, 3, 60, 200, 7]
    for number, row in zip(reversed(numbers), [backward[number] for number in reversed(numbers)], strict=True):
        np.testing.assert_equal(forward[number], row)
    assert any(not np.array_equal(rows_of(shapes, seed=1)[n].tokens_T, forward[n].tokens_T) for n in range(5))
    epoch = round(1 / forward.epochs(1))
    assert any(not np.array_equal(forward[n + epoch].tokens_T, forward[n].tokens_T) for n in range(5))
    assert forward.epochs(3 * epoch) == pytest.approx(3)


@pytest.mark.parametrize("open_rows", [1, 4, 256])
def test_packing_is_first_fit_and_leaves_little_empty(open_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_OPEN_ROWS", open_rows)
    lengths = np.random.default_rng(0).integers(1, 400, 5000)
    members, ends = module._first_fit(np.arange(5000), lengths, 512)
    assert sorted(members) == list(range(5000))
    sums = np.add.reduceat(lengths[members], np.concatenate([[0], ends[:-1]]))
    assert (sums <= 512).all()
    # One open row is next fit; 256 of them waste less than a tenth.
    assert sums.size * 512 < lengths.sum() * {1: 1.6, 4: 1.3, 256: 1.1}[open_rows]


@hypothesis.settings(deadline=None)
@hypothesis.given(SHAPES, strategies.integers(3, 40))
def test_windows_score_each_answer_once_however_long(shapes: list[Shape], length: int) -> None:
    conversations = encoded(shapes)
    windows = chat_windows(conversations, batch_size=2, sequence_length=length, across_documents=False)
    batches = list(windows)
    scored = np.concatenate([batch.targets_BT[batch.loss_weight_BT == 1] for batch in batches])
    assert sorted(scored) == sorted(np.concatenate([one.ids[one.is_text] for one in conversations]))
    assert windows.num_bytes == sum(len(one.said) for one in conversations)
    for batch in batches:
        assert batch.segment_starts_BT is not None
        assert (batch.segment_starts_BT[batch.loss_weight_BT == 1] >= 0).all()
    assert (
        next(iter(chat_windows(conversations, batch_size=2, sequence_length=9, across_documents=True))).segment_starts_BT
        is None
    )
