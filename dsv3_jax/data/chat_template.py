"""Chat templates of checkpoints: conversations rendered to the text, and the tokens, that the model was trained on.

A checkpoint's tokenizer files contain a Jinja template, in `chat_template.jinja` or under `chat_template` in
tokenizer_config.json. It is rendered as transformers renders it, in a sandbox in which it cannot change anything.

The template writes special tokens as text, for example <｜User｜>, and these become their ids. The text of messages must not:
otherwise a user who types <｜Assistant｜> speaks as the model. So before rendering, each spelling of an added token in messages
is enclosed in two noncharacters of Unicode that occur nowhere else; after rendering they distinguish such spellings from the
template's own tokens, and are removed. The template still sees the spelling, and may split at it.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from etils import epath
from jinja2 import ext, nodes, sandbox
from jinja2.parser import Parser

from dsv3_jax.config.checks import check
from dsv3_jax.data.tokenizer import Tokenizer, named_tokens, tokenizer_config, tokenizer_folder
from dsv3_jax.files import write_whole

Message = Mapping[str, Any]
_NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


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
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"{origin} is not a Jinja template ({error}); copy it from the checkpoint again") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False, **variables: Any) -> str:
        """Return the text of a conversation.

        Args:
          messages: in order, each with at least "role" and "content".
          add_generation_prompt: append the opening of the assistant's next turn.
          variables: other names the template may use: `tools`, `documents`, or a switch of its own.

        Raises:
          ValueError: with the template's own words, if it refuses the conversation.
        """
        given = {"tools": None, "documents": None, **self.special_tokens, **variables}
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **given)
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError, IndexError) as error:
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


def closing_tokens(template: ChatTemplate, tokenizer: Tokenizer, vocab_size: int) -> tuple[int, ...]:
    """Return the ids that end the assistant's turn: the template's eos_token, in some checkpoints not the model's."""
    id_ = tokenizer.added_ids.get(template.special_tokens.get("eos_token", ""))
    return () if id_ is None or id_ >= vocab_size else (id_,)


@functools.cache
def _environment() -> sandbox.ImmutableSandboxedEnvironment:
    """Return Jinja as transformers sets it up for chat templates."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = [_GenerationBlocks, ext.loopcontrols]
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson  # Jinja's own escapes for HTML.
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


class _GenerationBlocks(ext.Extension):
    """`{% generation %}`, with which some templates enclose the assistant's words; the content is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


# ----------------------------------------------------------------------------------------------------------------------
# Token ids of a rendered conversation, in which messages cannot produce special tokens.


class Piece(NamedTuple):
    """A stretch of a rendered conversation."""

    text: str
    token: int | None
    """Id of the added token that `text` is; None for ordinary text, which may spell one."""


def encode_prompt(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[int]:
    """Return the ids of a conversation, with the opening of the assistant's next turn: the prompt of an answer.

    Raises:
      ValueError: as `ChatTemplate.render` does.
    """
    messages, variables, split = escape_special_tokens(tokenizer, messages, variables)
    rendered = template.render(messages, add_generation_prompt=add_generation_prompt, **variables)
    return [id_ for ids in encode_pieces(tokenizer, split(rendered)) for id_ in ids]


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> list[list[int]]:
    """Return the ids of each piece."""
    texts = iter(tokenizer.encode_documents([piece.text for piece in pieces if piece.token is None]))
    return [next(texts) if piece.token is None else [piece.token] for piece in pieces]


def escape_special_tokens(
    tokenizer: Tokenizer, messages: Sequence[Message], variables: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any], Callable[[str], list[Piece]]]:
    """Enclose each spelling of an added token in the messages and variables in two unused characters.

    Returns:
      messages, variables, and a function that splits their rendering into ordinary text, without these characters, and the
      template's own tokens.

    Raises:
      ValueError: if the texts contain every character that could be a mark.
    """
    pattern = _token_pattern(tokenizer)
    used = set(json.dumps([messages, variables], ensure_ascii=False, default=str))
    free = [mark for mark in _NONCHARACTERS if mark not in used]
    check(
        len(free) >= 2,
        f"the messages hold {len(_NONCHARACTERS) - len(free)} of the {len(_NONCHARACTERS)} noncharacters U+FDD0 to U+FDEF; "
        "remove them",
    )
    begin, end = free[:2]

    def mark(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda match: f"{begin}{match[0]}{end}", value)
        if isinstance(value, Mapping):
            return {mark(key): mark(item) for key, item in value.items()}
        return [mark(item) for item in value] if isinstance(value, list | tuple) else value

    def text(part: str) -> list[Piece]:
        part = part.replace(begin, "").replace(end, "")
        return [Piece(part, None)] if part else []

    def split(rendered: str) -> list[Piece]:
        found: list[Piece] = []
        start = 0
        # An enclosed spelling matches first and as a whole, so none of its characters can begin a token; it stays text.
        for match in re.finditer(f"{begin}[^{end}]*{end}|({pattern.pattern})", rendered):
            if match[1]:
                found += [*text(rendered[start : match.start()]), Piece(match[1], tokenizer.added_ids[match[1]])]
                start = match.end()
        return found + text(rendered[start:])

    return mark(list(messages)), mark(variables), split


@functools.lru_cache(maxsize=4)
def _token_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Return a pattern of the longest added token at a position, as the tokenizers library matches them."""
    # Without tokens, a pattern that never matches.
    return re.compile("|".join(map(re.escape, sorted(tokenizer.added_ids, key=len, reverse=True))) or r"(?!)")
