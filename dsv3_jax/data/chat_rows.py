"""Conversations packed into rows: whole ones, side by side, the rest of a row padded.

A conversation is never split between rows, so that every answer is learnt with all of its prompt; one that is longer than a
row is cut at its end. An epoch packs the conversations in an order drawn from (seed, epoch), first fit, and epoch follows
epoch. The number of rows of an epoch hangs on its order, so a run that resumes packs the earlier ones again: some seconds for
a million conversations.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import numpy as np

from dsv3_jax.config.checks import require
from dsv3_jax.data.chat_tokens import ChatTokens, Encoded
from dsv3_jax.data.heldout import HeldoutWindows
from dsv3_jax.data.rows import Row

_OPEN_ROWS = 256
"""Rows that a conversation may still go into; beyond these the fullest is closed."""


class ChatRows:
    """Rows of conversations, epoch after epoch without end; a `Rows`."""

    def __init__(self, conversations: ChatTokens, sequence_length: int, seed: int) -> None:
        """Args: conversations: of the training part; sequence_length: T; seed: of the orders.

        Raises:
          ValueError: if no conversation has anything to learn within the length of a row.
        """
        self._tokens = conversations
        self._length = sequence_length
        self._seed = seed
        self._starts = np.concatenate([[0], conversations.ends[:-1]])
        # The last token is a target only.
        self._targets = np.minimum(conversations.ends - self._starts - 1, sequence_length)
        # The first token has nothing before it to be told from.
        learnt = np.append(conversations.learnt, conversations.ends[-1])
        first_learnt = learnt[np.searchsorted(learnt, self._starts + 1)]
        self._used = np.flatnonzero(first_learnt <= self._starts + self._targets)
        require(
            self._used.size > 0,
            f"every one of the {self._targets.size} conversations has a prompt of more than train.sequence_length "
            f"({sequence_length}) tokens; raise it",
        )
        self._firsts = [0]
        self._lock = threading.Lock()
        self._packed = functools.lru_cache(maxsize=2)(self._pack)

    def __getitem__(self, number: int) -> Row:
        """The row of this number."""
        epoch = self._epoch_of(number)
        members, ends = self._packed(epoch)
        turn = number - self._firsts[epoch]
        items = []
        for conversation in members[ends[turn - 1] if turn else 0 : ends[turn]]:
            start = self._starts[conversation]
            ids, is_learnt = self._tokens.read(start, start + self._targets[conversation] + 1)
            items.append((ids, is_learnt[1:]))
        return _row(items, self._length)

    def epochs(self, rows: int) -> float:
        """How often the first `rows` rows go through the conversations, by the rows of the first epoch."""
        return rows / self._rows_in(0)

    @property
    def report(self) -> str:
        """One line on what packing does to the conversations, by the first epoch."""
        rows = self._rows_in(0)
        lengths = self._tokens.ends - self._starts
        is_cut = lengths - 1 > self._length
        lost = int((lengths - 1 - self._targets).sum())
        padding = 1 - int(self._targets[self._used].sum()) / (rows * self._length)
        return (
            f"{lengths.sum():,} tokens in {rows:,} rows, {padding:.1%} of them padding; conversations cut at the end of a row: "
            f"{int(is_cut.sum()):,} (tokens: {lost:,}), of which left out, as no answer begins before: "
            f"{lengths.size - self._used.size:,}"
        )

    def _rows_in(self, epoch: int) -> int:
        return self._packed(epoch)[1].size

    def _epoch_of(self, number: int) -> int:
        with self._lock:
            while self._firsts[-1] <= number:
                self._firsts.append(self._firsts[-1] + self._rows_in(len(self._firsts) - 1))
        return int(np.searchsorted(self._firsts, number, side="right")) - 1

    def _pack(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The conversations of an epoch row by row, and where each row ends among them."""
        order = np.random.default_rng([self._seed, 4, epoch]).permutation(self._used)
        return _first_fit(order, self._targets[order], self._length)


def chat_windows(
    conversations: Sequence[Encoded], *, batch_size: int, sequence_length: int, across_documents: bool
) -> HeldoutWindows:
    """Held-out conversations as windows that score each byte the assistant says once.

    A conversation longer than a window goes on in another one, in which its earlier part is not seen.
    """
    items = []
    for encoded in conversations:
        for start in range(0, encoded.ids.size - 1, sequence_length):
            ids = encoded.ids[start : start + sequence_length + 1]
            is_scored = encoded.is_text[start + 1 : start + sequence_length + 1]
            if is_scored.any():
                items.append((ids, is_scored))
    require(bool(items), "the assistant says nothing in the held-out conversations; raise data.heldout_fraction")
    lengths = np.array([ids.size - 1 for ids, _ in items], np.int64)
    members, ends = _first_fit(np.arange(lengths.size), lengths, sequence_length)
    rows = [_row([items[member] for member in row], sequence_length) for row in np.split(members, ends[:-1])]
    num_bytes = sum(len(encoded.said.encode("utf-8")) for encoded in conversations)
    return HeldoutWindows.of_rows(rows, num_bytes, batch_size, across_documents=across_documents)


def _first_fit(order: np.ndarray, lengths: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Puts each item into the first open row with room for it.

    Args:
      order: the items, [n].
      lengths: what each takes, [n].
      room: of a row.

    Returns:
      the items row by row, and where each row ends among them.
    """
    left = np.full(_OPEN_ROWS, -1)
    rows = np.zeros(_OPEN_ROWS, np.int64)
    row_of = np.zeros(order.size, np.int64)
    num_rows = 0
    for item, length in enumerate(lengths.tolist()):
        slot = int(np.argmax(left >= length))
        if left[slot] < length:
            slot = int(np.argmin(left))
            left[slot], rows[slot] = room, num_rows
            num_rows += 1
        left[slot] -= length
        row_of[item] = rows[slot]
    by_row = np.argsort(row_of, kind="stable")
    return order[by_row], np.cumsum(np.bincount(row_of, minlength=num_rows))


def _row(items: Sequence[tuple[np.ndarray, np.ndarray]], length: int) -> Row:
    """One row of items, each the ids [n + 1] and whether the targets [n] among them count."""
    tokens, targets = np.zeros((2, length), np.int32)
    weights = np.zeros(length, np.float32)
    starts = np.full(length, -1, np.int32)
    place = 0
    for ids, counts in items:
        stop = place + ids.size - 1
        tokens[place:stop], targets[place:stop] = ids[:-1], ids[1:]
        weights[place:stop], starts[place:stop] = counts, place
        place = stop
    return Row(tokens, targets, weights, starts)
