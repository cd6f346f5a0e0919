"""Conversations as token ids, and which of them are learnt: what the assistant says, turn by turn, its closing token included.

What turn i says is what the template writes for the messages up to it, less what it writes for those before it with the
opening of an answer: exactly what a model that has read a prompt has to continue with. A template that tells a conversation
otherwise, as those of reasoning models do that drop the thoughts of earlier turns, is refused by the line it fails for.
The text is cut into tokens at the borders of turns too, as a prompt ends there at inference.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

from dsv3_jax.config.checks import require
from dsv3_jax.data.cache import digest, load_or_make
from dsv3_jax.data.chat_corpus import ASSISTANT, Conversation, conversations_digest
from dsv3_jax.data.chat_template import ChatTemplate, Piece, encode_pieces, mark_spelt_tokens
from dsv3_jax.data.npy_file import NpyFile
from dsv3_jax.data.tokenizer import Tokenizer

_CONVERSATIONS_AT_ONCE = 256
# Of each stored number; the rest is the id.
_LEARNT = np.uint32(1 << 31)
_LAST = np.uint32(1 << 30)
_ID = np.uint32((1 << 30) - 1)


class Encoded(NamedTuple):
    """One conversation of n tokens."""

    ids: np.ndarray
    """int32 [n]."""
    is_learnt: np.ndarray
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
        self.learnt = np.flatnonzero(whole & _LEARNT)
        """Where the tokens lie that are learnt, int64, growing."""

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids start..stop-1, int32, and whether each is learnt, bool."""
        stored = self._stored[start:stop]
        return (stored & _ID).astype(np.int32), (stored & _LEARNT) != 0


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
        require(stored.dtype == np.uint32, f"holds {stored.dtype}, not uint32")
        tokens = ChatTokens(stored)
        is_whole = tokens.ends.size == len(conversations) and tokens.ends[-1] == stored.size
        require(is_whole, "conversations are missing")
        return tokens

    def write(path: Path) -> None:
        stored = []
        for encoded in encode_conversations(conversations, template, tokenizer):
            stored.append(encoded.ids.astype(np.uint32) | np.where(encoded.is_learnt, _LEARNT, np.uint32(0)))
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
            yield _joined([(piece, learnt, next(encoded)) for piece, learnt in pieces])


def _joined(pieces: list[tuple[Piece, bool, list[int]]]) -> Encoded:
    ids = [id_ for _, _, ids in pieces for id_ in ids]
    learnt = [is_learnt for _, is_learnt, ids in pieces for _ in ids]
    text = [is_learnt and piece.token is None for piece, is_learnt, ids in pieces for _ in ids]
    said = "".join(piece.text for piece, is_learnt, _ in pieces if is_learnt and piece.token is None)
    return Encoded(np.array(ids, np.int32), np.array(learnt, bool), np.array(text, bool), said)


def _pieces(conversation: Conversation, template: ChatTemplate, tokenizer: Tokenizer) -> list[tuple[Piece, bool]]:
    """The rendered conversation in pieces, each with whether it is learnt."""
    marked = mark_spelt_tokens(tokenizer, conversation.messages, {"tools": conversation.tools})
    try:
        spans = _spans(marked.messages, template, marked.variables["tools"])
    except ValueError as error:
        raise ValueError(f"{conversation.where}: {error}") from error
    found = []
    for text, is_learnt in spans:
        pieces = marked.pieces(text)
        if is_learnt:
            closing = [piece for piece in pieces if not piece.text.isspace()][-1:]
            require(
                bool(closing) and closing[0].token is not None,
                f"{conversation.where}: {template.origin} closes the assistant's turn with {text[-20:]!r} and no special "
                "token, so a model would never learn to stop; use a template that does",
            )
        found += [(piece, is_learnt) for piece in pieces]
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
        require(
            whole.startswith(after) and after.startswith(before) and place <= len(before) < len(after),
            f"{template.origin} writes the messages before message {number}, an answer, otherwise once it or later ones are "
            "there, so what it says cannot be told apart; split the conversation, or use a template that changes no turn",
        )
        spans += [(whole[place : len(before)], False), (whole[len(before) : len(after)], True)]
        place = len(after)
    return [(text, is_learnt) for text, is_learnt in [*spans, (whole[place:], False)] if text]


def _no_clock() -> datetime.datetime:
    raise ValueError(
        "the chat template writes the time (strftime_now), so a run would not read the same text tomorrow; write a date into it"
    )
