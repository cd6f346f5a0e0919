"""Responses in OpenAI's format: whole responses, chunks of a stream, log-probabilities."""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import Iterator
from typing import Any

from pydantic import TypeAdapter

from dsv3_jax.infer.request import TokenLogprobs
from dsv3_jax.serve.requests import GenerationRequest
from dsv3_jax.serve.worker import Progress, TokenBytes

DONE = b"data: [DONE]\n\n"
JSON: TypeAdapter[Any] = TypeAdapter(Any, config={"ser_json_inf_nan": "null"})
"""Parser and writer of JSON as bytes; NaN and infinities are written as null."""


def event(content: Any) -> bytes:
    """Return the bytes of a server-sent event with `content` as JSON."""
    return b"data: " + JSON.dump_json(content) + b"\n\n"


class Reply:
    """Builder of the response to one request as dicts in OpenAI's format, whole or in chunks."""

    def __init__(self, request: GenerationRequest, model: str, token_bytes: TokenBytes) -> None:
        self._request, self._token_bytes = request, token_bytes
        self._is_chat = request.is_chat
        prefix, self._object = ("chatcmpl", "chat.completion") if self._is_chat else ("cmpl", "text_completion")
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        # Each choice has a decoder, since a character may consist of several tokens, and a length in characters.
        self._decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in request.params]
        self._lengths = [0] * len(request.params)

    def opening(self) -> Iterator[dict[str, Any]]:
        """Yield the chunks before the first token: in a chat one with the role for each choice, else none."""
        if self._is_chat:
            for i in range(len(self._request.params)):
                yield self._chunk([self._choice(i, {"delta": {"role": "assistant", "content": ""}}, None, None)])

    def chunk(self, progress: Progress) -> dict[str, Any] | None:
        """Return the chunk of one choice's step; None without text, log-probabilities and finish reason."""
        if not (progress.text or progress.finish_reason or progress.logprobs):
            return None
        content = {"delta": {"content": progress.text} if progress.text else {}} if self._is_chat else {"text": progress.text}
        return self._chunk([self._choice(progress.choice, content, progress.logprobs or None, progress.finish_reason)])

    def last_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the chunk that ends a stream: no choices, and the token counts."""
        return self._chunk([], usage)

    def whole(self, progress: list[Progress], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the whole response body, from the progress of all choices up to their ends."""
        steps: list[list[Progress]] = [[] for _ in self._request.params]
        for step in progress:
            steps[step.choice].append(step)
        choices = []
        for i, params in enumerate(self._request.params):
            text = "".join(step.text for step in steps[i])
            content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._is_chat else {"text": text}
            logprobs = None if params.logprobs is None else [entry for step in steps[i] for entry in step.logprobs]
            choices.append(self._choice(i, content, logprobs, steps[i][-1].finish_reason))
        return {**self._head, "object": self._object, "choices": choices, "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        body = {**self._head, "object": f"{self._object}.chunk" if self._is_chat else self._object, "choices": choices}
        return {**body, "usage": usage} if self._request.include_usage else body

    def _choice(
        self, index: int, content: dict[str, Any], entries: list[TokenLogprobs] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        logprobs = None if entries is None else self._logprobs(index, entries)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, index: int, entries: list[TokenLogprobs]) -> dict[str, Any]:
        if self._is_chat:
            return {"content": [self._entry(each) for each in entries], "refusal": None}
        return {
            "tokens": [self._token_bytes.text(each.token) for each in entries],
            "token_logprobs": [each.logprob for each in entries],
            "top_logprobs": [self._top(each) for each in entries],
            "text_offset": [self._offset(index, each.token) for each in entries],
        }

    def _entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        return self._token(entry.token, entry.logprob) | {"top_logprobs": [self._token(*each) for each in entry.top]}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._token_bytes.text(token), "logprob": logprob, "bytes": list(self._token_bytes(token))}

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """Return text -> log-probability of the most likely tokens and the chosen one; of equal texts the more likely."""
        found: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token, entry.logprob)):
            found.setdefault(self._token_bytes.text(token), logprob)
        return found

    def _offset(self, index: int, token: int) -> int:
        """Return the character offset of a choice's next token in its text, and move the offset past it."""
        offset = self._lengths[index]
        self._lengths[index] += len(self._decoders[index].decode(self._token_bytes.shown(token)))
        return offset
