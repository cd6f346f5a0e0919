"""The prompts of a batch file: one JSON object a line, all of them checked before anything is generated.

    {"prompt": "def main(", "max_tokens": 32}
    {"prompt": [0, 17, 42], "id": "as token ids"}
    {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0.7, "seed": 5}

Beside the prompt a line may have an "id", which is handed through, and any field of `SamplingParams`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from typing import Any

from etils import epath

from dsv3_jax.config.checks import require
from dsv3_jax.data.cache import digest
from dsv3_jax.data.chat_template import ChatTemplate, Message, encode_prompt
from dsv3_jax.data.sources import paired
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.infer.prompt import Prompt
from dsv3_jax.infer.sampling import SamplingParams

SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams))
KEYS = ("prompt", "messages", "id", *SAMPLING)


@dataclasses.dataclass(frozen=True)
class PromptLine:
    """One line."""

    index: int
    """Number of the line, from 0."""
    where: str
    """Path and number of the line, from 1, for messages."""
    content: str | list[int] | list[Message]
    is_chat: bool
    """Whether `content` is messages."""
    id: str | int | None
    sampling: dict[str, Any]
    """What the line says of `SamplingParams`."""

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """How it is drawn. Its seed is its own, so that what is drawn depends on no other line."""
        seed = (defaults.seed + self.index) % 2**32
        return dataclasses.replace(defaults, **({"seed": seed} | self.sampling))

    def encoded(self, template: ChatTemplate | None, tokenizer: Tokenizer) -> Prompt:
        """The prompt as the engine takes it.

        Raises:
          ValueError: naming the line, if the template refuses the messages.
        """
        if not self.is_chat:
            return self.content  # type: ignore[return-value]
        assert template is not None
        try:
            return encode_prompt(template, tokenizer, self.content)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error


@dataclasses.dataclass(frozen=True)
class PromptLines:
    """All lines of a file."""

    lines: list[PromptLine]
    digest: str
    """Of the file's bytes."""

    @property
    def need_template(self) -> bool:
        """Whether one of them is messages."""
        return any(line.is_chat for line in self.lines)


def read_prompt_lines(path: str) -> PromptLines:
    """Reads and checks a file; empty lines are passed over, and counted.

    Raises:
      ValueError: naming the line and the key, at the first that is wrong; or if there is no such file, or no line in it.
    """
    file = epath.Path(path).expanduser()
    require(file.is_file(), f"--batch-file {path} does not exist; name a file with one JSON object a line")
    data = file.read_bytes()
    texts = enumerate(data.split(b"\n"))
    lines = [_line(index, f"{path}:{index + 1}", text) for index, text in texts if text.strip()]
    require(bool(lines), f'--batch-file {path} is empty; write one object a line, such as {{"prompt": "..."}}')
    return PromptLines(lines, digest(data))


def _line(index: int, where: str, text: bytes) -> PromptLine:
    try:
        values = json.loads(text.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON ({error}); each line must be one object") from error
    require(isinstance(values, dict), f"{where} is {type(values).__name__}, not an object; each line must be one object")
    if (unknown := next((key for key in values if key not in KEYS), None)) is not None:
        nearest = max(KEYS, key=lambda key: difflib.SequenceMatcher(None, unknown, key).ratio())
        raise ValueError(f'{where} has the unknown key "{unknown}"; the nearest is "{nearest}" (all: {", ".join(KEYS)})')
    kinds = [key for key in ("prompt", "messages") if key in values]
    require(len(kinds) == 1, f'{where} has {" and ".join(kinds) or "no prompt"}; give either "prompt" or "messages"')
    name = values.get("id")
    is_text = isinstance(name, str) and paired(name) == name
    is_integer = isinstance(name, int) and not isinstance(name, bool)
    require(name is None or is_text or is_integer, f"{where}: id is {name!r}; use a text or an integer")
    content = _prompt(values["prompt"], where) if "prompt" in values else _messages(values["messages"], where)
    return PromptLine(index, where, content, kinds == ["messages"], name, _sampling(values, where))


def _prompt(prompt: Any, where: str) -> str | list[int]:
    is_ids = isinstance(prompt, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt)
    require(isinstance(prompt, str) or is_ids, f"{where}: prompt is {prompt!r:.100}; use a string or a list of token ids")
    return prompt


def _messages(messages: Any, where: str) -> list[Message]:
    is_list = isinstance(messages, list) and bool(messages)
    require(is_list, f'{where}: messages is {messages!r:.100}; use a list like [{{"role": "user", "content": "..."}}]')
    for number, message in enumerate(messages):
        is_message = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        require(is_message, f'{where}: messages[{number}] needs a "role" and a "content", both strings')
    return messages


def _sampling(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of `SamplingParams`; the values of each are checked by that class."""
    fields = {name: values[name] for name in SAMPLING if name in values}
    biases = fields.get("logit_bias")
    try:
        if isinstance(biases, dict):  # The keys of JSON are texts.
            fields["logit_bias"] = {int(key) if key.isdecimal() else key: bias for key, bias in biases.items()}
        SamplingParams(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return fields
