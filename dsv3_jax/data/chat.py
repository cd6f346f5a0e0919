"""Conversations as rows of token ids whose loss covers the assistant's turns, each with its closing token.

A turn is learnt as the continuation of its prompt at inference: the rendering of the messages before it and the opening of an
answer. Templates of reasoning models differ between the two in two ways. If one renders earlier turns differently once later
ones are there, for example without their thoughts, the conversation becomes one sequence per answer. If one opens prompts
with <think> but no answer that is there, as R1's does, the answer is learnt with its thoughts, or with empty ones. Text is
also cut into tokens at the borders of turns, as a prompt ends there at inference.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from dsv3_jax.config import DataConfig
from dsv3_jax.config.checks import check
from dsv3_jax.data.chat_template import (
    ASSISTANT,
    Answer,
    ChatTemplate,
    Piece,
    answer_to,
    check_traces,
    encode_pieces,
    own_words,
    read_messages,
    read_switches,
    read_tools,
    split_pieces,
)
from dsv3_jax.data.corpus import Split, digest_of, split_by_name
from dsv3_jax.data.rows import Row
from dsv3_jax.data.sources import Record, paired, records, source_files
from dsv3_jax.data.storage import NpyFile, cached_tokens, digest
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.data.tokens import ValidationWindows
from dsv3_jax.data.traced import TEMPLATE, Traced

_CONVERSATIONS_AT_ONCE = 256
# Flags of a stored number; the other bits are the id.
_IN_LOSS = np.uint32(1 << 31)
_LAST = np.uint32(1 << 30)
# Of the first token of an answer: its thoughts are left out; it has none, and is learnt with empty ones.
_DROPPED, _EMPTY = np.uint32(1 << 29), np.uint32(1 << 28)
# Of the last token of a conversation, where `_LAST` is that of a sequence.
_COMPLETE = np.uint32(1 << 27)
# Of a token of the assistant's own words, such as </think>, which version 0.2.0 spelt.
_OWN = np.uint32(1 << 26)
_ID = np.uint32((1 << 26) - 1)
# Rows that may still receive a conversation; beyond these the fullest is closed.
_OPEN_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One line of a JSONL file."""

    name: str
    """Name of the file, ":" and the number of the line."""
    where: str
    """Path and number of the line, for messages."""
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    """The "tools" of the line."""
    switches: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Variables of the template: the "chat_template_kwargs" of the line."""

    @property
    def text(self) -> str:
        """Everything that a template reads, as JSON for digests."""
        switches = [self.switches] if self.switches else []
        return json.dumps([self.messages, self.tools, *switches], sort_keys=True)

    @property
    def words(self) -> str:
        """The words of all messages except system prompts, by which copies are found."""
        contents = (message.get("content") or "" for message in self.messages if message["role"] != "system")
        return " ".join(" ".join(contents).lower().split())


class ChatCorpus(Split[Conversation]):
    """Training and held-out conversations; those with the same words as training ones are dropped."""

    @property
    def report(self) -> str:
        """One line for the log: conversations, answers, held-out conversations, and copies dropped."""
        turns = sum(message["role"] == ASSISTANT for conversation in self.train for message in conversation.messages)
        return (
            f"train on {len(self.train):,} conversations with {turns:,} turns of the assistant; hold out "
            f"{len(self.validation):,} (copies dropped: {self.dropped})"
        )


def load_chat_corpus(config: DataConfig) -> ChatCorpus:
    """Read the conversations of `config.source`, and hold some out by the hash of their names.

    Raises:
      ValueError: naming the file or line, if it holds no conversation, or there are too few to hold one out.
    """
    source = f"data.source {config.source!r}"
    conversations: list[Conversation] = []
    for file in source_files(config.source, "data.source"):
        check(
            file.is_jsonl,
            f"{source}: {file.name} is no .jsonl file, as data.kind chat takes them; move it away (or of an array: "
            "jq -c '.[]' data.json > data.jsonl)",
        )
        conversations += (_conversation(record) for record in records(file.read().split(b"\n"), file))
    count = len(conversations)
    check(count >= 2, f"{source} holds {count} conversations; it takes at least 2, one to hold out")
    train, validation = split_by_name(conversations, config.heldout_fraction)
    # Runs of words, which reveal copies of texts, do not work here: prompts of one kind are similar, and answers short.
    trained = {one.words for one in train}
    kept = [one for one in validation if one.words not in trained]
    check(
        bool(kept),
        f"{source}: nothing is left to hold out, as every one of the {len(validation)} conversations chosen by name is also a "
        "training one; remove the copies or raise data.heldout_fraction",
    )
    return ChatCorpus(train, kept, len(validation) - len(kept))


def _conversation(record: Record) -> Conversation:
    values = json.loads(paired(json.dumps(record.values, ensure_ascii=False)))
    messages = values.get("messages")
    hint = "; texts take data.kind text" if "text" in values else ""
    check(
        isinstance(messages, list) and bool(messages),
        f'{record.where} has no "messages"; each line must be an object like '
        f'{{"messages": [{{"role": "user", "content": "..."}}, ...]}}{hint}',
    )
    try:
        messages, tools = read_messages(messages), read_tools(values.get("tools"))
        switches = read_switches(values.get("chat_template_kwargs"))
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}") from error
    check(
        any(message["role"] == ASSISTANT for message in messages),
        f"{record.where} has no message of the role {ASSISTANT!r}, so nothing in it can be learnt; remove the line",
    )
    return Conversation(record.name, record.where, messages, tools, switches)


# ----------------------------------------------------------------------------------------------------------------------
# Conversations as token ids, cached in one file.


class Encoded(NamedTuple):
    """One conversation, or the part of it that ends with one answer, of n tokens."""

    ids: np.ndarray
    """int32 [n]."""
    is_in_loss: np.ndarray
    """bool [n]; True for the turns of the assistant."""
    is_text: np.ndarray
    """bool [n]; True for the tokens of these turns that spell text, not marks of the template."""
    said: str
    """Text of the assistant's turns."""
    dropped: Sequence[int] = ()
    """First positions of the answers whose thoughts the template leaves out."""
    emptied: Sequence[int] = ()
    """First positions of the answers that are learnt with empty thoughts."""
    is_complete: bool = True
    """True for the last, or only, sequence of a conversation."""
    own: Sequence[int] = ()
    """Positions of special tokens in the assistant's own words."""


def tokenize_chat(conversations: list[Conversation], template: ChatTemplate, tokenizer: Tokenizer, cache_dir: str) -> NpyFile:
    """Return the ids of all conversations with their flags, uint32 [N], kept in `cache_dir`.

    Raises:
      ValueError: as `encode_conversations` does.
    """
    special = json.dumps(template.special_tokens, sort_keys=True)
    key = digest("2", digest_of(conversations), tokenizer.to_json(), template.source, special, tokenizers.__version__)
    assert tokenizer.vocab_size <= _ID

    def make() -> Iterator[np.ndarray]:
        for encoded in encode_conversations(conversations, template, tokenizer):
            stored = encoded.ids.astype(np.uint32) | np.where(encoded.is_in_loss, _IN_LOSS, np.uint32(0))
            stored[list(encoded.dropped)] |= _DROPPED
            stored[list(encoded.emptied)] |= _EMPTY
            stored[list(encoded.own)] |= _OWN
            stored[-1] |= _LAST | (_COMPLETE if encoded.is_complete else np.uint32(0))
            yield stored

    path = Path(cache_dir) / f"chat-{key}.npy"
    return cached_tokens(path, np.dtype(np.uint32), len(conversations), lambda stored: stored & _COMPLETE, make)


def encode_conversations(
    conversations: Sequence[Conversation], template: ChatTemplate, tokenizer: Tokenizer
) -> Iterator[Encoded]:
    """Yield each conversation as tokens, in one sequence or one per answer; encode in batches, on all cores.

    Raises:
      ValueError: naming the line, if the template refuses the conversation, writes the messages before an answer in a way
        that depends on it, closes the assistant's turns without a special token, or writes the time.
    """
    for start in range(0, len(conversations), _CONVERSATIONS_AT_ONCE):
        chunk = conversations[start : start + _CONVERSATIONS_AT_ONCE]
        batch = [_sequences(conversation, template, tokenizer) for conversation in chunk]
        pieces = [piece for sequences in batch for spans in sequences for span in spans for piece in span.pieces]
        encoded = iter(encode_pieces(tokenizer, pieces))
        for sequences in batch:
            for number, spans in enumerate(sequences, 1):
                yield _joined(spans, encoded, number == len(sequences))


def _joined(spans: Sequence[_Span], encoded: Iterator[list[int]], is_complete: bool) -> Encoded:
    """Join spans to one sequence; the ids of their pieces are taken in order from `encoded`."""
    ids: list[int] = []
    said: list[str] = []
    in_loss, is_text = [], []
    dropped: list[int] = []
    emptied: list[int] = []
    own: list[int] = []
    for span in spans:
        first = len(ids)
        for piece in span.pieces:
            more = next(encoded)
            own += [len(ids)] * piece.is_own
            ids += more
            is_said = span.answer is not None and piece.token is None
            said += [piece.text] * is_said
            in_loss += [span.answer is not None] * len(more)
            is_text += [is_said] * len(more)
        if span.answer is not None:
            dropped += [first] * span.answer.is_dropped
            emptied += [first] * span.answer.is_emptied
    flags = np.array(in_loss, bool), np.array(is_text, bool)
    return Encoded(np.array(ids, np.int32), *flags, "".join(said), dropped, emptied, is_complete, own)


class _Span(NamedTuple):
    """A stretch of a sequence: an answer, which is learnt, or text that is not."""

    pieces: list[Piece]
    answer: Answer | None
    """None outside the loss."""


def _sequences(conversation: Conversation, template: ChatTemplate, tokenizer: Tokenizer) -> list[list[_Span]]:
    """Return the conversation as one sequence of spans, or as one per answer if the template changes earlier turns."""
    messages, own = conversation.messages, own_words(conversation.messages)
    variables = {**conversation.switches, "tools": conversation.tools, "strftime_now": _refuse_time}
    render: Callable[..., Traced] = functools.partial(template.render, **variables)
    joined: list[_Span] = []
    apart: list[list[_Span]] = []
    try:
        whole, position = render(messages), 0
        check_traces(template, messages, whole)
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            prompt = render(messages[:number], add_generation_prompt=True)
            until = render(messages[: number + 1])
            answer = answer_to(prompt, until, messages[: number + 1], template, tokenizer)
            span = _Span(split_pieces(answer.text, tokenizer, own), answer)
            _check_closing(span, template)
            apart.append([_Span(split_pieces(prompt, tokenizer, own), None), span])
            if 0 <= position <= len(prompt) and until.startswith(prompt) and whole.startswith(until):
                joined += [_Span(split_pieces(whole[position : len(prompt)], tokenizer, own), None), span]
                position = len(until)
            else:
                position = -1
    except ValueError as error:
        raise ValueError(f"{conversation.where}: {error}") from error
    return apart if position < 0 else [[*joined, _Span(split_pieces(whole[position:], tokenizer, own), None)]]


def _check_closing(span: _Span, template: ChatTemplate) -> None:
    """Raise ValueError unless an answer ends with a special token of the template, space aside."""
    assert span.answer is not None
    last = span.answer.text.rstrip()
    pieces = [piece for piece in span.pieces if not piece.text.isspace()]
    check(
        last.origins[-1:] == TEMPLATE and pieces[-1].token is not None,
        f"{template.origin} closes the assistant's turn with {str.__str__(last[-20:])!r} and no special token, so a model "
        "would never learn to stop; use a template that does",
    )


def _refuse_time(form: str) -> str:
    raise ValueError(
        "the chat template writes the time (strftime_now), so a run would not read the same text tomorrow; write a date into it"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Conversations packed whole into padded rows.


class ChatRows:
    """Rows of conversations, epoch after epoch without end; a `Rows`."""

    def __init__(self, stored: np.ndarray | NpyFile, sequence_length: int, seed: int) -> None:
        """Args: stored: training conversations, as `tokenize_chat` returns them; sequence_length: T; seed: of the orders.

        Raises:
          ValueError: if no conversation has a token of the loss within the length of a row.
        """
        self._stored = stored
        self._length = sequence_length
        self._seed = seed
        whole = stored[:]
        self._changes = _changes(whole)
        self.encoding = "2" if np.any(whole & (_OWN | _EMPTY)) or np.count_nonzero(whole & (_LAST | _COMPLETE) == _LAST) else ""
        """Empty if version 0.2.0 made the same tokens of these conversations, whose runs may go on then."""
        ends = np.flatnonzero(whole & _LAST) + 1
        self._starts = np.concatenate([[0], ends[:-1]])
        self._lengths = ends - self._starts
        # The last token is a target only.
        self._targets = np.minimum(self._lengths - 1, sequence_length)
        # The first token is never a target.
        in_loss = np.append(np.flatnonzero(whole & _IN_LOSS), whole.size)
        first_in_loss = in_loss[np.searchsorted(in_loss, self._starts + 1)]
        self._used = np.flatnonzero(first_in_loss <= self._starts + self._targets)
        check(
            self._used.size > 0,
            f"every one of the {self._targets.size} conversations has a prompt of more than train.sequence_length "
            f"({sequence_length}) tokens; raise it",
        )
        self._first_rows = [0]
        """Number of the first row of each epoch."""
        self._lock = threading.Lock()
        self._packed = functools.lru_cache(maxsize=2)(self._pack)

    def __getitem__(self, number: int) -> Row:
        """Return the row of this number."""
        with self._lock:
            while self._first_rows[-1] <= number:
                self._first_rows.append(self._first_rows[-1] + self._rows_in(len(self._first_rows) - 1))
        epoch = int(np.searchsorted(self._first_rows, number, side="right")) - 1
        members, ends = self._packed(epoch)
        turn = number - self._first_rows[epoch]
        items = []
        for conversation in members[ends[turn - 1] if turn else 0 : ends[turn]]:
            start = self._starts[conversation]
            part = self._stored[start : start + self._targets[conversation] + 1]
            items.append(((part & _ID).astype(np.int32), (part[1:] & _IN_LOSS) != 0))
        return _row(items, self._length)

    def epochs(self, rows: int) -> float:
        """Return the epochs in the first `rows` rows, by the number of rows of the first epoch."""
        return rows / self._rows_in(0)

    @property
    def report(self) -> str:
        """One line for the log: tokens, rows and padding of the first epoch, conversations cut, and changes by the template."""
        rows = self._rows_in(0)
        lost = self._lengths - 1 - self._targets
        padding = 1 - int(self._targets[self._used].sum()) / (rows * self._length)
        return (
            f"{self._lengths.sum():,} tokens in {rows:,} rows, {padding:.1%} of them padding; conversations cut at the end of "
            f"a row: {np.count_nonzero(lost):,} (tokens: {lost.sum():,}), of which left out, as no answer begins before: "
            f"{self._lengths.size - self._used.size:,}{self._changes}"
        )

    def _rows_in(self, epoch: int) -> int:
        return self._packed(epoch)[1].size

    def _pack(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the conversations of an epoch row by row, and the position after each row among them."""
        order = np.random.default_rng([self._seed, 4, epoch]).permutation(self._used)
        return _first_fit(order, self._targets[order], self._length)


def _changes(stored: np.ndarray) -> str:
    """Return in words, for the report, what the template changes in conversations; empty for nothing."""
    flags = _LAST, _COMPLETE, _DROPPED, _EMPTY
    sequences, complete, dropped, emptied = (np.count_nonzero(stored & flag) for flag in flags)
    changes = ""
    if sequences > complete:
        changes += f"; one sequence per answer where the template changes earlier turns, in all {sequences:,}"
    if dropped:
        changes += f"; answers learnt without their thoughts, which the template leaves out: {dropped:,}"
    if emptied:
        changes += f"; answers without thoughts learnt with empty ones, as the template opens thoughts: {emptied:,}"
    return changes


def chat_windows(
    conversations: Sequence[Encoded], *, batch_size: int, sequence_length: int, across_documents: bool
) -> ValidationWindows:
    """Return windows that score each byte of the assistant's turns in held-out conversations once.

    A conversation longer than a window continues in another window, without its earlier part.
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
    stacked = Row(*map(np.stack, zip(*rows, strict=True)))
    num_bytes = sum(len(encoded.said.encode("utf-8")) for encoded in conversations)
    return ValidationWindows(stacked, num_bytes, batch_size=batch_size, across_documents=across_documents)


def _first_fit(order: np.ndarray, lengths: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Put each item into the first open row with room for it.

    Args:
      order: the items, [n].
      lengths: length of each item, [n].
      room: length of a row.

    Returns:
      the items row by row, and the position after each row among them.
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
    """Return one row of items, each the ids [n + 1] and the membership of the targets [n] in the loss."""
    tokens, targets = np.zeros((2, length), np.int32)
    weights = np.zeros(length, np.float32)
    starts = np.full(length, -1, np.int32)
    start = 0
    for ids, in_loss in items:
        stop = start + ids.size - 1
        tokens[start:stop], targets[start:stop] = ids[:-1], ids[1:]
        weights[start:stop], starts[start:stop] = in_loss, start
        start = stop
    return Row(tokens, targets, weights, starts)
