"""Conversations as tokens: what is learnt is what the assistant says, and the template is held to telling it."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_jax.data.chat import Conversation, Encoded, encode_conversations, tokenize_chat
from dsv3_jax.data.chat_template import ChatTemplate, encode_prompt
from tests.data.test_chat_template import ASSISTANT, DEEPSEEK, EOS, IDS, TEMPLATE, TOKENIZER, USER

MULTI = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1 é 漢"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]


def conversation(messages: list[dict[str, Any]], number: int = 1) -> Conversation:
    return Conversation(f"a.jsonl:{number}", f"/data/a.jsonl:{number}", messages, None)


def encode(messages: list[dict[str, Any]], template: ChatTemplate = TEMPLATE) -> Encoded:
    (encoded,) = encode_conversations([conversation(messages)], template, TOKENIZER)
    return encoded


def in_loss(encoded: Encoded) -> list[list[int]]:
    """The stretches of learnt tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.is_in_loss.astype(int), [0]])))
    return [encoded.ids[a:b].tolist() for a, b in edges.reshape(-1, 2)]


def test_every_turn_of_the_assistant_is_learnt_with_its_end_and_nothing_else() -> None:
    encoded = encode(MULTI)
    turns = [[*TOKENIZER.encode(text), IDS[EOS]] for text in ("1 é 漢", "2")]
    assert in_loss(encoded) == turns
    # Up to each turn, the ids are the prompt that is given at inference.
    ends = np.flatnonzero(np.diff(encoded.is_in_loss.astype(int)) == 1) + 1
    for end, number in zip(ends, (2, 4), strict=True):
        assert encoded.ids[:end].tolist() == encode_prompt(TEMPLATE, TOKENIZER, MULTI[:number])
    assert encoded.ids.tolist() == encode_prompt(TEMPLATE, TOKENIZER, MULTI, add_generation_prompt=False)
    assert encoded.said == "1 é 漢2"
    assert TOKENIZER.decode(encoded.ids[encoded.is_text]) == encoded.said
    assert encoded.is_in_loss.sum() - encoded.is_text.sum() == 2


def test_what_follows_the_last_answer_is_not_learnt() -> None:
    encoded = encode([*MULTI, {"role": "user", "content": "Three?"}])
    assert in_loss(encoded) == in_loss(encode(MULTI))
    assert encoded.ids[-7:].tolist() != encode(MULTI).ids[-7:].tolist()


def test_what_is_spelt_is_learnt_as_text() -> None:
    said = f"I say {ASSISTANT} and {EOS}"
    encoded = encode([{"role": "user", "content": USER}, {"role": "assistant", "content": said}])
    assert encoded.said == said
    assert [id_ for id_ in encoded.ids if id_ in IDS.values()] == [IDS[t] for t in (*list(IDS)[:1], USER, ASSISTANT, EOS)]


def test_many_are_encoded_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3_jax.data.chat._CONVERSATIONS_AT_ONCE", 3)
    chats = [[{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": f"{n * n}"}] for n in range(10)]
    for one, messages in zip(encode_conversations(list(map(conversation, chats)), TEMPLATE, TOKENIZER), chats, strict=True):
        np.testing.assert_equal(one, encode(messages))


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        # The opening of an answer is not what the answer opens with, as in templates of reasoning models.
        (
            DEEPSEEK.replace("{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜><think>' }}"),
            "before message 2, an answer, otherwise",
        ),
        # Earlier answers lose something once there are later ones.
        (DEEPSEEK.replace("'assistant' -%}", "'assistant' and loop.last -%}"), "before message 2, an answer, otherwise"),
        (DEEPSEEK.replace(" + '<｜end▁of▁sentence｜>'", ""), "closes the assistant's turn with '1 é 漢' and no special token"),
        ("{{ raise_exception('never') }}", "refuses the messages .*never"),
        (DEEPSEEK + "{{ strftime_now('%Y') }}", "writes the time"),
    ],
)
def test_a_template_that_does_not_tell_what_is_said_is_refused_by_line(source: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=rf"^/data/a\.jsonl:1: .*{complaint}"):
        encode(MULTI, ChatTemplate(source, TEMPLATE.special_tokens))


def test_the_clock_is_there_at_inference() -> None:
    before, template = datetime.datetime.now(), ChatTemplate("{{ strftime_now('%Y') }}", {})
    written = int(TOKENIZER.decode(encode_prompt(template, TOKENIZER, MULTI)))
    assert before.year <= written <= datetime.datetime.now().year


@pytest.mark.parametrize("harm", [b"", "half"])
def test_tokens_are_kept_and_made_again_when_broken(tmp_path: Path, harm: bytes | str) -> None:
    chats = [conversation(MULTI[: 3 + 2 * (n % 2)], n) for n in range(20)]
    first = tokenize_chat(chats, TEMPLATE, TOKENIZER, str(tmp_path))
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if harm == "half" else b"")
    again = tokenize_chat(chats, TEMPLATE, TOKENIZER, str(tmp_path))
    assert file.read_bytes() == content
    with pytest.raises(ValueError, match=r"chat-.*npy was changed while the run goes on"):
        first[0:5]
    start = 0
    for one, end in zip(chats, np.flatnonzero(again[:] >> 30 & 1) + 1, strict=True):
        stored, expected = again[start:end], encode(one.messages)
        np.testing.assert_array_equal(stored & (2**30 - 1), expected.ids)
        np.testing.assert_array_equal(stored >> 31 == 1, expected.is_in_loss)
        start = end
    tokenize_chat(chats, ChatTemplate(DEEPSEEK + " ", TEMPLATE.special_tokens), TOKENIZER, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
