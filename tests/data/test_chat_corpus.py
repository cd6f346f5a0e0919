"""Conversations from JSONL: what is refused, by its line, and what is held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.config import DataConfig
from dsv3_jax.data.chat import ChatCorpus, load_chat_corpus


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_lines(file: Path, lines: list[Any]) -> None:
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")


def load(source: Path, fraction: float = 0.2) -> ChatCorpus:
    return load_chat_corpus(
        DataConfig(source=str(source), kind="chat", cross_document_attention=False, heldout_fraction=fraction)
    )


def test_split_hangs_on_names_and_drops_copies(tmp_path: Path) -> None:
    lines = [chat(f"What is {number}?", f"It is {number}.") for number in range(200)]
    write_lines(tmp_path / "a.jsonl", lines)
    first = load(tmp_path)
    assert len(first.train) + len(first.validation) == 200
    assert 20 < len(first.validation) < 60
    assert first.dropped == 0
    held = first.validation[3]
    lines[int(held.name.split(":")[1]) - 1] = {
        "messages": [{"role": "system", "content": "Be kind."}, *first.train[0].messages]
    }
    write_lines(tmp_path / "a.jsonl", lines)
    second = load(tmp_path)
    assert second.dropped == 1
    assert held.name not in {one.name for one in second.validation}
    assert second.train_digest == first.train_digest
    assert second.validation_digest != first.validation_digest
    assert "turns of the assistant" in first.report


def test_every_conversation_a_copy_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [chat("a", "b")] * 20)
    with pytest.raises(ValueError, match="chosen by name is also a training one; remove the copies"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is list, not an object"),
        ({"text": "x"}, 'has no "messages"; .*; texts take data.kind text'),
        ({"conversations": [{"from": "human", "value": "x"}]}, 'has no "messages"; each line must be an object like'),
        ({"messages": []}, 'has no "messages"'),
        ({"messages": ["x"]}, r"messages\[0\] is 'x'; use an object"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, r"messages\[0\].content is \['x'\]; of its parts only"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]},
            r'messages\[1\] needs a "content" that is text',
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": ["f"]}]}, r"messages\[0\].tool_calls is \['f'\]"),
        ({"messages": [{"role": "user", "content": "x", "reasoning_content": 3}]}, r"messages\[0\].reasoning_content is 3"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": "{"}, "tools is a text that is not JSON"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": "3"}, "tools is 3; use a list of objects"),
        (
            {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs sets",
        ),
        ({"messages": [{"role": "user", "content": "x"}]}, "has no message of the role 'assistant', so nothing in it"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(tmp_path: Path, line: Any, complaint: str) -> None:
    write_lines(tmp_path / "a.jsonl", [chat("a", "b"), line])
    with pytest.raises(ValueError, match=rf"a\.jsonl:2:? {complaint}"):
        load(tmp_path)


def test_other_files_and_too_few_conversations_are_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [chat("a", "b")])
    with pytest.raises(ValueError, match="holds 1 conversations; it takes at least 2"):
        load(tmp_path)
    (tmp_path / "README.md").write_text("what this is")
    with pytest.raises(ValueError, match=r"README\.md is no \.jsonl file"):
        load(tmp_path)


def test_halves_of_surrogate_pairs_are_replaced_wherever_they_are(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [json.dumps(chat("half \ud800", "and \udc00")), chat("a", "b")])
    corpus = load(tmp_path)
    contents = [message["content"] for one in (*corpus.train, *corpus.validation) for message in one.messages]
    assert {"half \ufffd", "and \ufffd"} <= set(contents)
