"""Conversations: what the model reads each turn, what is kept of a reply, and the loop over stdin."""

from __future__ import annotations

import dataclasses
import functools
import io
import re
import signal
from collections.abc import Callable
from typing import Any

import pytest

from dsv3_jax.data.chat_template import ChatTemplate, encode_prompt
from dsv3_jax.infer import Completion, Engine, SamplingParams
from dsv3_jax.infer.chat import Conversation, converse
from dsv3_jax.infer.report import Speed
from dsv3_jax.infer.runner import Runner
from tests.data.test_chat_template import EOS, IDS, USER
from tests.infer.talkative import TEMPLATE, TOKENIZER, make_engine

PARAMS = SamplingParams(max_tokens=8)


@pytest.fixture
def engine() -> Engine:
    return make_engine()


@pytest.fixture
def conversation(engine: Engine) -> Conversation:
    return Conversation(engine, TEMPLATE, TOKENIZER, PARAMS)


@functools.cache
def forgetful() -> Engine:
    return make_engine(prefix_cache=False)


def answer(messages: list[Any]) -> Completion:
    """What the model says to a conversation, by an engine that remembers none."""
    return next(forgetful().generate([encode_prompt(TEMPLATE, TOKENIZER, messages)], PARAMS))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str | None) -> dict[str, str | None]:
    return {"role": "assistant", "content": text}


def say(conversation: Conversation, text: str) -> str:
    return "".join(update.text for update in conversation.reply(text))


def test_every_turn_is_read_with_all_before_it(conversation: Conversation) -> None:
    conversation.system = "Be brief."
    history: list[Any] = [{"role": "system", "content": "Be brief."}]
    for text in ("Hi there", "And?", "Bye"):
        history.append(user(text))
        expected = answer(history).text
        assert say(conversation, text) == expected
        history.append(assistant(expected))
        assert conversation.turns == history[1:]


def test_a_turn_computes_only_what_is_new(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the pages at the ends: what the turn before has read and said is in the prefix cache."""
    prefilled: list[int] = []
    prefill = Runner.prefill

    def counted(self: Runner, chunks: list[Any], report: bool) -> Any:
        prefilled.append(sum(len(chunk.tokens) for chunk in chunks))
        return prefill(self, chunks, report)

    monkeypatch.setattr(Runner, "prefill", counted)
    say(conversation, "Hello there. " * 5)
    first = sum(prefilled)
    prefilled.clear()
    say(conversation, "Bye")
    turns = [*conversation.turns[:2], user("Bye")]
    whole = len(encode_prompt(TEMPLATE, TOKENIZER, turns))
    # At most the reply, which may be spelt by other tokens than it was said by, the new turn and a page.
    assert sum(prefilled) <= whole - first + 4 + 1


def test_a_reply_ends_at_the_tokens_that_end_turns(engine: Engine) -> None:
    """At the model's own, and at the one that the template's files call the end."""
    forced = dataclasses.replace(PARAMS, logit_bias={IDS[EOS]: 1e4})
    ended = Conversation(engine, TEMPLATE, TOKENIZER, forced)
    assert say(ended, "Hi") == ""
    assert ended.turns == [user("Hi"), assistant("")]
    other = dataclasses.replace(PARAMS, logit_bias={IDS[USER]: 1e4})
    template = ChatTemplate(TEMPLATE.source, TEMPLATE.special_tokens | {"eos_token": USER})
    (update,) = Conversation(engine, template, TOKENIZER, other).reply("Hi")
    assert (update.tokens, update.request.finish_reason) == ([], "stop")


def test_a_reply_that_is_stopped_stays_as_far_as_it_came(conversation: Conversation, engine: Engine) -> None:
    whole = answer([user("Hi")]).text
    assert whole is not None
    updates = conversation.reply("Hi")
    heard = next(updates).text
    while not heard:
        heard = next(updates).text
    updates.close()
    assert whole.startswith(heard)
    assert conversation.turns == [user("Hi"), assistant(heard)]
    while not engine.idle:
        engine.step()
    # And the engine goes on as if nothing had been.
    assert say(conversation, "Go on") == answer([user("Hi"), assistant(heard), user("Go on")]).text


def test_a_reply_that_is_stopped_before_its_first_character_leaves_no_trace(engine: Engine) -> None:
    """Its first tokens are the first bytes of a character."""
    byte = TOKENIZER.encode("é")[0]
    mute = Conversation(engine, TEMPLATE, TOKENIZER, dataclasses.replace(PARAMS, logit_bias={byte: 1e4}))
    updates = mute.reply("Hi")
    assert next(updates).text == ""
    updates.close()
    assert mute.turns == []


def test_what_no_longer_fits_is_refused_and_nothing_is_cut(conversation: Conversation) -> None:
    say(conversation, "Hi")
    before = list(conversation.turns)
    with pytest.raises(ValueError, match=r"the conversation's \d+ tokens leave no room for a reply in max_length 128"):
        conversation.reply("much " * 60)
    assert conversation.turns == before


# The loop.

Loop = Callable[..., tuple[str, str]]


@pytest.fixture
def loop(conversation: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Loop:
    """Runs it over lines of stdin, and gives what it writes to stdout and to stderr."""

    def run(*lines: str, by_hand: bool = False, end: str = "\n") -> tuple[str, str]:
        stdin = io.StringIO("\n".join(lines) + end)
        monkeypatch.setattr(stdin, "isatty", lambda: by_hand)
        monkeypatch.setattr("sys.stdin", stdin)
        converse(conversation, Speed())
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


def test_piped_turns_are_answered_without_decorations(loop: Loop) -> None:
    first = answer([user("Hi")])
    second = answer([user("Hi"), assistant(first.text), user("Bye")])
    out, err = loop("Hi", "", "  ", "Bye", end="")
    assert out == f"{first.text}\n{second.text}\n"
    cut = [f"(cut after {len(c.tokens)} tokens; raise --max-tokens or --max-length)" for c in (first, second)]
    assert err.splitlines() == [line for line, c in zip(cut, (first, second), strict=True) if c.finish_reason == "length"]


def test_commands(loop: Loop, conversation: Conversation) -> None:
    system = {"role": "system", "content": "Be brief."}
    reply, plain = answer([system, user("/Hi")]).text, answer([user("Bye")]).text
    out, err = loop("/system Be brief.", " /Hi", "/reset", "/system", "Bye", "/rest", "/quit", "never said")
    assert out == f"{reply}\n{plain}\n"
    assert "unknown command /rest: /reset forgets the conversation" in err
    assert conversation.turns == [user("Bye"), assistant(plain)]
    assert conversation.system is None


def test_a_terminal_is_prompted(loop: Loop) -> None:
    out, err = loop("Hi", by_hand=True)
    assert out == f"> {answer([user('Hi')]).text}\n> \n"
    assert err.startswith("/reset forgets the conversation, ")


def test_a_conversation_that_is_too_long_goes_on_after_reset(loop: Loop) -> None:
    reply = answer([user("Hi")]).text
    out, err = loop("much " * 60, "/reset", "Hi")
    assert out == f"{reply}\n"
    message = r"not sent: the conversation's \d+ tokens leave no room for a reply in max_length 128\. /reset forgets .*"
    assert re.fullmatch(message, err.splitlines()[0]), err


def test_ctrl_c_stops_the_reply_and_not_the_program(
    loop: Loop, conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, after = answer([user("Hi")]).text, signal.getsignal(signal.SIGINT)
    assert whole is not None
    reply, pressed = conversation.reply, iter([True])

    def pressing(text: str) -> Any:
        for update in reply(text):
            if update.text and next(pressed, False):
                signal.raise_signal(signal.SIGINT)
            yield update

    monkeypatch.setattr(conversation, "reply", pressing)
    out, _ = loop("Hi", "Go on")
    heard = conversation.turns[1]["content"]
    assert whole.startswith(heard)
    assert 0 < len(heard) < len(whole)
    assert out == f"{heard}\n{answer([user('Hi'), assistant(heard), user('Go on')]).text}\n"
    assert signal.getsignal(signal.SIGINT) == after


def test_a_second_ctrl_c_ends_the_program(loop: Loop, conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(text: str) -> Any:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        yield

    monkeypatch.setattr(conversation, "reply", stuck)
    # Of a shell's background jobs SIGINT is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            loop("Hi")
    finally:
        signal.signal(signal.SIGINT, before)
