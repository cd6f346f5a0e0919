"""Request bodies of the two OpenAI endpoints: validation by pydantic, then prompts and sampling parameters.

OpenAI's unsupported fields are refused by name unless their value is neutral, that is, changes nothing. Unknown fields are
refused. top_k, min_p, repetition_penalty, stop_token_ids and ignore_eos mean the same as in vLLM. null counts as absent.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, ValidationInfo, model_validator

from dsv3_jax.config import ModelConfig
from dsv3_jax.data.chat_template import ASSISTANT, ChatTemplate, closing_tokens, encode_prompt, read_switches
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.infer import SamplingParams
from dsv3_jax.infer.request import check_id, token_ids
from dsv3_jax.infer.sampling import MOST_LOGPROBS

SMALLEST_TOP_P = 1e-6
"""Value used in place of a smaller top_p, such as 0: only the most likely token is left."""
_SAMPLING = {field.name for field in dataclasses.fields(SamplingParams)} - {"max_tokens", "seed", "logprobs"}


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """The served model, and two limits of a request: tokens of a prompt with its completion, and completions."""

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None
    max_length: int
    max_choices: int
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Variables of the template, which a request may override."""


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """A validated completion or chat request, with its prompts as token ids."""

    is_chat: bool
    prompts: list[list[int]]
    params: list[SamplingParams]
    """One per choice: choice i belongs to prompt i // n."""
    stream: bool
    include_usage: bool

    @property
    def n(self) -> int:
        """Choices per prompt."""
        return len(self.params) // len(self.prompts)

    @property
    def choices(self) -> list[tuple[list[int], SamplingParams]]:
        """Prompt and parameters of each choice."""
        return [(self.prompts[i // self.n], params) for i, params in enumerate(self.params)]


Headers = Mapping[str, str]
_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """Error response in OpenAI's format: a status, and {"error": {"message", "type", "param", "code"}}."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: Headers | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response; `type` follows from the status."""
        kind = _ERROR_TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


# ----------------------------------------------------------------------------------------------------------------------
# Schema of the bodies


def _integer(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():  # JSON has no integers; some clients send 1.0.
        value = int(value)
    if isinstance(value, int) and abs(value) >= 2**64:
        raise ValueError("use an integer of 64 bits")
    return value


def _check_model(name: str, info: ValidationInfo[ModelInfo]) -> str:
    served = info.context.name
    if not name:
        raise ApiError(400, f"model is missing; this server has {served}", "model")
    if name != served:
        raise ApiError(404, f"The model `{name:.100}` does not exist; this server has {served}", "model", "model_not_found")
    return name


def _check_stop(stop: Any) -> Any:
    if isinstance(stop, list) and len(stop) > 4:
        raise ApiError(400, f"stop has {len(stop)} strings; use at most 4", "stop")
    return stop


def _check_token_id(token: int, info: ValidationInfo[ModelInfo]) -> int:
    check_id(token, info.context.config)
    return token


def _from_digits(key: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", key):
        raise ValueError('its keys are token ids, such as "50"')
    return int(key)


def _parts(content: Any) -> Any:
    if not isinstance(content, str | list):
        raise ValueError("use a string, or a list of parts with text")
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


_Integer = Annotated[int, BeforeValidator(_integer)]
_TokenId = Annotated[_Integer, AfterValidator(_check_token_id)]
_Bias = Annotated[float, Field(ge=-100, le=100)]


class _Object(BaseModel, strict=True, extra="forbid", allow_inf_nan=False):
    """JSON object of a body. Drops null, ignored and neutral fields, then refuses undeclared ones."""

    ignored: ClassVar[set[str]] = set()
    """Names of fields that are accepted with any value, and dropped."""
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Field -> the values at which it changes nothing, and is dropped."""

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            raise ValueError("use a JSON object")
        return {name: value for name, value in content.items() if not cls._changes_nothing(name, value)}

    @classmethod
    def _changes_nothing(cls, name: str, value: Any) -> bool:
        # False == 0 in Python, but not in JSON.
        neutral = (value == other and isinstance(value, bool) == isinstance(other, bool) for other in cls.neutral.get(name, ()))
        return value is None or name in cls.ignored or any(neutral)


class _StreamOptions(_Object):
    ignored = {"include_obfuscation"}
    include_usage: bool = False


class _Body(_Object):
    """Fields of both endpoints."""

    ignored = {"user", "safety_identifier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"}
    neutral = {
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "metadata": ({},),
    }
    model: Annotated[str, AfterValidator(_check_model)] = Field("", validate_default=True)
    max_tokens: _Integer | None = Field(None, ge=1)
    n: _Integer = Field(1, ge=1)
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    seed: _Integer | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: Annotated[float, Field(ge=0, le=1), AfterValidator(lambda top_p: max(top_p, SMALLEST_TOP_P))] = 1.0
    top_k: Annotated[_Integer, Field(ge=-1), AfterValidator(lambda top_k: max(top_k, 0))] = 0  # In vLLM, -1 means all.
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, le=1000)
    stop: Annotated[Any, AfterValidator(_check_stop)] = ()
    stop_token_ids: list[_TokenId] = []
    logit_bias: dict[Annotated[_TokenId, BeforeValidator(_from_digits)], _Bias] = {}
    ignore_eos: bool = False


class _CompletionBody(_Body):
    neutral = _Body.neutral | {"echo": (False,), "best_of": (1,), "suffix": ("",)}
    max_tokens: _Integer | None = Field(16, ge=1)
    prompt: Any = None
    add_special_tokens: bool = True
    logprobs: _Integer | None = Field(None, ge=0, le=5)


class _TextPart(_Object):
    ignored = {"prompt_cache_breakpoint"}
    type: Literal["text"]
    text: str


class _Message(_Object):
    ignored = {"refusal", "annotations"}  # A client may send back a response unchanged.
    role: str
    content: Annotated[list[_TextPart], BeforeValidator(_parts)] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] = []
    tool_call_id: str | None = None
    prefix: bool | None = None

    def for_template(self) -> dict[str, Any]:
        """Return the message as `encode_prompt` takes it."""
        content = None if self.content is None else "".join(part.text for part in self.content)
        return {**self.model_dump(exclude_none=True), "content": content}


class _ChatBody(_Body):
    neutral = _Body.neutral | {
        "functions": ([],),
        "function_call": ("none",),
        "parallel_tool_calls": (True, False),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
    }
    messages: list[_Message] = Field(min_length=1)
    tools: Any = None
    tool_choice: Any = None
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    max_completion_tokens: _Integer | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: _Integer | None = Field(None, ge=0, le=MOST_LOGPROBS)


_Schema = TypeVar("_Schema", bound=_Body)


def _validate(schema: type[_Schema], body: Any, info: ModelInfo) -> _Schema:
    """Return the body as a `schema`. Raises ApiError: 404 for another model, else 400 for one error, unknown fields first."""
    try:
        return schema.model_validate(body, context=info)
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False)
    # Unknown fields first: a field may be missing because its name is misspelled.
    error = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    # The entries of these two have no names of their own.
    loc = error["loc"][:1] if error["loc"][:1] in (("stop_token_ids",), ("logit_bias",)) else error["loc"]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)[1:]
    if error["type"] == "missing":
        raise ApiError(400, f"{where} is missing", where)
    remedy = error["msg"][0].lower() + error["msg"][1:]
    if error["type"] == "extra_forbidden":
        remedy = "this server does not support it, leave it out"
    elif error["type"] == "value_error":
        remedy = str(error["ctx"]["error"])
    value = error["input"]
    shown = str(value).lower() if isinstance(value, bool) else "null" if value is None else reprlib.repr(value)
    raise ApiError(400, f"{where[:100] or 'the body'} is {shown}; {remedy}", where or None)


# ----------------------------------------------------------------------------------------------------------------------
# From bodies to requests


def read_completion(body: Any, info: ModelInfo) -> GenerationRequest:
    """Return the request in the body of POST /v1/completions. Raises ApiError: 404 for another model, else 400."""
    fields = _validate(_CompletionBody, body, info)
    has_several = isinstance(fields.prompt, list) and fields.prompt and isinstance(fields.prompt[0], str | list)
    prompts = fields.prompt if has_several else [fields.prompt]
    if not fields.add_special_tokens:
        spell = info.tokenizer.encode_documents
        prompts = [spell([prompt])[0] if isinstance(prompt, str) else prompt for prompt in prompts]
    return _generation(fields, info, prompts, "prompt", fields.max_tokens, fields.logprobs)


def read_chat(body: Any, info: ModelInfo) -> GenerationRequest:
    """Return the request in the body of POST /v1/chat/completions. Raises ApiError: 404 for another model, else 400."""
    fields = _validate(_ChatBody, body, info)
    older, newer, top = fields.max_tokens, fields.max_completion_tokens, fields.top_logprobs
    if info.template is None:
        message = f"the model {info.name} has no chat template, so it takes no messages; use /v1/completions"
        raise ApiError(400, message, "messages", "no_template")
    if None not in (older, newer) and older != newer:
        raise ApiError(400, f"max_tokens is {older}, max_completion_tokens {newer}; give one of them", "max_tokens")
    if top is not None and not fields.logprobs:
        raise ApiError(400, f"top_logprobs is {top} without logprobs; set logprobs to true", "top_logprobs")
    if fields.tool_choice not in (None, "none") or (fields.tools and fields.tool_choice is None):
        message = f"tool_choice is {fields.tool_choice!r:.100}; this server does not read calls of tools out of answers yet; "
        message += "set it to none to show tools to the model"
        raise ApiError(400, message, "tool_choice")
    is_answer = fields.messages[-1].role == ASSISTANT
    for name, expected in (("continue_final_message", is_answer), ("add_generation_prompt", not is_answer)):
        if getattr(fields, name) not in (None, expected):
            ending = "is an answer, which is continued" if is_answer else "is no answer"
            raise ApiError(400, f"{name} is {str(not expected).lower()}, but the last message {ending}; leave it out", name)
    try:
        switches = {**info.switches, **read_switches(fields.chat_template_kwargs)}
        messages = [message.for_template() for message in fields.messages]
        prompt = encode_prompt(info.template, info.tokenizer, messages, tools=fields.tools, **switches)
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from error
    max_tokens, logprobs = older if newer is None else newer, (top or 0) if fields.logprobs else None
    request = _generation(fields, info, [prompt], "messages", max_tokens, logprobs)
    closing = closing_tokens(info.template, info.tokenizer, info.config.vocab_size)
    return dataclasses.replace(request, is_chat=True, params=[params.ending_at(closing) for params in request.params])


def _generation(
    fields: _Body, info: ModelInfo, prompts: list[Any], param: str, max_tokens: int | None, logprobs: int | None
) -> GenerationRequest:
    """Return the request; `param` names the prompts' field, `max_tokens` None is the rest of the context. ApiError 400."""
    count = len(prompts) * fields.n
    if count > info.max_choices:
        message = f"{len(prompts)} prompts with n {fields.n} are {count} completions, more than {info.max_choices} a request"
        raise ApiError(400, f"{message}; send several requests", param if fields.n == 1 else "n")
    if "stream_options" in fields.model_fields_set and not fields.stream:
        raise ApiError(400, "stream_options is given without stream; set stream to true", "stream_options")
    encoded = [_encode(prompt, info, param) for prompt in prompts]
    longest = max(map(len, encoded))
    if longest + (max_tokens or 1) > info.max_length:
        message = (
            f"This model's maximum context length is {info.max_length} tokens; {longest} in the prompt and "
            f"{max_tokens or 1} for the completion are more. Shorten the prompt or lower max_tokens"
        )
        raise ApiError(400, message, param, "context_length_exceeded")
    # A seed of any sign and up to 64 bits is reduced to 32 bits: equal seeds give equal draws.
    seed = secrets.randbits(32) if fields.seed is None else fields.seed
    sampling, params = fields.model_dump(include=_SAMPLING), []
    try:
        for i in range(count):
            tokens = info.max_length - len(encoded[i // fields.n]) if max_tokens is None else max_tokens
            params.append(SamplingParams(max_tokens=tokens, seed=(seed + i) % 2**32, logprobs=logprobs, **sampling))
    except ValueError as error:
        raise ApiError(400, str(error), str(error).split(maxsplit=1)[0]) from error
    return GenerationRequest(False, encoded, params, fields.stream, fields.stream_options.include_usage)


def _encode(prompt: Any, info: ModelInfo, param: str) -> list[int]:
    """Return the token ids of a prompt, text or ids. Raises ApiError 400 for another type or invalid ids."""
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(type(token) is int for token in prompt)):
        message = "prompt must be a string, a list of strings, a list of token ids, or a list of such lists"
        raise ApiError(400, message, param)
    try:
        return token_ids(prompt, info.config, info.tokenizer)
    except ValueError as error:
        raise ApiError(400, str(error), param) from error
