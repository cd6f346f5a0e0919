"""Answers in OpenAI's words: whole ones, the chunks of a stream, and log-probabilities."""

from __future__ import annotations

import codecs
import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from dsv3_jax.infer.request import TokenLogprobs
from dsv3_jax.serve.requests import GenerationRequest
from dsv3_jax.serve.worker import Progress, TokenBytes, Usage

DONE = b"data: [DONE]\n\n"


def encode(content: Any) -> bytes:
    """JSON in UTF-8; half a surrogate pair, which a client may send and be told of, is escaped."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def event(content: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + encode(content) + b"\n\n"


class Reply:
    """Writes the answer to one request."""

    def __init__(self, wanted: GenerationRequest, model: str, token_bytes: TokenBytes) -> None:
        self._wanted, self._token_bytes = wanted, token_bytes
        self._is_chat = wanted.kind == "chat"
        prefix, self._object = ("chatcmpl", "chat.completion") if self._is_chat else ("cmpl", "text_completion")
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._offsets = [_Offsets(token_bytes) for _ in wanted.params]

    def opening(self) -> Iterator[dict[str, Any]]:
        """The chunks before the first token: in a chat, who speaks."""
        if self._is_chat:
            for i in range(len(self._wanted.params)):
                yield self._chunk(i, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def chunk(self, progress: Progress) -> dict[str, Any] | None:
        """The chunk of a step; None if nothing can be told yet."""
        if not (progress.text or progress.finish_reason or progress.logprobs):
            return None
        text = {"delta": {"content": progress.text} if progress.text else {}} if self._is_chat else {"text": progress.text}
        logprobs = self._logprobs(progress.choice, progress.logprobs) if progress.logprobs else None
        return self._chunk(progress.choice, text, logprobs, progress.finish_reason)

    def last_chunk(self, usage: Usage) -> dict[str, Any]:
        """The chunk that tells the usage."""
        return {**self._head, "object": self._chunk_object, "choices": [], "usage": usage_body(usage)}

    def whole(self, progress: list[Progress], usage: Usage) -> dict[str, Any]:
        """The answer in one piece."""
        choices: list[dict[str, Any]] = []
        by_choice: list[list[Progress]] = [[] for _ in self._wanted.params]
        for each in progress:
            by_choice[each.choice].append(each)
        for i, own in enumerate(by_choice):
            text = "".join(each.text for each in own)
            content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._is_chat else {"text": text}
            told = [entry for each in own for entry in each.logprobs]
            logprobs = self._logprobs(i, told) if self._wanted.reports else None
            choices.append({"index": i, **content, "logprobs": logprobs, "finish_reason": own[-1].finish_reason})
        return {**self._head, "object": self._object, "choices": choices, "usage": usage_body(usage)}

    @property
    def _chunk_object(self) -> str:
        return f"{self._object}.chunk" if self._is_chat else self._object

    def _chunk(self, index: int, content: dict[str, Any], logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        body = {**self._head, "object": self._chunk_object, "choices": [choice]}
        return {**body, "usage": None} if self._wanted.include_usage else body

    def _logprobs(self, index: int, told: list[TokenLogprobs]) -> dict[str, Any]:
        if self._is_chat:
            return {"content": [self._entry(each) for each in told], "refusal": None}
        return {
            "tokens": [self._token_bytes.text(each.token) for each in told],
            "token_logprobs": [each.logprob for each in told],
            "top_logprobs": [self._top(each) for each in told],
            "text_offset": [self._offsets[index].before(each.token) for each in told],
        }

    def _entry(self, told: TokenLogprobs) -> dict[str, Any]:
        return self._token(told.token, told.logprob) | {"top_logprobs": [self._token(*each) for each in told.top]}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._token_bytes.text(token), "logprob": logprob, "bytes": list(self._token_bytes(token))}

    def _top(self, told: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens and the chosen one, by their texts; of two with one text, the more likely."""
        found: dict[str, float] = {}
        for token, logprob in (*told.top, (told.token, told.logprob)):
            found.setdefault(self._token_bytes.text(token), logprob)
        return found


class _Offsets:
    """Where each token of a completion begins in its text, in characters."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def before(self, token: int) -> int:
        """The place of the next token, which this is."""
        place = self._length
        self._length += len(self._decoder.decode(self._token_bytes.shown(token)))
        return place


def usage_body(usage: Usage) -> dict[str, Any]:
    """The tokens of a request."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }
