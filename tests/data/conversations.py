"""Random conversations as people's files hold them, and what holds for each of them through any chat template."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

from dsv3_jax.config import ModelConfig
from dsv3_jax.data.chat import Conversation, encode_conversations
from dsv3_jax.data.chat_template import ASSISTANT, ChatTemplate, encode_prompt, read_messages, read_tools
from dsv3_jax.data.sources import Record
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.infer.batch import encode_lines, read_prompt_lines
from dsv3_jax.serve.requests import ModelInfo, read_chat

WORDS = "Why", "because", "Paris.", "1 + 1", "  ", "\n", "\n\n", "é漢🙂", "def f(x):\n    return x", "</s>", "<", "｜", "{", '"'


class Generator:
    """Conversations by a seed."""

    def __init__(self, seed: int, spelt: list[str], *, calls: bool = True) -> None:
        """Args: seed: of the draws; spelt: tokens that texts spell at times; calls: answers may call tools."""
        self._random, self._spelt, self._calls = random.Random(seed), spelt, calls

    def _is(self, share: float) -> bool:
        return self._random.random() < share

    def text(self, words: int = 6) -> str:
        """Words, and at times a token that is spelt."""
        parts = [self._random.choice(self._spelt if self._is(0.15) else WORDS) for _ in range(self._random.randint(1, words))]
        return " ".join(parts)

    def _answer(self) -> dict[str, Any]:
        content = self.text()
        if self._is(0.3):
            space = self._random.choice(["", "\n"])
            content = f"<think>{space}{self.text(3)}{space}</think>{2 * space}{content}"
        message: dict[str, Any] = {"role": ASSISTANT, "content": content}
        if self._is(0.4):
            message["reasoning_content"] = self._random.choice([None, self.text(3)])
        if self._is(0.3):
            message["tool_calls"] = None
        return message

    def _call(self) -> list[dict[str, Any]]:
        function = {"name": "f", "arguments": json.dumps({"x": self.text(2)})}
        call = {"id": "call_0", "type": "function", "function": function, **({"index": None} if self._is(0.5) else {})}
        content = self._random.choice([None, self.text(2)])
        result = {"role": "tool", "content": self.text(2), "tool_call_id": "call_0"}
        return [{"role": ASSISTANT, "content": content, "tool_calls": [call]}, result]

    def conversation(self) -> dict[str, Any]:
        """Return a line of a file: messages, at times with tools, that end with an answer."""
        messages: list[dict[str, Any]] = []
        if self._is(0.4):
            messages.append({"role": self._random.choice(["system", "developer"]), "content": self.text()})
        for _ in range(self._random.randint(1, 3)):
            asked: Any = self.text()
            if self._is(0.2):
                asked = [{"type": "text", "text": asked}, {"type": "text", "text": self.text(2)}]
            messages.append({"role": "user", "content": asked, **({"name": None} if self._is(0.2) else {})})
            if self._calls and self._is(0.2):
                messages += self._call()
            messages.append(self._answer())
        line: dict[str, Any] = {"messages": messages}
        if self._is(0.3):
            tools = [{"type": "function", "function": {"name": "f", "description": self.text(3)}}]
            line["tools"] = self._random.choice([tools, json.dumps(tools), None])
        return line


def read_by_training(line: dict[str, Any]) -> Conversation:
    """The conversation of a line of a training file."""
    from dsv3_jax.data.chat import _conversation

    return _conversation(Record("a.jsonl:1", "a.jsonl:1", copy.deepcopy(line), False))


def assert_consistent(
    line: dict[str, Any], template: ChatTemplate, tokenizer: Tokenizer, model: ModelConfig, folder: Path
) -> bool:
    """Hold a line to its ids: training is the prompt and what is learnt, and file, batch and HTTP have the same prompt.

    False if the template refuses the conversation, everywhere.
    """
    messages = line["messages"]
    one = read_by_training(line)
    prompts = {n: messages[:n] for n, message in enumerate(messages) if message["role"] == ASSISTANT}
    try:
        sequences = list(encode_conversations([one], template, tokenizer))
    except ValueError:
        return False
    expected = {n: encode_prompt(template, tokenizer, prompt, tools=line.get("tools")) for n, prompt in prompts.items()}
    if len(sequences) == 1:
        (found,) = sequences
        starts = [i for i in range(1, found.ids.size) if found.is_in_loss[i] and not found.is_in_loss[i - 1]]
        assert [found.ids[:start].tolist() for start in starts] == list(expected.values())
    else:
        assert len(sequences) == len(expected)
        for found, prompt in zip(sequences, expected.values(), strict=True):
            assert found.ids[~found.is_in_loss].tolist() == prompt
            assert found.ids[: len(prompt)].tolist() == prompt
    for found in sequences:
        ends = [i for i in range(found.ids.size) if found.is_in_loss[i] and not found.is_in_loss[i + 1 : i + 2].any()]
        assert all(int(found.ids[i]) in tokenizer.added_tokens or tokenizer.decode([found.ids[i]]).isspace() for i in ends)
    prompts_file = folder / "prompts.jsonl"
    prompts_file.write_text("".join(json.dumps(line | {"messages": prompt}) + "\n" for prompt in prompts.values()))
    assert encode_lines(read_prompt_lines(str(prompts_file)).lines, model, template, tokenizer) == list(expected.values())
    served = ModelInfo("m", model, tokenizer, template, 2**20, 8)
    for n, prompt in prompts.items():
        tools = {"tools": read_tools(line.get("tools")), "tool_choice": "none"}
        assert read_chat({"model": "m", "messages": prompt, **tools}, served).prompts == [expected[n]]
    return True


def without_nulls(line: dict[str, Any]) -> dict[str, Any]:
    """The line as other programs understand it: without nulls, parts of text, developers and tools as text."""
    return {"messages": read_messages(line["messages"]), "tools": read_tools(line.get("tools"))}
