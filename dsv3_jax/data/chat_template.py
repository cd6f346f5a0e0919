"""The chat template of a checkpoint: conversations as the text, and the tokens, that its model was taught to read.

A checkpoint's tokenizer files bring a Jinja template, in `chat_template.jinja` or under `chat_template` in
tokenizer_config.json. It is rendered as transformers renders it, in a sandbox that keeps it from changing anything.

The template writes special tokens as text, <｜User｜> say, and these become their ids. What a message says must not: a user who
types <｜Assistant｜> would otherwise speak in the model's name. So before rendering, whatever in a message spells an added
token is put between two characters that occur nowhere else (noncharacters of Unicode), and after it those characters tell
the spelt tokens from the template's own, and are taken out. The template still sees the spelling, and may cut messages at it.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from etils import epath

from dsv3_jax.config.checks import check
from dsv3_jax.data.tokenizer import Tokenizer, named_tokens, tokenizer_config, tokenizer_folder
from dsv3_jax.files import write_whole

Message = Mapping[str, Any]
_NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


class ChatTemplate:
    """A template and the special tokens it is given; compiled once."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        origin: str = "the chat template",
        clock: Callable[[], datetime.datetime] = datetime.datetime.now,
    ) -> None:
        """Compiles the template.

        Args:
          source: in Jinja.
          special_tokens: "bos_token", "eos_token" and others, as the template may name them.
          origin: where it comes from, for messages.
          clock: what `strftime_now` asks for the time.

        Raises:
          ValueError: if it is no Jinja template.
        """
        self.source = source
        self.special_tokens = dict(special_tokens)
        self.origin = origin
        self._clock = clock
        try:
            self._template = _environment(clock).from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"{origin} is not a Jinja template ({error}); copy it from the checkpoint again") from error

    def with_clock(self, clock: Callable[[], datetime.datetime]) -> ChatTemplate:
        """The same, with another time."""
        return ChatTemplate(self.source, self.special_tokens, self.origin, clock)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False, **variables: Any) -> str:
        """The text of a conversation.

        Args:
          messages: in order, each with at least "role" and "content".
          add_generation_prompt: close with what opens the assistant's next turn.
          variables: what else the template may name: `tools`, `documents`, or a switch of its own.

        Raises:
          ValueError: with the template's own words, if it refuses the conversation.
        """
        given = {"tools": None, "documents": None, **self.special_tokens, **variables}
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **given)
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise ValueError(f"{self.origin} refuses the messages ({type(error).__name__}: {error}); change them") from error

    def save(self, folder: str | epath.PathLike) -> None:
        """Writes the files that `load_chat_template` reads, to lie beside a tokenizer.json."""
        path = epath.Path(folder)
        write_whole(path / "chat_template.jinja", self.source)
        write_whole(path / "tokenizer_config.json", json.dumps(self.special_tokens, indent=2) + "\n")


class Piece(NamedTuple):
    """A stretch of a rendered conversation."""

    text: str
    token: int | None
    """The id of the added token that `text` is; None for ordinary text, which may spell one."""


@dataclasses.dataclass(frozen=True)
class Marked:
    """Messages in which what spells an added token is marked, and how to read what a template makes of them."""

    messages: list[Any]
    variables: dict[str, Any]
    _open: str
    _close: str
    _tokens: Mapping[str, int]
    _pattern: re.Pattern[str]

    def pieces(self, rendered: str) -> list[Piece]:
        """Rendered text as ordinary text and the template's own tokens, the marks taken out."""
        found: list[Piece] = []
        text: list[str] = []

        def close_text() -> None:
            whole = "".join(text).replace(self._open, "").replace(self._close, "")
            if whole:
                found.append(Piece(whole, None))
            text.clear()

        place = 0
        # Spelt tokens come first: a match of one takes in all of it, whatever else its characters might begin.
        for match in re.finditer(f"{self._open}[^{self._close}]*{self._close}|({self._pattern.pattern})", rendered):
            text.append(rendered[place : match.start()])
            place = match.end()
            if match[1] is None:
                text.append(match[0])
            else:
                close_text()
                found.append(Piece(match[0], self._tokens[match[1]]))
        text.append(rendered[place:])
        close_text()
        return found


def load_chat_template(tokenizer: str | epath.PathLike) -> ChatTemplate:
    """What `find_chat_template` finds.

    Raises:
      ValueError: if there is none, or it cannot be read.
    """
    template = find_chat_template(tokenizer)
    if template is None:
        raise ValueError(
            f"{tokenizer_folder(tokenizer)} has no chat template (no chat_template.jinja, no chat_template in "
            "tokenizer_config.json); put the checkpoint's own there"
        )
    return template


def find_chat_template(tokenizer: str | epath.PathLike) -> ChatTemplate | None:
    """The template that lies beside a tokenizer.json, given as that file or as its folder; None if there is none.

    Raises:
      ValueError: if it cannot be read.
    """
    folder = tokenizer_folder(tokenizer)
    file = folder / "chat_template.jinja"
    named = named_tokens(tokenizer)
    if file.exists():
        return ChatTemplate(file.read_text("utf-8"), named, str(file))
    source = tokenizer_config(tokenizer).get("chat_template")
    if isinstance(source, list):  # Several by name, of which one is meant for want of a choice.
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    if not isinstance(source, str):
        return None
    return ChatTemplate(source, named, f"the chat_template of {folder / 'tokenizer_config.json'}")


def closing_tokens(template: ChatTemplate, tokenizer: Tokenizer, vocab_size: int) -> tuple[int, ...]:
    """What closes the assistant's turn: the template's eos_token, which in some checkpoints is none that ends a document."""
    named = template.special_tokens.get("eos_token")
    return tuple(i for i, text in tokenizer.added_tokens.items() if text == named and i < vocab_size)


def encode_prompt(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[int]:
    """The ids of a conversation, closed by what opens the assistant's next turn: what a model answers.

    Raises:
      ValueError: as `ChatTemplate.render` does.
    """
    marked = escape_special_tokens(tokenizer, messages, variables)
    rendered = template.render(marked.messages, add_generation_prompt=add_generation_prompt, **marked.variables)
    return [id_ for ids in encode_pieces(tokenizer, marked.pieces(rendered)) for id_ in ids]


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> list[list[int]]:
    """The ids of each piece."""
    texts = iter(tokenizer.encode_documents([piece.text for piece in pieces if piece.token is None]))
    return [next(texts) if piece.token is None else [piece.token] for piece in pieces]


def escape_special_tokens(tokenizer: Tokenizer, messages: Sequence[Message], variables: Mapping[str, Any]) -> Marked:
    """Marks, in every text of the messages and variables, whatever spells an added token of the tokenizer.

    Raises:
      ValueError: if the texts use up every character that could be a mark.
    """
    tokens, pattern = _token_pattern(tokenizer)
    used = set(json.dumps([messages, variables], ensure_ascii=False, default=str))
    free = [mark for mark in _NONCHARACTERS if mark not in used]
    check(
        len(free) >= 2,
        f"the messages hold {len(_NONCHARACTERS) - len(free)} of the {len(_NONCHARACTERS)} noncharacters U+FDD0 to U+FDEF; "
        "remove them",
    )

    def mark(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda match: f"{free[0]}{match[0]}{free[1]}", value)
        if isinstance(value, Mapping):
            return {mark(key): mark(item) for key, item in value.items()}
        return [mark(item) for item in value] if isinstance(value, list | tuple) else value

    marked = [mark(dict(message)) for message in messages]
    return Marked(marked, mark(dict(variables)), free[0], free[1], tokens, pattern)


@functools.lru_cache(maxsize=4)
def _token_pattern(tokenizer: Tokenizer) -> tuple[dict[str, int], re.Pattern[str]]:
    """The added tokens, and what matches the longest of those that begin at a place, as the tokenizers library does."""
    tokens = {text: id_ for id_, text in tokenizer.added_tokens.items()}
    # Without tokens, what matches nowhere.
    alternatives = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)"
    return tokens, re.compile(alternatives)


def _environment(clock: Callable[[], datetime.datetime]) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = [_GenerationBlocks, jinja2.ext.loopcontrols]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson  # Jinja's own escapes what HTML could take amiss.
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: clock().strftime(form)
    return environment


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}`, by which some templates mark the assistant's words; what it holds is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
