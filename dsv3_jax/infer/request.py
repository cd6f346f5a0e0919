"""State of one request: its prompt, tokens, streamed text and finish reason, and the sequence that the scheduler works with."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from typing import Literal, NamedTuple, Protocol

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.checks import check
from dsv3_jax.infer.sampling import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "error"]


class TextCodec(Protocol):
    """The two methods of a tokenizer that the engine calls; token ids are integers."""

    def encode_raw(self, text: str, bos_token_id: int | None, *, plain: bool = False) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class TokenLogprobs(NamedTuple):
    """The model's own log-probabilities at one position, in nats, before bias, temperature and truncation."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """(token id, log-probability) of the most likely tokens, as many as requested, best first."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One finished completion."""

    tokens: list[int]
    """Generated token ids, without the end token, but with the tokens of a stop string."""
    text: str | None
    """The decoded tokens up to a stop string; None without a tokenizer."""
    finish_reason: FinishReason
    """"stop" at an end-of-text token, stop id or stop string; "length" at max_tokens or max_length; "error"; "cancelled"."""
    logprobs: list[TokenLogprobs] | None = None
    """One entry for each of `tokens`; None if not requested."""
    error: str | None = None
    """Message of an "error": the model's logits are not finite."""


class Update(NamedTuple):
    """Output of one step for one request."""

    request: Request
    tokens: list[int]
    text: str
    """Text that became final: whole characters, nothing that may begin a stop string; "" without a tokenizer."""


class Request:
    """A prompt and its completion so far. `finish_reason` is None until it ends."""

    def __init__(
        self, prompt: list[int], params: SamplingParams, max_tokens: int, ends: frozenset[int], codec: TextCodec | None
    ) -> None:
        self.params = params
        self.sequence = Sequence(prompt=prompt, max_tokens=max_tokens)
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self.pieces: list[tuple[list[int], str]] = []
        """(tokens, text) that each call of `take` has added, in order."""
        self._ends = ends
        self._decoder = None if codec is None else StreamDecoder(codec)
        self._stops = _StopStrings(params.stop)

    @property
    def completion(self) -> Completion:
        """The completion of a request that has ended; AssertionError if it has not."""
        assert self.finish_reason is not None
        text = None if self._decoder is None else "".join(text for _, text in self.pieces)
        return Completion(self.tokens, text, self.finish_reason, self.logprobs, self.error)

    def take(self, tokens: list[int], logprobs: list[TokenLogprobs] | None) -> Update:
        """Append tokens until max_tokens, a stop string or an end token (left out) ends the request; return those appended."""
        first, text = len(self.tokens), ""
        for i, token in enumerate(tokens):
            if token in self._ends:
                self.finish_reason = "stop"
                break
            self.tokens.append(token)
            if self.logprobs is not None and logprobs is not None:
                self.logprobs.append(logprobs[i])
            if self._decoder is not None:
                text += self._stops.feed(self._decoder.feed([token]))
            if self._stops.met or len(self.tokens) == self.sequence.max_tokens:
                self.finish_reason = (
                    "length"  # Or "stop", as set below: the decoder's last text may complete a stop string too.
                )
                break
        if self.finish_reason is not None and self._decoder is not None:
            text += self._stops.feed(self._decoder.finish(), last=True)
        if self._stops.met:
            self.finish_reason = "stop"
        self.pieces.append((self.tokens[first:], text))
        return Update(self, *self.pieces[-1])

    def fail(self, error: str) -> Update:
        """End the request with finish reason "error" and this message; return an update without tokens."""
        self.finish_reason, self.error = "error", error
        self.pieces.append(([], ""))
        return Update(self, *self.pieces[-1])

    def cancel(self) -> None:
        """Set `finish_reason` to "cancelled", unless the request has ended. `Engine.cancel` also releases slot and pages."""
        if self.finish_reason is None:
            self.finish_reason = "cancelled"


class _StopStrings:
    """Cuts a growing text at the first stop string, and holds back text that may begin one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops, self._held, self.met = stops, "", False

    def feed(self, text: str, last: bool = False) -> str:
        """Append `text`; return what became final: all up to a stop string or, unless `last`, up to the beginning of one."""
        if self.met:
            return ""
        self._held += text
        starts = [start for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if starts:
            self.met, count = True, min(starts)
        else:
            count = len(self._held) - (0 if last else max(map(self._begun, self._stops), default=0))
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _begun(self, stop: str) -> int:
        """Return the length of the longest end of the held text with which `stop` begins; 0 if there is none."""
        return next((n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0)


class StreamDecoder:
    """Decodes ids incrementally; the returned texts, joined, are the text of all ids.

    A character whose bytes are spread over several tokens is returned with its last byte.
    """

    def __init__(self, tokenizer: TextCodec) -> None:
        self._tokenizer = tokenizer
        # The window begins with the ids returned last: some tokenizers decode a token by the one before it.
        self._window: list[int] = []
        self._num_context = 0

    def feed(self, ids: Iterable[int]) -> str:
        """Append ids; return all text not returned yet, or "" while its last character lacks bytes."""
        self._window.extend(ids)
        is_incomplete = self._tokenizer.decode(self._window).endswith("\ufffd")
        return "" if is_incomplete else self.finish()

    def finish(self) -> str:
        """Return all text not returned yet; an incomplete last character becomes U+FFFD."""
        context = self._tokenizer.decode(self._window[: self._num_context])
        text = self._tokenizer.decode(self._window)[len(context) :]
        self._window = self._window[self._num_context :]
        self._num_context = len(self._window)
        return text


# ----------------------------------------------------------------------------------------------------------------------
# Prompts, as text or token ids, and their checks.


Prompt = str | Iterable[int]


def prompt_ids(
    prompt: Prompt, config: ModelConfig, tokenizer: TextCodec | None, max_length: int, *, plain: bool = False
) -> list[int]:
    """Return a prompt's ids, as `token_ids` does. Raises ValueError also if they are `max_length` or more."""
    ids = token_ids(prompt, config, tokenizer, plain=plain)
    context = config.max_position_embeddings
    remedy = "shorten it or raise max_length" if max_length < context else "shorten it"
    remedy = f"(the model's context is {context}); {remedy}"
    check(len(ids) < max_length, f"the prompt's {len(ids)} tokens leave no room in max_length {max_length} {remedy}")
    return ids


def token_ids(prompt: Prompt, config: ModelConfig, tokenizer: TextCodec | None, *, plain: bool = False) -> list[int]:
    """Return the ids of a prompt: text encoded by the tokenizer's `encode_raw`, and token ids unchanged.

    Raises:
      ValueError: for no ids, an id outside the vocabulary, text without a tokenizer, or neither text nor integers.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("the prompt is text, but the engine has no tokenizer; pass token ids, or a tokenizer")
        ids = tokenizer.encode_raw(prompt, config.bos_token_id, plain=plain)
    else:
        try:
            ids = [operator.index(i) for i in prompt]
        except TypeError:
            raise ValueError(
                f"the prompt {prompt!r:.100} is neither text nor a list of token ids, which are integers; pass a list of such "
                "prompts to `generate`, or one such prompt to other methods"
            ) from None
    check(bool(ids), "the prompt is empty; give at least one token")
    for i in ids:
        check_id(i, config)
    return ids


def check_id(i: int, config: ModelConfig) -> None:
    """Raise ValueError unless 0 <= i < vocab_size."""
    if not 0 <= i < config.vocab_size:
        raise ValueError(f"token id {i} is outside the vocabulary of {config.vocab_size}; use 0 to {config.vocab_size - 1}")


# ----------------------------------------------------------------------------------------------------------------------
# Types of the scheduler: a sequence, and the step that the engine dispatches.


@dataclasses.dataclass(eq=False)
class Sequence:
    """The scheduler's state of a request. Its "text" is the token ids of the prompt and of the tokens generated so far."""

    prompt: list[int]
    max_tokens: int
    arrival: int = -1
    """Position in the order of `submit`, from 0; lower is older, and -1 is not submitted."""
    tokens: list[int] = dataclasses.field(default_factory=list)
    """Generated tokens that the host has read and `Scheduler.accept` has appended."""
    pages: list[int] = dataclasses.field(default_factory=list)
    """Page numbers in its shard, in the order of the text. Shared ones are full and only read."""
    shard: int | None = None
    slot: int | None = None
    """Counted over all shards: shard * slots_per_shard + i; None while it has no slot."""
    cached: int = 0
    """Tokens of the text with latents in the pages, including writes in flight."""
    reused: int = 0
    """Leading tokens of `cached` that the prefix cache supplied since the last admission."""
    epoch: int = 0
    """Increased when the sequence loses its slot: results of earlier dispatches are then void."""
    state: Literal["waiting", "prefilling", "running", "done"] = "waiting"
    sampling: bool = False
    """True while its last chunk, which yields a token, is in flight."""
    decodes: int = 0
    """Decode steps in flight; each yields at least one token."""
    published: int = 0
    """Number of leading pages that were offered to the prefix cache or taken from it."""

    @property
    def length(self) -> int:
        """Number of tokens of the text."""
        return len(self.prompt) + len(self.tokens)

    @property
    def place(self) -> tuple[int, int]:
        """(shard, slot) of an admitted sequence; AssertionError if it has none."""
        assert self.shard is not None
        assert self.slot is not None
        return self.shard, self.slot

    def text(self, start: int = 0, stop: int | None = None) -> list[int]:
        """Return tokens start, ..., stop - 1 of the text: prompt and generated tokens. None is the end."""
        stop, first = self.length if stop is None else stop, len(self.prompt)
        return self.prompt[start:stop] + self.tokens[max(start - first, 0) : max(stop - first, 0)]


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence to prefill."""

    sequence: Sequence
    start: int
    """Position of the first token in the text; the latents of all earlier ones are in the pages."""
    tokens: list[int]
    following: int | None
    """The token after the chunk; None for a text's last chunk, after which the device samples it."""


class Step(NamedTuple):
    """One dispatch: prefill the chunks, then decode."""

    chunks: list[Chunk]
    """At most one of each shard."""
    decoding: list[Sequence]
    """Sequences to decode, in order of arrival; none of them is in `chunks`."""
    tables_changed: bool
    """True if the pages of any slot changed since the step before."""
