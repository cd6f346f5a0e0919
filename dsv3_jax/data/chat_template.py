"""Conversations as text and token ids, by the chat template of a checkpoint: for training, batch files, HTTP and the terminal.

A checkpoint's tokenizer files contain a Jinja template, in `chat_template.jinja` or under `chat_template` in
tokenizer_config.json. It is rendered as transformers renders it, in a sandbox in which it cannot change anything.

The template writes special tokens as text, for example <｜User｜>, and these become their ids. The text of messages must not:
otherwise a user who types <｜Assistant｜> speaks as the model. So each character of a rendered conversation knows whether the
template or a message wrote it (`data.traced`). Of the assistant's own words an added token that is not `special`, such as
</think>, is the token, since the model writes it as one; all other spellings are text.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jinja2
from etils import epath

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.checks import check
from dsv3_jax.data.tokenizer import Tokenizer, named_tokens, tokenizer_config, tokenizer_folder
from dsv3_jax.data.traced import FIRST_ORIGIN, TEMPLATE, UNKNOWN, Traced, environment, traced
from dsv3_jax.files import write_whole

Message = Mapping[str, Any]
ASSISTANT = "assistant"
# Of tools and switches: the same however many messages there are.
_VARIABLES = chr(FIRST_ORIGIN)


class ChatTemplate:
    """A compiled template and its special tokens."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str = "the chat template") -> None:
        """Compile the template.

        Args:
          source: Jinja text.
          special_tokens: "bos_token", "eos_token" and others, as the template may name them.
          origin: name of the template in messages.

        Raises:
          ValueError: if it is not a Jinja template.
        """
        self.source = source
        self.special_tokens = dict(special_tokens)
        self.origin = origin
        try:
            self._template = environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"{origin} is not a Jinja template ({error}); copy it from the checkpoint again") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False, **variables: Any) -> Traced:
        """Return the text of a conversation; the characters of message i have the origin `origin_of(i)`.

        Args:
          messages: in order, as `read_messages` returns them.
          add_generation_prompt: append the opening of the assistant's next turn.
          variables: other names the template may use: `tools`, `documents`, or a switch of its own.

        Raises:
          ValueError: with the template's own words, if it refuses the conversation.
        """
        others = traced(variables, _VARIABLES)
        given = {"tools": None, "documents": None, **self.special_tokens, **others}
        own = [traced(message, origin_of(number)) for number, message in enumerate(messages)]
        try:
            return Traced.of(self._template.render(messages=own, add_generation_prompt=add_generation_prompt, **given))
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
            raise ValueError(f"{self.origin} refuses the messages ({type(error).__name__}: {error}); change them") from error

    def save(self, folder: str | epath.PathLike) -> None:
        """Write the files that `load_chat_template` reads, next to a tokenizer.json."""
        path = epath.Path(folder)
        write_whole(path / "chat_template.jinja", self.source)
        write_whole(path / "tokenizer_config.json", json.dumps(self.special_tokens, indent=2) + "\n")


def load_chat_template(tokenizer: str | epath.PathLike) -> ChatTemplate:
    """Return the template that `find_chat_template` finds; ValueError if there is none, or it cannot be read."""
    template = find_chat_template(tokenizer)
    if template is None:
        raise ValueError(
            f"{tokenizer_folder(tokenizer)} has no chat template (no chat_template.jinja, no chat_template in "
            "tokenizer_config.json); put the checkpoint's own there"
        )
    return template


def find_chat_template(tokenizer: str | epath.PathLike) -> ChatTemplate | None:
    """Return the template next to a tokenizer.json (or in a folder); None without; ValueError if it is damaged."""
    folder = tokenizer_folder(tokenizer)
    file = folder / "chat_template.jinja"
    named = named_tokens(tokenizer)
    if file.exists():
        return ChatTemplate(file.read_text("utf-8"), named, str(file))
    source = tokenizer_config(tokenizer).get("chat_template")
    if isinstance(source, list):  # Several by name.
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    if not isinstance(source, str):
        return None
    return ChatTemplate(source, named, f"the chat_template of {folder / 'tokenizer_config.json'}")


@functools.lru_cache(maxsize=4)
def closing_tokens(template: ChatTemplate, tokenizer: Tokenizer, vocab_size: int) -> tuple[int, ...]:
    """Return the ids that end the assistant's turn: the one that the template writes behind it, and its eos_token."""
    try:
        rendered = template.render([{"role": "user", "content": "a"}, {"role": ASSISTANT, "content": "b"}])
        behind = rendered[rendered.origins.rfind(origin_of(1)) + 1 :] if origin_of(1) in rendered.origins else rendered[:0]
        # The last one: a template may close more than the turn, such as an <answer>.
        ids = [piece.token for piece in split_pieces(behind, tokenizer) if piece.token is not None][-1:]
    except ValueError:  # A template that takes no such conversation.
        ids = []
    named = tokenizer.added_ids.get(template.special_tokens.get("eos_token", ""))
    return tuple(id_ for id_ in dict.fromkeys([*ids, named]) if id_ is not None and id_ < vocab_size)


def with_closing_tokens(model: ModelConfig, folder: str | epath.PathLike, tokenizer: Tokenizer) -> ModelConfig:
    """Add the tokens that close the assistant's turn in a folder's chat template, if it has one, to those that end a text."""
    template = find_chat_template(folder)
    closing = () if template is None else closing_tokens(template, tokenizer, model.vocab_size)
    ends = tuple(dict.fromkeys([*model.eos_token_ids, *closing]))
    return model if len(ends) == len(model.eos_token_ids) else dataclasses.replace(model, eos_token_id=ends)


# ----------------------------------------------------------------------------------------------------------------------
# What people write: messages, tools and switches, in one form


_RESERVED = "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "strftime_now"


def read_messages(messages: Any) -> list[dict[str, Any]]:
    """Return messages as templates expect them.

    Keys with null are absent, except `content` next to `tool_calls`; a content in parts of text is one text; the role
    `developer` is `system`.

    Raises:
      ValueError: naming the message.
    """
    check(
        isinstance(messages, list) and bool(messages),
        f'messages is {messages!r:.100}; use a list like [{{"role": "user", "content": "..."}}]',
    )
    return [_read_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _read_message(message: Any, where: str) -> dict[str, Any]:
    check(isinstance(message, Mapping), f'{where} is {message!r:.100}; use an object with a "role" and a "content"')
    read = {name: value for name, value in message.items() if value is not None}
    role, calls, content = read.get("role"), read.pop("tool_calls", None) or [], read.get("content")
    check(isinstance(role, str) and bool(role), f'{where} needs a "role", such as "user", not {role!r:.100}')
    if isinstance(content, list):
        is_text = all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content)
        check(
            is_text, f'{where}.content is {content!r:.100}; of its parts only {{"type": "text", "text": "..."}} are supported'
        )
        content = "".join(part["text"] for part in content)
    is_calls = isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)
    check(is_calls, f"{where}.tool_calls is {calls!r:.100}; use a list of objects")
    check(
        isinstance(content, str) or (content is None and bool(calls)),
        f'{where} needs a "content" that is text (null only next to "tool_calls"), not {content!r:.100}',
    )
    thoughts = read.get("reasoning_content", "")
    check(isinstance(thoughts, str), f"{where}.reasoning_content is {thoughts!r:.100}; use text")
    read |= {"role": "system" if role == "developer" else role, "content": content}
    return read | {"tool_calls": [_without_nulls(call, levels=2) for call in calls]} if calls else read


def _without_nulls(value: Any, levels: int) -> Any:
    """Return an object without the keys that have null, and so the objects in it down to this many levels."""
    if not isinstance(value, Mapping) or not levels:
        return value
    return {name: _without_nulls(item, levels - 1) for name, item in value.items() if item is not None}


def read_tools(tools: Any) -> list[Any] | None:
    """Return the definitions of tools, given as a list or as its JSON text; None for none. ValueError if they are neither."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"tools is a text that is not JSON ({error}); use a list of definitions") from error
    is_list = tools is None or (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools))
    check(is_list, f"tools is {tools!r:.100}; use a list of objects, or its JSON text")
    return tools or None


def read_switches(switches: Any) -> dict[str, Any]:
    """Return a template's own variables, given as an object or as its JSON text. ValueError if they are neither."""
    if isinstance(switches, str):
        try:
            switches = json.loads(switches)
        except ValueError as error:
            raise ValueError(f"chat_template_kwargs is a text that is not JSON ({error}); use an object") from error
    switches = {} if switches is None else switches
    check(isinstance(switches, dict), f'chat_template_kwargs is {switches!r:.100}; use an object such as {{"thinking": true}}')
    taken = sorted(name for name in switches if name in _RESERVED or name.endswith("_token"))
    check(not taken, f"chat_template_kwargs sets {', '.join(taken)}, which has a place of its own; leave it out")
    return switches


# ----------------------------------------------------------------------------------------------------------------------
# Token ids of a rendered conversation, in which messages cannot produce special tokens


class Piece(NamedTuple):
    """A stretch of a rendered conversation."""

    text: str
    token: int | None
    """Id of the added token that `text` is; None for ordinary text, which may spell one."""
    is_own: bool = False
    """True for a token of the assistant's own words."""


def origin_of(number: int) -> str:
    """Return the origin of the characters of a message."""
    return chr(FIRST_ORIGIN + 1 + number)


def encode_prompt(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Any,
    *,
    tools: Any = None,
    add_generation_prompt: bool = True,
    **switches: Any,
) -> list[int]:
    """Return the ids of a conversation that the assistant is to answer.

    An answer at its end is continued: neither closed nor opened again.

    Args:
      template: the checkpoint's.
      tokenizer: the checkpoint's.
      messages: as `read_messages` takes them.
      tools: as `read_tools` takes them.
      add_generation_prompt: append the opening of the assistant's next turn; False: return the conversation as it is.
      switches: variables of the template's own, such as `thinking`.

    Raises:
      ValueError: if the messages are invalid, the template refuses them, or one leaves no trace in the text.
    """
    messages, tools = read_messages(messages), read_tools(tools)
    render: Callable[..., Traced] = functools.partial(template.render, **{**switches, "tools": tools})
    last, number, own = messages[-1], len(messages) - 1, own_words(messages)
    is_continued = add_generation_prompt and last["role"] == ASSISTANT
    rendered = render(messages[:-1] if is_continued else messages, add_generation_prompt=add_generation_prompt)
    if not is_continued or number:
        check_traces(template, messages[:-1] if is_continued else messages, rendered)
    if is_continued:
        remedy = "add their results, which the assistant answers"
        check("tool_calls" not in last, f"messages[{number}], the last, calls tools; {remedy}")
        rendered = _begun(rendered, render, messages, template, tokenizer)
    return [id_ for ids in encode_pieces(tokenizer, split_pieces(rendered, tokenizer, own)) for id_ in ids]


def _begun(
    prompt: Traced, render: Callable[..., Traced], messages: list[dict[str, Any]], template: ChatTemplate, tokenizer: Tokenizer
) -> Traced:
    """Return `prompt` and the unfinished answer behind it: what training learns, up to its last word."""
    content, own = messages[-1]["content"], origin_of(len(messages) - 1)
    thoughts = None if content else messages[-1].get("reasoning_content")
    if content.startswith("<think>") and "</think>" not in content:
        thoughts = content.removeprefix("<think>")
    if thoughts is not None:  # They are still going on.
        opened = re.search(r"<think>(\s*)$", prompt)
        opening = Traced("" if opened else "<think>", TEMPLATE)
        return prompt + opening + Traced(thoughts.removeprefix(opened[1] if opened else ""), own)
    if not content:
        return prompt
    until = render(messages)
    answer = answer_to(prompt, until, messages, template, tokenizer)
    # A template that opens an answer otherwise than it writes one is continued as it writes it, as transformers does.
    whole = until if answer.is_otherwise else prompt + answer.text
    end = whole.origins.rfind(own) + 1
    check(end > 0, f"{template.origin} leaves out the answer at the end, so it cannot be continued; remove it")
    return whole[:end]


# ----------------------------------------------------------------------------------------------------------------------
# An answer as the model has to write it


class Answer(NamedTuple):
    """The text that follows a prompt, for one message of the assistant."""

    text: Traced
    is_dropped: bool
    """True if the message has thoughts, and the template leaves them out of the text."""
    is_emptied: bool
    """True if the message has no thoughts, and the text has empty ones."""
    is_otherwise: bool
    """True if the prompt ends with an opening, other than of thoughts, that is not in the rendering of the message."""


def answer_to(
    prompt: Traced, until: Traced, messages: Sequence[dict[str, Any]], template: ChatTemplate, tokenizer: Tokenizer
) -> Answer:
    """Return the last message as the continuation of `prompt`.

    Args:
      prompt: rendering of the messages before it, with the opening of an answer.
      until: rendering of all messages.
      messages: the messages; the last one is the assistant's.
      template: the template.
      tokenizer: tells the tokens at whose borders `prompt` and `until` may part.

    Raises:
      ValueError: if the template writes the messages before in a way that depends on the last one, or does not write it.
    """
    number, message, own = len(messages) - 1, messages[-1], own_words(messages)
    common = len(prompt)
    if not until.startswith(prompt):
        common = _common(split_pieces(prompt, tokenizer, own), split_pieces(until, tokenizer, own))
    opening, text, origin = prompt[common:], until[common:], origin_of(number)
    thoughts, words = _thoughts(message)
    is_inline = thoughts is not None and not message.get("reasoning_content")
    is_known = not opening or ({*opening.origins} == {TEMPLATE} and {*text.origins} <= {TEMPLATE, origin})
    check(
        is_known and bool(text),
        f"{template.origin} writes the messages before messages[{number}], an answer, otherwise once it is there, so its "
        "words cannot be told apart; use a template that does not",
    )
    thinking = re.search(r"<think>(\s*)$", opening)
    if thinking:
        # The prompt opens thoughts, which the template leaves out of an answer that is there.
        space = thinking[1]
        if text.startswith("</think>"):
            text = Traced((thoughts or "").removeprefix(space), origin) + text
        elif is_inline:
            said = message["content"].removeprefix("<think>").removeprefix(space)
            text = Traced(said, origin) + text[text.origins.rfind(origin) + 1 :]
        else:
            said = (thoughts or "").removeprefix(space).removesuffix(space)
            text = Traced(said, origin) + Traced(f"{space}</think>{2 * space}", TEMPLATE) + text
    count = sum(mark == origin and not character.isspace() for character, mark in zip(text, text.origins, strict=True))
    is_dropped = thoughts is not None and count < len("".join(f"{thoughts} {words}".split()))
    return Answer(text, is_dropped, bool(thinking) and thoughts is None, bool(opening) and not thinking)


def _common(prompt: Sequence[Piece], until: Sequence[Piece]) -> int:
    """Return the length of the text that two renderings begin with, up to a border of a token."""
    length = 0
    for one, other in zip(prompt, until, strict=False):
        if one != other:
            equal = [a == b for a, b in zip(one.text, other.text, strict=False)]
            is_text = one.token is None and other.token is None
            return length + ([*equal, False].index(False) if is_text else 0)
        length += len(one.text)
    return length


def _thoughts(message: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the thoughts of an answer, None without, and its other words."""
    content = message["content"] or ""
    if message.get("reasoning_content"):
        return message["reasoning_content"], content
    head, close, words = content.partition("</think>")
    return (head.removeprefix("<think>"), words) if close else (None, content)


def own_words(messages: Sequence[Message]) -> set[str]:
    """Return the origins of the assistant's messages."""
    return {origin_of(number) for number, message in enumerate(messages) if message["role"] == ASSISTANT}


def check_traces(template: ChatTemplate, messages: Sequence[Message], rendered: Traced) -> None:
    """Raise ValueError if a message with text, other than an answer, leaves no trace in the rendered conversation."""
    seen = set(rendered.origins)
    if UNKNOWN in seen:
        return
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT and (message["content"] or "").strip():
            check(
                origin_of(number) in seen,
                f"messages[{number}] has the role {message['role']!r:.50}, which leaves no trace in the text that "
                f'{template.origin} writes; use one that it knows, such as "user", "assistant" or "system"',
            )


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> list[list[int]]:
    """Return the ids of each piece."""
    texts = iter(tokenizer.encode_documents([piece.text for piece in pieces if piece.token is None]))
    return [next(texts) if piece.token is None else [piece.token] for piece in pieces]


def split_pieces(rendered: Traced, tokenizer: Tokenizer, own: Set[str] = frozenset()) -> list[Piece]:
    """Split text into added tokens and the ordinary text between them.

    Args:
      rendered: the text.
      tokenizer: that of the tokens.
      own: origins of the assistant's words, in which tokens that are not `special` are tokens too.
    """
    pattern, found, start, position = _token_pattern(tokenizer), [], 0, 0
    text = str.__str__(rendered)
    while match := pattern.search(text, position):
        origins, id_ = {*rendered.origins[match.start() : match.end()]}, tokenizer.added_ids[match[0]]
        if origins == {TEMPLATE} or (origins <= own and id_ not in tokenizer.special_tokens):
            if match.start() > start:
                found.append(Piece(text[start : match.start()], None))
            found.append(Piece(match[0], id_, origins != {TEMPLATE}))
            start = position = match.end()
        else:
            position = match.start() + 1
    return [*found, Piece(text[start:], None)] if start < len(text) else found


@functools.lru_cache(maxsize=4)
def _token_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Return a pattern of the longest added token at a position, as the tokenizers library matches them."""
    # Without tokens, a pattern that never matches.
    return re.compile("|".join(map(re.escape, sorted(tokenizer.added_ids, key=len, reverse=True))) or r"(?!)")
