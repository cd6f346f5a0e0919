"""A conversation with a model by its chat template, and the loop of `infer.py --interactive`.

Every turn renders the whole conversation again, as the template defines it; most of it is in the engine's prefix cache from
the turn before. A conversation is never truncated: one that no longer fits is refused.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Generator, Iterator
from types import FrameType

from dsv3_jax.config.checks import check
from dsv3_jax.data.chat_template import ChatTemplate, Message, closing_tokens, encode_prompt
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.infer.engine import Engine
from dsv3_jax.infer.report import Speed
from dsv3_jax.infer.request import Update
from dsv3_jax.infer.sampling import SamplingParams

COMMANDS = "/reset forgets the conversation, /system TEXT sets the system prompt (no TEXT: none), /quit ends"


class Conversation:
    """The messages so far, and the model that answers."""

    def __init__(self, engine: Engine, template: ChatTemplate, tokenizer: Tokenizer, params: SamplingParams) -> None:
        """Start an empty conversation with the engine's model, whose replies are drawn by `params`."""
        self._engine, self._template, self._tokenizer = engine, template, tokenizer
        self._params = params.ending_at(closing_tokens(template, tokenizer, engine.config.vocab_size))
        self.system: str | None = None
        """The system prompt."""
        self.turns: list[Message] = []
        """Messages of the user and the assistant, alternating."""

    def reply(self, text: str) -> Generator[Update]:
        """Send `text` as the user, and yield the reply as it is generated.

        Both join the conversation when the reply ends or the iterator is closed. A reply that is closed before its first
        character leaves the conversation unchanged.

        Raises:
          ValueError: at once, if the template refuses the conversation, or its tokens leave no room for a reply.
        """
        turns: list[Message] = [*self.turns, {"role": "user", "content": text}]
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        ids = encode_prompt(self._template, self._tokenizer, system + turns)
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
    """Read turns from stdin and stream the replies to stdout, until /quit or the end of the input.

    Ctrl-C stops a reply; a second one, before the reply has stopped, ends the program. Only a terminal gets a prompt.
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
            _say(f"there is no {command}: {COMMANDS}. Put a space before a text that opens with a slash.")
        elif line.strip():
            _answer(conversation, line.strip(), speed)


def _read_line(is_terminal: bool) -> str | None:
    """Return the next line; None at the end of the input."""
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
    if update is not None and update.request.finish_reason == "length":
        _say(f"(cut after {len(update.request.tokens)} tokens, by max_tokens or max_length)")


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Yield a list that a first Ctrl-C fills, instead of an interrupt within a step, which would reset the engine."""
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
