"""Conversations from JSONL files, split into training and held-out ones.

Each line is an object {"messages": [{"role": ..., "content": ...}, ...]}, as most fine-tuning data and every chat template have
them; "tools" beside the messages is given to the template. Lines that do not look so are refused by their number.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

from dsv3_jax.config import DataConfig
from dsv3_jax.config.checks import require
from dsv3_jax.data.cache import digest
from dsv3_jax.data.corpus import split_by_name
from dsv3_jax.data.sources import Document, Record, paired, records, source_files

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
    heldout_conversations: list[Conversation]
    copies: int
    """Held-out conversations dropped because training ones say the same, word by word."""
    heldout: list[Document] = dataclasses.field(default_factory=list)
    """What is scored of the held-out conversations: the assistant's words, as the template writes them."""

    @functools.cached_property
    def train_digest(self) -> str:
        """Of the training conversations, in order."""
        return conversations_digest(self.train)

    @functools.cached_property
    def heldout_digest(self) -> str:
        """Of the held-out ones."""
        return conversations_digest(self.heldout_conversations)

    @property
    def report(self) -> str:
        """One line."""
        turns = sum(message["role"] == ASSISTANT for conversation in self.train for message in conversation.messages)
        return (
            f"train on {len(self.train):,} conversations with {turns:,} turns of the assistant; hold out "
            f"{len(self.heldout_conversations):,} (copies dropped: {self.copies})"
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
        require(
            file.is_jsonl,
            f"data.source {config.source!r}: {file.name} is no .jsonl file, as data.kind chat takes them; move it away",
        )
        conversations += (_conversation(record) for record in records(file.read().split(b"\n"), file))
    require(
        len(conversations) >= 2,
        f"data.source {config.source!r} holds {len(conversations)} conversations; it takes at least 2, one to hold out",
    )
    train, heldout = split_by_name(conversations, config.heldout_fraction)
    # Runs of words, by which copies of texts are found, would not do: prompts of one kind are alike, and answers short.
    learnt = {one.words for one in train}
    kept = [one for one in heldout if one.words not in learnt]
    require(
        bool(kept),
        f"data.source {config.source!r}: nothing is left to hold out, as every one of the {len(heldout)} conversations "
        "chosen by name is also a training one; remove the copies or raise data.heldout_fraction",
    )
    return ChatCorpus(train, kept, len(heldout) - len(kept))


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
        require(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and (isinstance(content, str) or (content is None and bool(message.get("tool_calls")))),
            f'{record.where}: message {number} needs a "role" and a "content", both strings (no content beside "tool_calls")',
        )
    require(
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
