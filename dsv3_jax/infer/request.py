"""What becomes of one prompt: its tokens, their text as it can be told, and why it ended."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from collections.abc import Sequence as Ids
from typing import Literal, NamedTuple, Protocol

from dsv3_jax.config import ModelConfig
from dsv3_jax.infer.sampling import SamplingParams

FinishReason = Literal["stop", "length", "cancelled"]


class TextCodec(Protocol):
    """What the engine asks of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Ids[int]) -> str: ...


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one place, those of the model itself."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The most likely tokens, best first: as many as were asked for."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One finished completion."""

    tokens: list[int]
    """The new tokens, without the id that ended it; a stop string's own tokens are among them."""
    text: str | None
    """The same as text, up to a stop string; None without a tokenizer."""
    finish_reason: FinishReason
    """"stop" at an end-of-text token, a stop id or a stop string; "length" at max_tokens or at the end of the context."""
    logprobs: list[TokenLogprobs] | None = None
    """One entry a token, if they were asked for."""


class Update(NamedTuple):
    """What a step brought for one request."""

    request: Request
    tokens: list[int]
    text: str
    """Text that is certain now: no part of a character, and nothing that may turn out to begin a stop string."""


class Request:
    """A prompt on its way. `finish_reason` is None until it has ended."""

    def __init__(
        self, prompt: list[int], params: SamplingParams, max_tokens: int, ends: frozenset[int], codec: TextCodec | None
    ) -> None:
        self.params = params
        self.sequence = Sequence(prompt=prompt, max_tokens=max_tokens)
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.finish_reason: FinishReason | None = None
        self._ends = ends
        self._decoder = None if codec is None else StreamDecoder(codec)
        self._stops = _StopStrings(params.stop)
        self._text: list[str] = []

    @property
    def completion(self) -> Completion:
        """The whole of it, once it has ended."""
        assert self.finish_reason is not None
        text = None if self._decoder is None else "".join(self._text)
        return Completion(self.tokens, text, self.finish_reason, self.logprobs)

    @property
    def progress(self) -> tuple[int, int]:
        """How many tokens and how many pieces of text there are. It changes with every `take`."""
        return len(self.tokens), len(self._text)

    def since(self, progress: tuple[int, int]) -> Update:
        """What has come since `progress` was that."""
        tokens, texts = progress
        return Update(self, self.tokens[tokens:], "".join(self._text[texts:]))

    def take(self, tokens: Ids[int], logprobs: Ids[TokenLogprobs] | None) -> Update:
        """Takes the next tokens, as far as they are for it."""
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
            if self._stops.met:
                self.finish_reason = "stop"
                break
            if len(self.tokens) == self.sequence.max_tokens:
                self.finish_reason = "length"
                break
        if self.finish_reason is not None and self._decoder is not None:
            text += self._stops.feed(self._decoder.finish()) + self._stops.finish()
            if self._stops.met:
                self.finish_reason = "stop"
        self._text.append(text)
        return Update(self, self.tokens[first:], text)

    def cancel(self) -> None:
        """Ends it where it is."""
        if self.finish_reason is None:
            self.finish_reason = "cancelled"


class _StopStrings:
    """Cuts a growing text at the first of some strings, and holds back what may be the beginning of one."""

    def __init__(self, stops: Ids[str]) -> None:
        self._stops, self._held, self.met = stops, "", False

    def feed(self, text: str) -> str:
        if self.met:
            return ""
        self._held += text
        ends = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.met = True
            return self._release(min(ends))
        return self._release(len(self._held) - max((self._begun(stop) for stop in self._stops), default=0))

    def finish(self) -> str:
        return "" if self.met else self._release(len(self._held))

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _begun(self, stop: str) -> int:
        """How many characters at the end may begin `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0)


# ----------------------------------------------------------------------------------------------------------------------
# A prompt, as text or as token ids, and whether a model can complete it.


Prompt = str | Ids[int]


def prompt_ids(prompt: Prompt, config: ModelConfig, tokenizer: TextCodec | None, max_length: int) -> list[int]:
    """What `token_ids` gives. Raises ValueError also for a prompt that leaves no room in `max_length`."""
    ids = token_ids(prompt, config, tokenizer)
    if len(ids) >= max_length:
        context = config.max_position_embeddings
        raise ValueError(
            f"the prompt's {len(ids)} tokens leave no room in max_length {max_length} (the model's context is {context}); "
            "shorten it" + (" or raise max_length" if max_length < context else "")
        )
    return ids


def token_ids(prompt: Prompt, config: ModelConfig, tokenizer: TextCodec | None) -> list[int]:
    """A prompt's token ids; a text begins with `bos_token_id`.

    Raises:
      ValueError: for an empty prompt, what is no id of the vocabulary, and text without a tokenizer.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("the prompt is text, but the engine has no tokenizer; pass token ids, or a tokenizer")
        bos = config.bos_token_id
        ids = ([] if bos is None else [bos]) + tokenizer.encode(prompt)
    else:
        try:
            ids = [operator.index(i) for i in prompt]
        except TypeError:
            raise ValueError(
                f"the prompt {prompt!r:.100} is neither text nor a list of token ids, which are integers; pass a list of such "
                "prompts"
            ) from None
    if not ids:
        raise ValueError("the prompt is empty; give at least one token")
    for i in ids:
        check_id(i, config)
    return ids


def check_id(i: int, config: ModelConfig) -> None:
    """Raises ValueError for what is no id of the vocabulary."""
    if not 0 <= i < config.vocab_size:
        raise ValueError(f"token id {i} is outside the vocabulary of {config.vocab_size}")


# ----------------------------------------------------------------------------------------------------------------------
# What the scheduler works with: a sequence on its way, and the step that the engine dispatches.


@dataclasses.dataclass(eq=False)
class Sequence:
    """A prompt, what has come of it, and where it lives."""

    prompt: list[int]
    max_tokens: int
    arrival: int = -1
    """Place in the order of `submit`; lower is older."""
    tokens: list[int] = dataclasses.field(default_factory=list)
    """Generated and accepted."""
    pages: list[int] = dataclasses.field(default_factory=list)
    """Page numbers of its shard, in the order of the text. Some may be shared; those are full and only read."""
    shard: int | None = None
    slot: int | None = None
    """Counted over all shards: shard * slots_per_shard + i."""
    cached: int = 0
    """How many tokens of the text have their latents in the pages, or dispatched to be written there."""
    reused: int = 0
    """How many of them were found in the prefix cache since the last admission."""
    epoch: int = 0
    """Raised when it loses its place: results that were dispatched before are not for it any more."""
    state: Literal["waiting", "prefilling", "running", "done"] = "waiting"
    sampling: bool = False
    """Its last chunk is in flight, which yields a token."""
    decodes: int = 0
    """Decode steps in flight; each yields at least one token."""
    published: int = 0
    """Pages that were offered to the prefix cache, or came from it."""

    @property
    def length(self) -> int:
        """Tokens of the text: prompt and generated."""
        return len(self.prompt) + len(self.tokens)

    @property
    def place(self) -> tuple[int, int]:
        """Shard and slot of a sequence that has them."""
        assert self.shard is not None
        assert self.slot is not None
        return self.shard, self.slot

    def text(self, start: int, stop: int) -> list[int]:
        """Tokens start to stop of prompt and generated, without joining the two."""
        first = len(self.prompt)
        return self.prompt[start:stop] + self.tokens[max(start - first, 0) : max(stop - first, 0)]


class Chunk(NamedTuple):
    """Tokens of one text to prefill."""

    sequence: Sequence
    epoch: int
    start: int
    """Where the tokens stand in the text; the latents of all before are in the pages."""
    tokens: list[int]
    following: int | None
    """The token after the chunk. None after a text's last chunk: the device samples it."""


class Step(NamedTuple):
    """What to dispatch: the chunks, then one decode step."""

    chunks: list[Chunk]
    """At most one a shard."""
    decoding: list[Sequence]
    """Every one to decode, in order of arrival. None of them is in `chunks`."""
    tables_changed: bool
    """Whether the pages of any slot are others than at the step before."""


class StreamDecoder:
    """Decodes ids as they come; the texts it returns, put together, are the text of all ids.

    A character whose bytes are spread over several tokens is returned when its last byte has come.
    """

    def __init__(self, tokenizer: TextCodec) -> None:
        self._tokenizer = tokenizer
        # The window opens with the ids returned last: some tokenizers decode a token by the one before it.
        self._window: list[int] = []
        self._num_context = 0

    def feed(self, ids: Iterable[int]) -> str:
        """Takes the next ids and returns the text that is now complete, which may be empty."""
        self._window.extend(ids)
        if self._tokenizer.decode(self._window).endswith(_REPLACEMENT):
            return ""
        return self.finish()

    def finish(self) -> str:
        """Returns what is left, complete or not."""
        context = self._tokenizer.decode(self._window[: self._num_context])
        text = self._tokenizer.decode(self._window)[len(context) :]
        self._window = self._window[self._num_context :]
        self._num_context = len(self._window)
        return text


_REPLACEMENT = "\ufffd"
