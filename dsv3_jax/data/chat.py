"""Conversations as token ids, and which of them are learnt: what the assistant says, turn by turn, its closing token included.

What turn i says is what the template writes for the messages up to it, less what it writes for those before it with the
opening of an answer: exactly what a model that has read a prompt has to continue with. A template that tells a conversation
otherwise, as those of reasoning models do that drop the thoughts of earlier turns, is refused by the line it fails for.
The text is cut into tokens at the borders of turns too, as a prompt ends there at inference.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from dsv3_jax.config import DataConfig
from dsv3_jax.config.checks import check
from dsv3_jax.data.chat_template import ChatTemplate, Piece, encode_pieces, escape_special_tokens
from dsv3_jax.data.corpus import split_by_name
from dsv3_jax.data.rows import Row
from dsv3_jax.data.sources import Document, Record, paired, records, source_files
from dsv3_jax.data.storage import NpyFile, digest, load_or_make
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.data.tokens import ValidationWindows

_CONVERSATIONS_AT_ONCE = 256
# Of each stored number; the rest is the id.
_IN_LOSS = np.uint32(1 << 31)
_LAST = np.uint32(1 << 30)
_ID = np.uint32((1 << 30) - 1)


class Encoded(NamedTuple):
    """One conversation of n tokens."""

    ids: np.ndarray
    """int32 [n]."""
    is_in_loss: np.ndarray
    """bool [n]; what the assistant says."""
    is_text: np.ndarray
    """bool [n]; those of them that spell text, and are not marks of the template."""
    said: str
    """That text."""


class ChatTokens:
    """All conversations one after the other, in memory or in one file."""

    def __init__(self, stored: np.ndarray | NpyFile) -> None:
        """Args: stored: uint32 [N], ids with two flags."""
        self._stored = stored
        whole = stored[:]
        self.ends = np.flatnonzero(whole & _LAST) + 1
        """Where each conversation ends, int64."""
        self.in_loss = np.flatnonzero(whole & _IN_LOSS)
        """Where the tokens lie that are learnt, int64, growing."""

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids start..stop-1, int32, and whether each is learnt, bool."""
        stored = self._stored[start:stop]
        return (stored & _ID).astype(np.int32), (stored & _IN_LOSS) != 0


def tokenize_chat(
    conversations: list[Conversation], template: ChatTemplate, tokenizer: Tokenizer, cache_dir: str
) -> ChatTokens:
    """The ids of all conversations, kept in `cache_dir`.

    Raises:
      ValueError: as `encode_conversations` does.
    """
    special = json.dumps(template.special_tokens, sort_keys=True)
    parts = conversations_digest(conversations), tokenizer.to_json(), template.source, special, tokenizers.__version__
    assert tokenizer.vocab_size <= _ID

    def load(path: Path) -> ChatTokens:
        stored = NpyFile(path)
        check(stored.dtype == np.uint32, f"holds {stored.dtype}, not uint32")
        tokens = ChatTokens(stored)
        is_whole = tokens.ends.size == len(conversations) and tokens.ends[-1] == stored.size
        check(is_whole, "conversations are missing")
        return tokens

    def write(path: Path) -> None:
        stored = []
        for encoded in encode_conversations(conversations, template, tokenizer):
            stored.append(encoded.ids.astype(np.uint32) | np.where(encoded.is_in_loss, _IN_LOSS, np.uint32(0)))
            stored[-1][-1] |= _LAST
        np.save(path, np.concatenate(stored))

    return load_or_make(Path(cache_dir) / f"chat-{digest(*parts)}.npy", load, write)


def encode_conversations(
    conversations: Sequence[Conversation], template: ChatTemplate, tokenizer: Tokenizer
) -> Iterator[Encoded]:
    """Each conversation as tokens; many are encoded at once, on all cores.

    Raises:
      ValueError: naming the line, if the template refuses the conversation, tells it otherwise with later messages than
        without, closes the assistant's turns with no token of their own, or writes the time.
    """
    template = template.with_clock(_no_clock)
    for start in range(0, len(conversations), _CONVERSATIONS_AT_ONCE):
        batch = [
            _pieces(conversation, template, tokenizer) for conversation in conversations[start : start + _CONVERSATIONS_AT_ONCE]
        ]
        encoded = iter(encode_pieces(tokenizer, [piece for pieces in batch for piece, _ in pieces]))
        for pieces in batch:
            yield _joined([(piece, in_loss, next(encoded)) for piece, in_loss in pieces])


def _joined(pieces: list[tuple[Piece, bool, list[int]]]) -> Encoded:
    ids = [id_ for _, _, ids in pieces for id_ in ids]
    in_loss = [is_in_loss for _, is_in_loss, ids in pieces for _ in ids]
    text = [is_in_loss and piece.token is None for piece, is_in_loss, ids in pieces for _ in ids]
    said = "".join(piece.text for piece, is_in_loss, _ in pieces if is_in_loss and piece.token is None)
    return Encoded(np.array(ids, np.int32), np.array(in_loss, bool), np.array(text, bool), said)


def _pieces(conversation: Conversation, template: ChatTemplate, tokenizer: Tokenizer) -> list[tuple[Piece, bool]]:
    """The rendered conversation in pieces, each with whether it is learnt."""
    marked = escape_special_tokens(tokenizer, conversation.messages, {"tools": conversation.tools})
    try:
        spans = _spans(marked.messages, template, marked.variables["tools"])
    except ValueError as error:
        raise ValueError(f"{conversation.where}: {error}") from error
    found = []
    for text, is_in_loss in spans:
        pieces = marked.pieces(text)
        if is_in_loss:
            closing = [piece for piece in pieces if not piece.text.isspace()][-1:]
            check(
                bool(closing) and closing[0].token is not None,
                f"{conversation.where}: {template.origin} closes the assistant's turn with {text[-20:]!r} and no special "
                "token, so a model would never learn to stop; use a template that does",
            )
        found += [(piece, is_in_loss) for piece in pieces]
    return found


def _spans(messages: list[dict], template: ChatTemplate, tools: object) -> list[tuple[str, bool]]:
    """The rendered text, cut where the assistant begins and ends to speak; what it says is True."""
    whole = template.render(messages, tools=tools)
    spans, place = [], 0
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = template.render(messages[:number], add_generation_prompt=True, tools=tools)
        after = template.render(messages[: number + 1], tools=tools)
        check(
            whole.startswith(after) and after.startswith(before) and place <= len(before) < len(after),
            f"{template.origin} writes the messages before message {number}, an answer, otherwise once it or later ones are "
            "there, so what it says cannot be told apart; split the conversation, or use a template that changes no turn",
        )
        spans += [(whole[place : len(before)], False), (whole[len(before) : len(after)], True)]
        place = len(after)
    return [(text, is_in_loss) for text, is_in_loss in [*spans, (whole[place:], False)] if text]


def _no_clock() -> datetime.datetime:
    raise ValueError(
        "the chat template writes the time (strftime_now), so a run would not read the same text tomorrow; write a date into it"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Conversations packed into rows: whole ones, side by side, the rest of a row padded.


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
        in_loss = np.append(conversations.in_loss, conversations.ends[-1])
        first_in_loss = in_loss[np.searchsorted(in_loss, self._starts + 1)]
        self._used = np.flatnonzero(first_in_loss <= self._starts + self._targets)
        check(
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
            ids, is_in_loss = self._tokens.read(start, start + self._targets[conversation] + 1)
            items.append((ids, is_in_loss[1:]))
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
) -> ValidationWindows:
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
    check(bool(items), "the assistant says nothing in the held-out conversations; raise data.heldout_fraction")
    lengths = np.array([ids.size - 1 for ids, _ in items], np.int64)
    members, ends = _first_fit(np.arange(lengths.size), lengths, sequence_length)
    rows = [_row([items[member] for member in row], sequence_length) for row in np.split(members, ends[:-1])]
    num_bytes = sum(len(encoded.said.encode("utf-8")) for encoded in conversations)
    return ValidationWindows.of_rows(rows, num_bytes, batch_size, across_documents=across_documents)


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


# ----------------------------------------------------------------------------------------------------------------------
# Conversations from JSONL files, split into training and held-out ones.


ASSISTANT = "assistant"


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One line."""

    name: str
    """File and number of the line."""
    where: str
    """The same with the whole path, for messages."""
    messages: list[dict[str, Any]]
    tools: Any
    """What the line gives as "tools"; None without."""

    @functools.cached_property
    def words(self) -> str:
        """What is said in it word by word, system prompts aside, by which copies are found."""
        contents = (message.get("content") or "" for message in self.messages if message["role"] != "system")
        return " ".join(" ".join(contents).lower().split())


@dataclasses.dataclass(frozen=True)
class ChatCorpus:
    """Training and held-out conversations."""

    train: list[Conversation]
    validation_conversations: list[Conversation]
    copies: int
    """Held-out conversations dropped because training ones say the same, word by word."""
    validation: list[Document] = dataclasses.field(default_factory=list)
    """What is scored of the held-out conversations: the assistant's words, as the template writes them."""

    @functools.cached_property
    def train_digest(self) -> str:
        """Of the training conversations, in order."""
        return conversations_digest(self.train)

    @functools.cached_property
    def validation_digest(self) -> str:
        """Of the held-out ones."""
        return conversations_digest(self.validation_conversations)

    @property
    def report(self) -> str:
        """One line."""
        turns = sum(message["role"] == ASSISTANT for conversation in self.train for message in conversation.messages)
        return (
            f"train on {len(self.train):,} conversations with {turns:,} turns of the assistant; hold out "
            f"{len(self.validation_conversations):,} (copies dropped: {self.copies})"
        )


def conversations_digest(conversations: list[Conversation]) -> str:
    """Of the names and all that a template sees."""
    return digest(*(part for c in conversations for part in (c.name, json.dumps([c.messages, c.tools], sort_keys=True))))


def load_chat_corpus(config: DataConfig) -> ChatCorpus:
    """Reads the conversations of `config.source`, and holds some out by the hash of their names.

    Raises:
      ValueError: naming the file or line, if it holds no conversation, or there are too few to hold one out.
    """
    conversations: list[Conversation] = []
    for file in source_files(config.source, "data.source"):
        check(
            file.is_jsonl,
            f"data.source {config.source!r}: {file.name} is no .jsonl file, as data.kind chat takes them; move it away",
        )
        conversations += (_conversation(record) for record in records(file.read().split(b"\n"), file))
    check(
        len(conversations) >= 2,
        f"data.source {config.source!r} holds {len(conversations)} conversations; it takes at least 2, one to hold out",
    )
    train, validation = split_by_name(conversations, config.heldout_fraction)
    # Runs of words, by which copies of texts are found, would not do: prompts of one kind are alike, and answers short.
    trained = {one.words for one in train}
    kept = [one for one in validation if one.words not in trained]
    check(
        bool(kept),
        f"data.source {config.source!r}: nothing is left to hold out, as every one of the {len(validation)} conversations "
        "chosen by name is also a training one; remove the copies or raise data.heldout_fraction",
    )
    return ChatCorpus(train, kept, len(validation) - len(kept))


def _conversation(record: Record) -> Conversation:
    messages = record.values.get("messages")
    if not isinstance(messages, list) or not messages:
        looks_like = "; texts take data.kind text" if "text" in record.values else ""
        raise ValueError(
            f'{record.where} has no "messages"; each line must be an object like '
            f'{{"messages": [{{"role": "user", "content": "..."}}, ...]}}{looks_like}'
        )
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        check(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and (isinstance(content, str) or (content is None and bool(message.get("tool_calls")))),
            f'{record.where}: message {number} needs a "role" and a "content", both strings (no content beside "tool_calls")',
        )
    check(
        any(message["role"] == ASSISTANT for message in messages),
        f"{record.where} has no message of the role {ASSISTANT!r}, so nothing in it can be learnt; remove the line",
    )
    # JSON can spell halves of surrogate pairs, wherever there is text.
    whole = _each_text(messages), _each_text(record.values.get("tools"))
    return Conversation(record.name, record.where, *whole)


def _each_text(value: Any) -> Any:
    if isinstance(value, str):
        return paired(value)
    if isinstance(value, dict):
        return {paired(key): _each_text(item) for key, item in value.items()}
    return [_each_text(item) for item in value] if isinstance(value, list) else value
