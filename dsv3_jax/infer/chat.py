"""A conversation with a model by its chat template, and the loop of `infer.py --interactive`.

Every turn renders the whole conversation again, as the template defines it; most of it is in the engine's prefix cache from
the turn before. A conversation is never truncated: one that no longer fits is refused.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Generator, Iterator, Mapping
from types import FrameType
from typing import Any

from dsv3_jax.config.checks import check
from dsv3_jax.data.chat_template import ChatTemplate, Message, closing_tokens, encode_prompt
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.infer.engine import Engine
from dsv3_jax.infer.report import Speed
from dsv3_jax.infer.request import Update
from dsv3_jax.infer.sampling import SamplingParams

COMMANDS = "/reset forgets the conversation, /system TEXT sets the system prompt (no TEXT: none), /quit ends"


class Conversation:
    """A chat with the engine's model: system prompt, turns so far, and sampling parameters of the replies."""

    def __init__(
        self,
        engine: Engine,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        params: SamplingParams,
        switches: Mapping[str, Any] | None = None,
    ) -> None:
        """Start an empty conversation with the engine's model, whose replies are drawn by `params`.

        `switches` are variables of the template, such as {"thinking": True}.
        """
        self._switches = switches or {}
        self._engine, self._template, self._tokenizer = engine, template, tokenizer
        self._params = params.ending_at(closing_tokens(template, tokenizer, engine.config.vocab_size))
        self.system: str | None = None
        """The system prompt, None for none; may be set between turns."""
        self.turns: list[Message] = []
        """Messages so far, alternately of the user and the assistant; without the system prompt."""

    def reply(self, text: str) -> Generator[Update]:
        """Return an iterator that generates the reply to a new user message `text`, and yields it piece by piece.

        When it ends, is closed or fails, `turns` gains the message and the reply so far; but if it was cut short before the
        reply's first character, `turns` stays unchanged.

        Raises:
          ValueError: from the call itself, if the template refuses the conversation, or its tokens leave no room for a reply.
        """
        turns: list[Message] = [*self.turns, {"role": "user", "content": text}]
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        ids = encode_prompt(self._template, self._tokenizer, system + turns, **self._switches)
        most = self._engine.sizes.max_length
        check(len(ids) < most, f"the conversation's {len(ids)} tokens leave no room for a reply in max_length {most}")
        return self._record(turns, self._engine.stream_text(ids, self._params))

    def _record(self, turns: list[Message], updates: Iterator[Update]) -> Generator[Update]:
        texts: list[str] = []
        ended = False
        try:
            with contextlib.closing(updates):  # type: ignore[type-var]  # A generator: its end frees the engine.
                for update in updates:
                    texts.append(update.text)
                    yield update
            ended = True
        finally:
            if ended or any(texts):
                self.turns = [*turns, {"role": "assistant", "content": "".join(texts)}]


def converse(conversation: Conversation, speed: Speed) -> None:
    """Read user messages and `COMMANDS` from stdin, one a line, and stream replies to stdout, until /quit or its end.

    Ctrl-C stops a reply; a second one before it has stopped raises KeyboardInterrupt. Notices and refusals go to stderr.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  Its presence makes `input` edit lines.
        _say(f"{COMMANDS}; Ctrl-C stops a reply, Ctrl-D ends.")
    while (line := _read_line(is_terminal)) is not None:
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            conversation.turns = []
        elif command == "/system":
            conversation.system = rest.strip() or None
        elif command.startswith("/"):
            _say(f"unknown command {command}: {COMMANDS}. Put a space before a message that begins with a slash.")
        elif line.strip():
            _answer(conversation, line.strip(), speed)


def _read_line(is_terminal: bool) -> str | None:
    """Return the next line of stdin; None at its end. Ctrl-C raises, but on a terminal prints a hint, and reading goes on."""
    while True:
        try:
            return input("> " if is_terminal else "")
        except EOFError:
            if is_terminal:
                print()
            return None
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            _say("\nCtrl-D or /quit ends.")


def _answer(conversation: Conversation, text: str, speed: Speed) -> None:
    try:
        updates = conversation.reply(text)
    except ValueError as error:
        _say(f"not sent: {error}. /reset forgets the conversation; a larger --max-length holds a longer one.")
        return
    speed.resume()
    update = None
    with _interrupts() as interrupts, contextlib.closing(updates):
        for update in updates:
            print(update.text, end="", flush=True)
            speed.note(len(update.tokens))
            if interrupts:
                break
    print(flush=True)
    if update is not None and update.request.error is not None:
        _say(f"(no reply: {update.request.error})")
    if update is not None and update.request.finish_reason == "length":
        _say(f"(cut after {len(update.request.tokens)} tokens; raise --max-tokens or --max-length)")


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Within the context, the first Ctrl-C only adds an entry to the yielded list; a second one raises as usual."""
    received: list[int] = []

    def record(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before)

    before = signal.signal(signal.SIGINT, record)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
