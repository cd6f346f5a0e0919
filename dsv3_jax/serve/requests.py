"""A request's body, checked and turned into prompts and sampling parameters: what OpenAI's two endpoints may be asked.

Fields that OpenAI defines and this server does not support are refused by name unless they stand at a value that changes
nothing; so is every field that nobody defines. top_k, min_p, repetition_penalty, stop_token_ids and ignore_eos are taken as
vLLM takes them.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from dsv3_jax.config import ModelConfig
from dsv3_jax.data.chat_template import ChatTemplate, closing_tokens, encode_prompt
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.infer import SamplingParams
from dsv3_jax.infer.request import check_id, token_ids
from dsv3_jax.infer.sampling import MOST_LOGPROBS

MOST_COMPLETION_LOGPROBS = 5
COMPLETION_TOKENS = 16
MOST_STOPS = 4
SMALLEST_TOP_P = 1e-6
"""What OpenAI's 0 comes to: of any distribution the most likely token alone."""
LARGEST_BIAS = 100
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""What a message may call itself, and the name that templates know it by."""


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What requests are held to."""

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None
    max_length: int
    max_choices: int

    def check_token_ids(self, tokens: Iterable[int], param: str) -> None:
        """Raises ApiError for what is no id of the vocabulary."""
        for token in tokens:
            try:
                check_id(token, self.config)
            except ValueError as error:
                raise refuse(f"{param}: {error}", param) from error


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """A request, understood."""

    kind: Literal["completion", "chat"]
    prompts: list[list[int]]
    params: list[SamplingParams]
    """One a choice: the i-th belongs to prompt i // n."""
    stream: bool
    include_usage: bool

    @property
    def choices(self) -> list[tuple[list[int], SamplingParams]]:
        """Prompt and parameters of each choice."""
        n = len(self.params) // len(self.prompts)
        return [(self.prompts[i // n], params) for i, params in enumerate(self.params)]

    @property
    def reports(self) -> bool:
        """Whether log-probabilities are asked for."""
        return self.params[0].logprobs is not None


def read_completion(body: Any, served: ModelInfo) -> GenerationRequest:
    """The body of POST /v1/completions.

    Raises:
      ApiError: 404 for another model, else 400, naming the field.
    """
    fields = Fields(body)
    _check_model(fields, served)
    fields.refuse("echo", False)
    fields.refuse("best_of", 1)
    fields.refuse("suffix", "")
    most = fields.integer("max_tokens", 1)
    logprobs = fields.integer("logprobs", 0, MOST_COMPLETION_LOGPROBS)
    prompt = fields.take("prompt")
    asked = _ParsedBody(fields, served)
    fields.finish()
    prompts = _prompts(prompt, served)
    return asked.wanted("completion", prompts, COMPLETION_TOKENS if most is None else most, logprobs, "prompt")


def read_chat(body: Any, served: ModelInfo) -> GenerationRequest:
    """The body of POST /v1/chat/completions.

    Raises:
      ApiError: 404 for another model, else 400, naming the field.
    """
    fields = Fields(body)
    _check_model(fields, served)
    if served.template is None:
        raise refuse(
            f"the model {served.name} has no chat template, so it takes no messages; use /v1/completions",
            "messages",
            "no_template",
        )
    for name in ("tools", "functions"):
        fields.refuse(name, [])
    for name in ("tool_choice", "function_call"):
        fields.refuse(name, "none")
    fields.refuse("response_format", {"type": "text"})
    fields.refuse("modalities", ["text"])
    fields.refuse("parallel_tool_calls", True, False)  # Of no tools.
    for name in ("audio", "moderation", "prediction", "reasoning_effort", "verbosity", "web_search_options"):
        fields.refuse(name)
    most, older = fields.integer("max_completion_tokens", 1), fields.integer("max_tokens", 1)
    if None not in (most, older) and most != older:
        raise refuse(f"max_tokens is {older}, max_completion_tokens {most}; give one of them", "max_tokens")
    reports, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, MOST_LOGPROBS)
    if top is not None and not reports:
        raise refuse(f"top_logprobs is {top} without logprobs; set logprobs to true", "top_logprobs")
    messages = _messages(fields.take("messages"))
    asked = _ParsedBody(fields, served)
    fields.finish()
    try:
        prompt = encode_prompt(served.template, served.tokenizer, messages)
    except ValueError as error:
        raise refuse(str(error), "messages") from error
    closing = closing_tokens(served.template, served.tokenizer, served.config.vocab_size)
    wanted = asked.wanted("chat", [prompt], most if most is not None else older, (top or 0) if reports else None, "messages")
    return dataclasses.replace(wanted, params=[params.ending_at(closing) for params in wanted.params])


class _ParsedBody:
    """The fields that both endpoints have."""

    def __init__(self, fields: Fields, served: ModelInfo) -> None:
        self._served = served
        stop_ids = fields.take("stop_token_ids")
        top_p = fields.number("top_p", 0, 1, 1.0)
        self._n = fields.integer("n", 1, served.max_choices) or 1
        self._stream = fields.flag("stream")
        self._include_usage = _include_usage(fields, self._stream)
        # More than 32 bits and less than 0 are folded: what matters is that the same seed gives the same draws.
        seed = fields.integer("seed")
        self._seed = secrets.randbits(32) if seed is None else seed
        self._given: dict[str, Any] = {
            "temperature": fields.number("temperature", 0, 2, 1.0),
            "top_p": max(top_p, SMALLEST_TOP_P),
            "min_p": fields.number("min_p", 0, 1, 0.0),
            "repetition_penalty": fields.number("repetition_penalty", 0, 1000, 1.0),
            "top_k": max(fields.integer("top_k", -1) or 0, 0),  # -1 is vLLM's word for all.
            "ignore_eos": fields.flag("ignore_eos"),
            "stop": _stops(fields),
            "logit_bias": _biases(fields),
            "stop_token_ids": () if stop_ids is None else stop_ids,
        }
        served.check_token_ids(self._given["logit_bias"], "logit_bias")
        for name in ("presence_penalty", "frequency_penalty"):
            fields.refuse(name, 0)
        fields.refuse("service_tier", "auto", "default")
        fields.refuse("store", False)
        fields.refuse("metadata", {})
        fields.ignore("user", "safety_identifier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention")

    def wanted(
        self,
        kind: Literal["completion", "chat"],
        prompts: list[list[int]],
        most: int | None,
        logprobs: int | None,
        prompt_field: str,
    ) -> GenerationRequest:
        """Joins them with an endpoint's own; `most` None is the rest of the context, `prompt_field` what prompts came in."""
        if len(prompts) * self._n > self._served.max_choices:
            raise refuse(
                f"{len(prompts)} prompts with n {self._n} are {len(prompts) * self._n} completions, more than the "
                f"{self._served.max_choices} of a request; send several requests",
                "n",
            )
        params = []
        for i in range(len(prompts) * self._n):
            tokens = self._room(len(prompts[i // self._n]), most, prompt_field)
            seed = (self._seed + i) % 2**32
            try:
                params.append(SamplingParams(max_tokens=tokens, seed=seed, logprobs=logprobs, **self._given))
            except ValueError as error:
                raise refuse(str(error), str(error).split(maxsplit=1)[0]) from error
        # Only now is it known that they are ids.
        self._served.check_token_ids(params[0].stop_token_ids, "stop_token_ids")
        return GenerationRequest(kind, prompts, params, self._stream, self._include_usage)

    def _room(self, prompt: int, most: int | None, field: str) -> int:
        """Tokens that the completion of a prompt may have."""
        if prompt + (most or 1) > self._served.max_length:
            raise refuse(
                f"This model's maximum context length is {self._served.max_length} tokens; {prompt} in the prompt and "
                f"{most or 1} for the completion are more. Shorten the prompt or lower max_tokens",
                field,
                "context_length_exceeded",
            )
        return self._served.max_length - prompt if most is None else most


def _check_model(fields: Fields, served: ModelInfo) -> None:
    name = fields.text("model")
    if name is None:
        raise refuse(f"model is missing; this server has {served.name}", "model")
    if name != served.name:
        raise ApiError(
            404, f"The model `{name:.100}` does not exist; this server has {served.name}", param="model", code="model_not_found"
        )


def _include_usage(fields: Fields, stream: bool) -> bool:
    content = fields.take("stream_options")
    if content is None:
        return False
    options = Fields(content, "stream_options")
    include = options.flag("include_usage")
    options.ignore("include_obfuscation")
    options.finish()
    if not stream:
        raise refuse("stream_options is given without stream; set stream to true", "stream_options")
    return include


def _stops(fields: Fields) -> Any:
    stop = fields.take("stop")
    if isinstance(stop, list) and len(stop) > MOST_STOPS:
        raise refuse(f"stop has {len(stop)} strings; use at most {MOST_STOPS}", "stop")
    return () if stop is None else stop


def _biases(fields: Fields) -> dict[int, float]:
    biases = fields.take("logit_bias")
    if biases is None:
        return {}
    if not isinstance(biases, dict):
        raise fields.wrong("logit_bias", biases, "use an object from token id to bias")
    found = {}
    for token, bias in biases.items():
        if not re.fullmatch(r"[0-9]{1,9}", token):
            raise fields.wrong("logit_bias", token, 'its keys are token ids, such as "50"')
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not is_number or not -LARGEST_BIAS <= bias <= LARGEST_BIAS:
            raise fields.wrong("logit_bias", bias, f"a bias is a number in -{LARGEST_BIAS}..{LARGEST_BIAS}")
        found[int(token)] = float(bias)
    return found


def _prompts(prompt: Any, served: ModelInfo) -> list[list[int]]:
    """A prompt, or several; each as text or as token ids."""
    several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)
    prompts = prompt if several else [prompt]
    if len(prompts) > served.max_choices:
        raise refuse(f"there are {len(prompts)} prompts; a request has at most {served.max_choices}", "prompt")
    return [_prompt(each, served) for each in prompts]


def _prompt(prompt: Any, served: ModelInfo) -> list[int]:
    is_ids = isinstance(prompt, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt)
    if not isinstance(prompt, str) and not is_ids:
        raise refuse("prompt must be a string, a list of strings, a list of token ids, or a list of such lists", "prompt")
    try:
        ids = token_ids(prompt, served.config, served.tokenizer)
    except ValueError as error:
        raise refuse(str(error), "prompt") from error
    return ids


def _messages(content: Any) -> list[dict[str, str]]:
    if not isinstance(content, list) or not content:
        raise refuse("messages must be a list with at least one message", "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(content)]


def _message(content: Any, where: str) -> dict[str, str]:
    fields = Fields(content, where)
    role = fields.text("role")
    if role not in ROLES:
        raise fields.wrong("role", role, f"use one of {', '.join(ROLES)}")
    fields.refuse("tool_calls", [])  # First, since such a message may have no content.
    message = {"role": ROLES[role], "content": _content(fields.take("content"), f"{where}.content")}
    name = fields.text("name")
    if name is not None:
        message["name"] = name
    fields.ignore("tool_call_id", "refusal", "annotations")  # A client may send back an answer as it got it.
    for other in ("function_call", "audio"):
        fields.refuse(other)
    fields.finish()
    return message


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise refuse(f"{where} must be a string, or a list of parts with text", where)
    texts = []
    for i, part in enumerate(content):
        fields = Fields(part, f"{where}[{i}]")
        kind, text = fields.text("type"), fields.text("text")
        if kind != "text" or text is None:
            raise fields.wrong("type", kind, "only parts of type text are supported, with their text")
        fields.ignore("prompt_cache_breakpoint")
        fields.finish()
        texts.append(text)
    return "".join(texts)


# ----------------------------------------------------------------------------------------------------------------------
# The fields of a JSON object, each taken once by name and type. null is as good as absent; what nobody took is refused.


class Fields:
    """An object of a request. Every method raises ApiError (400), naming the field."""

    def __init__(self, content: Any, where: str = "") -> None:
        """Takes a JSON value; `where` is its name, empty for the body itself."""
        if not isinstance(content, dict):
            raise refuse(f"{where or 'the body'} is {_shown(content)}; use a JSON object", where or None)
        self._left = {name: value for name, value in content.items() if value is not None}
        self._prefix = f"{where}." if where else ""

    def take(self, name: str) -> Any:
        """Whatever stands there, or None."""
        return self._left.pop(name, None)

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, value, "use a string")
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, value, "use true or false")
        return bool(value)

    def integer(self, name: str, low: int | None = None, high: int | None = None) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():  # JSON knows no integers, and some clients write 1.0.
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(name, value, "use an integer")
        self._check_range(name, value, low, high)
        if abs(value) >= 2**64:
            raise self.wrong(name, value, "use one of 64 bits")
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
            raise self.wrong(name, value, "use a finite number")
        self._check_range(name, value, low, high)
        return float(value)

    def ignore(self, *names: str) -> None:
        """Fields that change nothing about the answer."""
        for name in names:
            self.take(name)

    def refuse(self, name: str, *neutral: Any) -> None:
        """A field of OpenAI's that is not supported: only its neutral values may stand there."""
        value = self.take(name)
        # 0 == False in Python, so types are compared too, but 0 and 0.0 are one number in JSON.
        if value is not None and not any(value == other and _kind(value) == _kind(other) for other in neutral):
            raise self.wrong(name, value, "this server does not support it, leave it out")

    def finish(self) -> None:
        """Refuses what is left."""
        if self._left:
            name = next(iter(self._left))
            raise refuse(f"{self._prefix}{name:.100} is not a field that this server knows; leave it out", self._prefix + name)

    def wrong(self, name: str, value: Any, remedy: str) -> Exception:
        """The error for a field."""
        return refuse(f"{self._prefix}{name} is {_shown(value)}; {remedy}", self._prefix + name)

    def _check_range(self, name: str, value: float, low: float | None, high: float | None) -> None:
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = f"in {low}..{high}" if high is not None else f"at least {low}"
            raise self.wrong(name, value, f"it must {'lie' if high is not None else 'be'} {bounds}")


def _kind(value: Any) -> type:
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)


def _shown(value: Any) -> str:
    """A value in few words, as JSON has it; repr of a huge integer would raise."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int) and abs(value) > 10**30:
        return "an enormous integer"
    text = repr(value) if not isinstance(value, dict | list) or len(value) < 20 else f"a {type(value).__name__} of {len(value)}"
    return text if len(text) <= 100 else f"{text[:97]}..."


# ----------------------------------------------------------------------------------------------------------------------
# Errors as OpenAI writes them: a status, and {"error": {"message", "type", "param", "code"}}.


_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refuse(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error of a request that is wrong in itself."""
    return ApiError(400, message, param=param, code=code)
