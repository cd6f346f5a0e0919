"""Conversations as tokens: what is learnt is what the assistant says, and the template is held to telling it."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.data.chat import ChatRows, Conversation, Encoded, encode_conversations, tokenize_chat
from dsv3_jax.data.chat_template import ChatTemplate, encode_prompt, read_messages
from tests.data.conversations import Generator, assert_consistent
from tests.data.test_chat_template import ASSISTANT, DEEPSEEK, EOS, IDS, TEMPLATE, THINK, TOKENIZER, USER

MODEL = dataclasses.replace(ModelConfig(), vocab_size=TOKENIZER.vocab_size)
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
    marks = [IDS[token] for token in (*list(IDS)[:1], USER, ASSISTANT, ASSISTANT, EOS)]
    assert [id_ for id_ in encoded.ids if id_ in IDS.values()] == marks
    assert TOKENIZER.decode(encoded.ids[encoded.is_in_loss]) == said  # It leaves out special tokens alone.


def test_many_are_encoded_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3_jax.data.chat._CONVERSATIONS_AT_ONCE", 3)
    chats = [[{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": f"{n * n}"}] for n in range(10)]
    for one, messages in zip(encode_conversations(list(map(conversation, chats)), TEMPLATE, TOKENIZER), chats, strict=True):
        np.testing.assert_equal(one, encode(messages))


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        # The question is written otherwise once there is an answer.
        (DEEPSEEK.replace("{{ bos_token }}", "{{ bos_token }}{{ messages | length }}"), r"before messages\[2\], an answer"),
        (DEEPSEEK.replace(" + '<｜end▁of▁sentence｜>'", ""), "closes the assistant's turn with '1 é 漢' and no special token"),
        ("{{ raise_exception('never') }}", "refuses the messages .*never"),
        (DEEPSEEK + "{{ strftime_now('%Y') }}", "writes the time"),
    ],
)
def test_a_template_that_does_not_tell_what_is_said_is_refused_by_line(source: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=rf"^/data/a\.jsonl:1: .*{complaint}"):
        encode(MULTI, ChatTemplate(source, TEMPLATE.special_tokens))


def test_the_clock_is_there_at_inference() -> None:
    before, template = datetime.datetime.now(), ChatTemplate("{{ strftime_now('%Y') }} {{ messages[0].content }}", {})
    written = int(TOKENIZER.decode(encode_prompt(template, TOKENIZER, MULTI[1:2])).split()[0])
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
        np.testing.assert_array_equal(stored & (2**26 - 1), expected.ids)
        np.testing.assert_array_equal(stored >> 31 == 1, expected.is_in_loss)
        start = end
    tokenize_chat(chats, ChatTemplate(DEEPSEEK + " ", TEMPLATE.special_tokens), TOKENIZER, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Thoughts


# What DeepSeek-R1's own does: prompts open thoughts, and of an answer that is there the thoughts are left out.
R1 = DEEPSEEK.replace("+ message['content'] + '<｜end", "+ message['content'].split('</think>')[-1] + '<｜end").replace(
    "{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜><think>\\n' }}"
)
# What DeepSeek-V3.1's own does: a switch opens thoughts, and an answer that is there has closed ones.
V31 = DEEPSEEK.replace(
    "{{ '<｜Assistant｜>' + message['content'] +", "{{ '<｜Assistant｜></think>' + message['content'].split('</think>')[-1] +"
).replace("{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}")
ONE = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "<think>because</think>answer"}]


def spelt(ids: np.ndarray) -> str:
    """Text of ids, special tokens included."""
    return "".join(TOKENIZER.added_tokens.get(int(i)) or TOKENIZER.decode([int(i)]) for i in ids)


def answered(content: str, **keys: Any) -> list[dict[str, Any]]:
    return [ONE[0], {"role": "assistant", "content": content, **keys}]


@pytest.mark.parametrize(
    ("source", "switches", "messages", "prompt", "learnt"),
    [
        (DEEPSEEK, {}, ONE, "", "<think>because</think>answer"),
        (R1, {}, ONE, "<think>\n", "because</think>answer"),
        (R1, {}, answered("<think>\nbecause\n</think>\n\nanswer"), "<think>\n", "because\n</think>\n\nanswer"),
        (R1, {}, answered("answer", reasoning_content="because"), "<think>\n", "because\n</think>\n\nanswer"),
        (R1, {}, answered("answer", reasoning_content="because\n"), "<think>\n", "because\n</think>\n\nanswer"),
        (R1, {}, answered("answer"), "<think>\n", "\n</think>\n\nanswer"),
        (V31, {}, ONE, "</think>", "answer"),
        (V31, {}, answered("answer"), "</think>", "answer"),
        (V31, {"thinking": True}, ONE, "<think>", "because</think>answer"),
        (V31, {"thinking": True}, answered("answer", reasoning_content="because"), "<think>", "because</think>answer"),
        (V31, {"thinking": True}, answered("answer"), "<think>", "</think>answer"),
    ],
)
def test_an_answer_is_learnt_as_the_continuation_of_its_prompt(
    source: str, switches: dict[str, Any], messages: list[dict[str, Any]], prompt: str, learnt: str
) -> None:
    template = ChatTemplate(source, TEMPLATE.special_tokens)
    one = dataclasses.replace(conversation(read_messages(messages)), switches=switches)
    (found,) = encode_conversations([one], template, TOKENIZER)
    at_inference = encode_prompt(template, TOKENIZER, messages[:1], **switches)
    assert found.ids[: len(at_inference)].tolist() == at_inference
    assert found.is_in_loss.tolist() == [False] * len(at_inference) + [True] * (found.ids.size - len(at_inference))
    assert spelt(np.array(at_inference)).endswith(ASSISTANT + prompt)
    assert spelt(found.ids[found.is_in_loss]) == learnt + EOS
    # Thoughts are opened by their token, whoever writes it.
    assert list(found.ids).count(IDS[THINK]) == spelt(found.ids).count(THINK)
    assert len(found.dropped) == (source == V31 and not switches and "because" in str(messages))
    assert len(found.emptied) == (prompt.startswith(THINK) and "because" not in str(messages))


def test_a_conversation_whose_turns_change_is_one_sequence_for_each_answer() -> None:
    messages = [*ONE, {"role": "user", "content": "And?"}, *answered("<think>so</think>that")[1:]]
    template = ChatTemplate(R1, TEMPLATE.special_tokens)
    first, second = encode_conversations([conversation(messages)], template, TOKENIZER)
    assert (first.is_complete, second.is_complete) == (False, True)
    for found, number, learnt in ((first, 1, "because</think>answer"), (second, 3, "so</think>that")):
        prompt = encode_prompt(template, TOKENIZER, messages[:number])
        assert found.ids[~found.is_in_loss].tolist() == prompt
        assert spelt(found.ids[found.is_in_loss]) == learnt + EOS
    # Of the first answer only what the template keeps is in the prompt of the second.
    assert "because" not in spelt(second.ids)


def test_what_a_template_changes_is_counted_in_the_report(tmp_path: Path) -> None:
    def report(source: str, *chats: list[dict[str, Any]]) -> str:
        conversations = [conversation(read_messages(messages), n) for n, messages in enumerate(chats)]
        stored = tokenize_chat(conversations, ChatTemplate(source, TEMPLATE.special_tokens), TOKENIZER, str(tmp_path))
        return ChatRows(stored, 64, 0).report.partition("begins before: 0")[2]

    two = [*ONE, *answered("b", reasoning_content="so")]
    assert report(DEEPSEEK, MULTI, ONE) == ""
    assert report(V31, ONE, two, answered("a")) == "; answers learnt without their thoughts, which the template leaves out: 3"
    assert report(R1, two, answered("a")) == (
        "; one sequence per answer where the template changes earlier turns, in all 3"
        "; answers without thoughts learnt with empty ones, as the template opens thoughts: 1"
    )


@pytest.mark.parametrize("source", [DEEPSEEK, R1, V31], ids=["plain", "opens thoughts", "leaves thoughts out"])
def test_a_conversation_has_the_same_ids_everywhere(source: str, tmp_path: Path) -> None:
    """Random ones; tests/parity/test_conversations.py takes more of them through published templates."""
    template = ChatTemplate(source, TEMPLATE.special_tokens)
    generator = Generator(0, [*IDS, "</think>", "<｜User", "｜>"], calls=False)
    for _ in range(60):
        assert assert_consistent(generator.conversation(), template, TOKENIZER, MODEL, tmp_path)


@pytest.mark.parametrize(
    ("source", "switches", "message", "expected"),
    [
        (DEEPSEEK, {}, {"content": "<think>beca"}, "<think>beca"),
        (DEEPSEEK, {}, {"content": "", "reasoning_content": "beca"}, "<think>beca"),
        (R1, {}, {"content": "<think>\nbeca"}, "<think>\nbeca"),
        (R1, {}, {"content": "<think>\nbecause\n</think>\n\nans"}, "<think>\nbecause\n</think>\n\nans"),
        (R1, {}, {"content": "ans", "reasoning_content": "because"}, "<think>\nbecause\n</think>\n\nans"),
        (R1, {}, {"content": "ans"}, "<think>\n\n</think>\n\nans"),
        (R1, {}, {"content": ""}, "<think>\n"),
        (V31, {"thinking": True}, {"content": "<think>beca"}, "<think>beca"),
        (V31, {"thinking": True}, {"content": "", "reasoning_content": "beca"}, "<think>beca"),
        (V31, {"thinking": True}, {"content": "<think>because</think>ans"}, "<think>because</think>ans"),
        (V31, {}, {"content": "ans"}, "</think>ans"),
    ],
)
def test_an_unfinished_answer_is_the_beginning_of_what_is_learnt(
    source: str, switches: dict[str, Any], message: dict[str, Any], expected: str
) -> None:
    template = ChatTemplate(source, TEMPLATE.special_tokens)
    ids = encode_prompt(template, TOKENIZER, [ONE[0], {"role": "assistant", **message}], **switches)
    assert spelt(np.array(ids)).partition(ASSISTANT)[2] == expected
    assert ids.count(IDS[THINK]) == expected.count(THINK)


def test_thoughts_with_the_same_words_as_the_answer_are_missed_when_they_are_gone() -> None:
    template = ChatTemplate(V31, TEMPLATE.special_tokens)
    for messages in (answered("<think>Paris</think>Paris."), answered("It is 42.", reasoning_content="42")):
        (found,) = encode_conversations([conversation(read_messages(messages))], template, TOKENIZER)
        assert len(found.dropped) == 1
    (found,) = encode_conversations(
        [conversation(answered("<think>a</think>b</think>c"))], ChatTemplate(R1, TEMPLATE.special_tokens), TOKENIZER
    )
    assert spelt(found.ids[found.is_in_loss]) == "a</think>b</think>c" + EOS


def test_only_conversations_that_version_0_2_0_read_alike_keep_the_digest_of_a_run(tmp_path: Path) -> None:
    def encoding(source: str, *chats: list[dict[str, Any]]) -> str:
        template = ChatTemplate(source, TEMPLATE.special_tokens)
        return ChatRows(tokenize_chat(list(map(conversation, chats)), template, TOKENIZER, str(tmp_path)), 64, 0).encoding

    assert encoding(DEEPSEEK, MULTI, answered(f"I say {EOS}")) == ""
    assert encoding(V31, MULTI) == ""
    assert encoding(DEEPSEEK, MULTI, ONE) == "2"
    assert encoding(R1, answered("a")) == "2"
    assert encoding(R1, [*ONE, *ONE]) == "2"


def test_tools_are_no_words_of_the_answer_behind_them() -> None:
    """Tools that spell </think> stay text, in an unfinished answer and where earlier turns change."""
    tools = [{"name": THINK}]
    shows = "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}"
    for source in (DEEPSEEK, R1):
        template = ChatTemplate(source.replace("{{ bos_token }}", shows), TEMPLATE.special_tokens)
        ids = encode_prompt(template, TOKENIZER, answered("a"), tools=tools)
        assert ids.count(IDS[THINK]) == (source == R1)
        one = dataclasses.replace(conversation(read_messages([*ONE, *answered("a")])), tools=tools)
        for found in encode_conversations([one], template, TOKENIZER):
            assert IDS[THINK] not in found.ids[: found.ids.tolist().index(IDS[USER])]
            assert found.ids[: found.is_in_loss.argmax()].tolist() in (
                encode_prompt(template, TOKENIZER, [*ONE, *answered("a")][:n], tools=tools) for n in (1, 3)
            )
