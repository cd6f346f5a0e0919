"""What becomes of one prompt: its tokens, their text as it can be told, and why it ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Ids
from typing import Literal, NamedTuple, Protocol

from dsv3_jax.data.tokenizer import StreamDecoder
from dsv3_jax.infer.sampling import SamplingParams
from dsv3_jax.infer.sequence import Sequence

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
