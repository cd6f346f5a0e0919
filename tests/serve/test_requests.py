"""Bodies of requests, and what the engine is asked for them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from dsv3_jax.data.chat_template import ChatTemplate, encode_prompt
from dsv3_jax.infer import SamplingParams
from dsv3_jax.serve.requests import ApiError, GenerationRequest, ModelInfo, read_chat, read_completion
from tests.data.test_chat_template import ASSISTANT, BOS, EOS, IDS, TEMPLATE, TOKENIZER, USER
from tests.serve.running import MODEL

CONFIG = dataclasses.replace(MODEL, bos_token_id=IDS[BOS])
SERVED = ModelInfo("tiny", CONFIG, TOKENIZER, TEMPLATE, max_length=64, max_choices=8)
HELLO = [{"role": "user", "content": "Hello"}]


def completion(**body: Any) -> GenerationRequest:
    return read_completion({"model": "tiny", "prompt": "Hello", "seed": 5} | body, SERVED)


def chat(**body: Any) -> GenerationRequest:
    return read_chat({"model": "tiny", "messages": HELLO, "seed": 5} | body, SERVED)


def test_openais_defaults() -> None:
    assert completion().params == [SamplingParams(max_tokens=16, temperature=1.0, seed=5)]
    (params,) = chat().params
    most = 64 - len(chat().prompts[0])
    assert params == SamplingParams(max_tokens=most, temperature=1.0, seed=5, stop_token_ids=(IDS[EOS],))
    assert not completion().stream
    assert not chat().include_usage


def test_every_field_of_sampling_arrives() -> None:
    given: dict[str, Any] = {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "stop": ["a", "b"],
        "stop_token_ids": [3],
        "ignore_eos": True,
    }
    expected = SamplingParams(**given, seed=5, logit_bias={3: -100.0, 4: 2.5})
    asked = given | {"logit_bias": {"3": -100, "4": 2.5}, "user": "someone", "stream": True}
    # Who ignores end-of-text tokens ignores that of a turn, too.
    for wanted in (completion(**asked), chat(**asked)):
        assert wanted.params == [expected]
        assert wanted.stream
    assert completion(stop="a", top_k=-1).params[0].stop == ("a",)


def test_the_end_of_a_turn_ends_a_chat_and_no_completion() -> None:
    """The model's own end-of-text token is another one here."""
    other = dataclasses.replace(SERVED, config=dataclasses.replace(CONFIG, eos_token_id=0))
    body = {"model": "tiny", "messages": HELLO, "stop_token_ids": [7]}
    assert read_chat(body, other).params[0].stop_token_ids == (7, IDS[EOS])
    assert read_chat(body | {"ignore_eos": True}, other).params[0].stop_token_ids == (7,)
    assert read_completion({"model": "tiny", "prompt": "Hello"}, other).params[0].stop_token_ids == ()


def test_top_p_of_0_is_the_most_likely_token() -> None:
    assert 0 < completion(top_p=0).params[0].top_p <= 1e-6


def test_hints_for_a_cache_change_nothing() -> None:
    hints = {"prompt_cache_key": "x", "prompt_cache_options": {"mode": "explicit"}, "prompt_cache_retention": "24h"}
    part = {"type": "text", "text": "Hello", "prompt_cache_breakpoint": {"mode": "explicit"}}
    assert chat(**hints, messages=[{"role": "user", "content": [part]}]) == chat()


def test_seeds_count_up_and_are_folded_to_32_bits() -> None:
    assert [params.seed for params in completion(n=3, seed=2**32 - 1).params] == [2**32 - 1, 0, 1]
    assert completion(seed=-1).params[0].seed == 2**32 - 1
    assert completion(seed=2**63).params[0].seed == 0


def test_without_a_seed_draws_differ() -> None:
    assert len({completion(seed=None).params[0].seed for _ in range(4)}) > 1


@pytest.mark.parametrize("neutral", [{"echo": False, "best_of": 1, "suffix": None}, {"presence_penalty": 0}, {"store": False}])
def test_neutral_values_of_what_is_not_supported(neutral: dict[str, Any]) -> None:
    assert completion(**neutral) == completion()


def test_neutral_values_in_a_chat() -> None:
    neutral = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "parallel_tool_calls": True,
        "frequency_penalty": 0.0,
        "modalities": ["text"],
    }
    assert chat(**neutral) == chat()


def test_prompts_in_every_form() -> None:
    hello, there = ([IDS[BOS], *TOKENIZER.encode(text)] for text in ("Hello", "there"))
    assert completion(prompt="Hello").prompts == [hello]
    assert completion(prompt=["Hello", "there"]).prompts == [hello, there]
    assert completion(prompt=[5, 6]).prompts == [[5, 6]]
    assert completion(prompt=[[5, 6], [7]]).prompts == [[5, 6], [7]]
    assert completion(prompt="").prompts == [[IDS[BOS]]]
    wanted = completion(prompt=[[5, 6], [7]], n=2)
    assert [prompt for prompt, _ in wanted.choices] == [[5, 6], [5, 6], [7], [7]]


def test_messages_go_through_the_template() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    plain = [{"role": "system", "content": "Be brief."}, *HELLO]
    expected = encode_prompt(TEMPLATE, TOKENIZER, plain)
    assert expected[-1] == IDS[ASSISTANT]
    assert chat(messages=plain).prompts == [expected]
    asked = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert chat(messages=asked).prompts == [expected]


def test_what_a_user_says_never_becomes_a_special_token() -> None:
    (prompt,) = chat(messages=[{"role": "user", "content": f"a{ASSISTANT}b"}]).prompts
    assert (prompt.count(IDS[ASSISTANT]), prompt.count(IDS[USER])) == (1, 1)


def test_an_answer_may_be_sent_back_as_it_came() -> None:
    answer = {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None, "annotations": []}
    assert len(chat(messages=[*HELLO, answer, *HELLO]).prompts[0]) > len(chat().prompts[0])


def test_log_probabilities() -> None:
    assert [completion(logprobs=n).params[0].logprobs for n in (None, 0, 5)] == [None, 0, 5]
    asked = ({}, {"logprobs": False}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 20})
    assert [chat(**each).params[0].logprobs for each in asked] == [None, None, 0, 20]


def test_both_names_for_the_longest_answer() -> None:
    for asked in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}):
        assert chat(**asked).params[0].max_tokens == 3


SHARED: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n is 0; input should be greater than or equal to 1"),
    ({"n": 10**9}, "1 prompts with n 1000000000 are 1000000000 completions, more than 8 a request"),
    ({"max_tokens": 0}, "max_tokens is 0; input should be greater than or equal to 1"),
    ({"max_tokens": -5}, "max_tokens is -5; input should be greater than or equal to 1"),
    ({"max_tokens": "5"}, "max_tokens is '5'; input should be a valid integer"),
    ({"max_tokens": 64}, "maximum context length is 64 tokens"),
    ({"temperature": -0.1}, "temperature is -0.1; input should be greater than or equal to 0"),
    ({"temperature": 2.5}, "temperature is 2.5; input should be less than or equal to 2"),
    ({"top_p": 1.5}, "top_p is 1.5; input should be less than or equal to 1"),
    ({"top_k": -2}, "top_k is -2; input should be greater than or equal to -1"),
    ({"min_p": 2}, "min_p is 2; input should be less than or equal to 1"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0.0; it must be above 0"),
    ({"stop": ["a"] * 5}, "stop has 5 strings; use at most 4"),
    ({"stop": [1]}, "stop is [1]; use a string or a list of strings"),
    ({"stop": ""}, "stop is ''; an empty string"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids is 'a'; input should be a valid integer"),
    ({"logit_bias": [1]}, "logit_bias is [1]; input should be a valid dictionary"),
    ({"logit_bias": {"x": 1}}, "logit_bias is 'x'; its keys are token ids"),
    ({"logit_bias": {"1": 101}}, "logit_bias is 101; input should be less than or equal to 100"),
    ({"logit_bias": {"1": None}}, "logit_bias is null; input should be a valid number"),
    ({"seed": 1.5}, "seed is 1.5; input should be a valid integer"),
    ({"stream": "yes"}, "stream is 'yes'; input should be a valid boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options is given without stream"),
    ({"stream": True, "stream_options": {"odd": 1}}, "stream_options.odd is 1; this server does not support it, leave it out"),
    ({"stream": True, "stream_options": 1}, "stream_options is 1; use a JSON object"),
    ({"presence_penalty": 0.5}, "presence_penalty is 0.5; this server does not support it"),
    ({"frequency_penalty": -1}, "frequency_penalty is -1; this server does not support it"),
    ({"store": True}, "store is true; this server does not support it"),
    ({"model": 3}, "model is 3; input should be a valid string"),
    ({"model": None}, "model is missing; this server has tiny"),
    ({"temprature": 1}, "temprature is 1; this server does not support it, leave it out"),
]
COMPLETION: list[tuple[dict[str, Any], str]] = [
    ({"echo": True}, "echo is true; this server does not support it"),
    ({"best_of": 2}, "best_of is 2; this server does not support it"),
    ({"suffix": "end"}, "suffix is 'end'; this server does not support it"),
    ({"logprobs": 6}, "logprobs is 6; input should be less than or equal to 5"),
    ({"logprobs": True}, "logprobs is true; input should be a valid integer"),
    ({"messages": HELLO}, "messages is [{'content': 'Hello', 'role': 'user'}]; this server does not support it"),
    ({"prompt": None}, "prompt must be a string"),
    ({"prompt": 5}, "prompt must be a string"),
    ({"prompt": [1, "a"]}, "prompt must be a string"),
    ({"prompt": ["a", 1]}, "prompt must be a string"),
    ({"prompt": [True]}, "prompt must be a string"),
    ({"prompt": []}, "prompt is empty"),
    ({"prompt": [[1], []]}, "prompt is empty"),
    ({"prompt": "\ud800"}, "cannot be encoded as UTF-8"),
    ({"prompt": "x" * 200}, "maximum context length is 64 tokens"),
    ({"prompt": [[1]] * 9}, "9 prompts with n 1 are 9 completions, more than 8 a request"),
    ({"prompt": [[1]] * 3, "n": 3}, "3 prompts with n 3 are 9 completions, more than 8 a request"),
]
CHAT: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{}]}, "tool_choice is None; this server does not read calls of tools out of answers yet; set it to none"),
    ({"tool_choice": "auto"}, "tool_choice is 'auto'; this server does not read calls"),
    ({"response_format": {"type": "json_object"}}, "response_format is {'type': 'json_object'}; this server does not"),
    ({"reasoning_effort": "low"}, "reasoning_effort is 'low'; this server does not support it"),
    ({"logprobs": 3}, "logprobs is 3; input should be a valid boolean"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21; input should be less than or equal to 20"),
    ({"top_logprobs": 3}, "top_logprobs is 3 without logprobs"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens is 3, max_completion_tokens 4; give one of them"),
    ({"prompt": "x"}, "prompt is 'x'; this server does not support it, leave it out"),
    ({"messages": None}, "messages is missing"),
    ({"messages": []}, "messages is []; list should have at least 1 item"),
    ({"messages": ["hi"]}, "messages[0] is 'hi'; use a JSON object"),
    (
        {"messages": [*HELLO, {"role": "boss", "content": "x"}]},
        "messages[1] has the role 'boss', which leaves no trace in the text that the chat template writes",
    ),
    ({"messages": [{"role": "user"}]}, 'messages[0] needs a "content" that is text'),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content is 3; use a string, or a list of parts"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0].type is 'image_url'; input should be 'text'",
    ),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood is 1; this server does not support it"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]}, "messages[0].tool_calls[0] is 1"),
    ({"messages": [{"role": "user", "content": "x" * 100}]}, "maximum context length is 64 tokens"),
]


def require_refusal(read: Callable[..., Any], body: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError) as refused:
        read(**body)
    assert message in refused.value.message
    assert refused.value.status == 400
    assert refused.value.param


@pytest.mark.parametrize(("body", "message"), SHARED + COMPLETION)
def test_completions_that_are_refused(body: dict[str, Any], message: str) -> None:
    require_refusal(completion, body, message)


@pytest.mark.parametrize(("body", "message"), SHARED + CHAT)
def test_chats_that_are_refused(body: dict[str, Any], message: str) -> None:
    require_refusal(chat, body, message)


@pytest.mark.parametrize("read", [completion, chat])
def test_another_model_is_not_found(read: Any) -> None:
    with pytest.raises(ApiError, match="The model `gpt-4` does not exist") as refused:
        read(model="gpt-4")
    assert (refused.value.status, refused.value.code) == (404, "model_not_found")


def test_a_context_that_is_too_long_has_openais_code() -> None:
    with pytest.raises(ApiError) as refused:
        completion(prompt=[1] * 60, max_tokens=5)
    assert refused.value.code == "context_length_exceeded"
    assert completion(prompt=[1] * 60, max_tokens=4).params[0].max_tokens == 4


def test_without_a_template_there_is_no_chat() -> None:
    served = dataclasses.replace(SERVED, template=None)
    with pytest.raises(ApiError, match="the model tiny has no chat template, so it takes no messages; use /v1/completions"):
        read_chat({"model": "tiny", "messages": HELLO}, served)


def test_what_a_template_refuses_is_said_in_its_words() -> None:
    template = type(TEMPLATE)("{{ raise_exception('no ' + messages[0]['role']) }}", {})
    with pytest.raises(ApiError, match="no user") as refused:
        read_chat({"model": "tiny", "messages": HELLO}, dataclasses.replace(SERVED, template=template))
    assert (refused.value.status, refused.value.param) == (400, "messages")


def test_special_tokens_of_a_raw_prompt_are_read_unless_they_are_to_be_spelt() -> None:
    text = f"{BOS}{USER}Hi{EOS}"
    (ids,) = completion(prompt=text).prompts
    assert ids == [IDS[BOS], IDS[USER], *TOKENIZER.encode("Hi"), IDS[EOS]]
    (spelt,) = completion(prompt=f"{USER}Hi", add_special_tokens=False).prompts
    assert spelt == TOKENIZER.encode_documents([f"{USER}Hi"])[0]
    assert not {*spelt} & {*IDS.values()}
    assert completion(prompt=["a", [5]], add_special_tokens=False).prompts == [TOKENIZER.encode("a"), [5]]


def test_a_chat_has_thoughts_calls_tools_and_switches() -> None:
    source = (
        "{% for m in messages %}{{ m.content }}{{ m.reasoning_content }}{{ m.tool_calls | tojson if m.tool_calls }}"
        "{{ m.tool_call_id }}{{ m.name }}.{% endfor %}{{ tools | tojson if tools }}{{ 'T' if thinking }}"
    )
    served = dataclasses.replace(SERVED, template=ChatTemplate(source, {}), max_length=512, switches={"thinking": True})
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    messages = [
        *HELLO,
        {"role": "assistant", "content": "a", "reasoning_content": "b", "tool_calls": None, "refusal": None},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "r", "tool_call_id": "1", "name": "f"},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    body = {"model": "tiny", "messages": messages, "tools": tools, "tool_choice": "none"}
    shown = f"Hello.ab.None{json.dumps(calls)}.r1f.{json.dumps(tools)}"
    for own, expected in (({}, shown + "T"), ({"chat_template_kwargs": {"thinking": False}}, shown)):
        (ids,) = read_chat(body | own, served).prompts
        assert TOKENIZER.decode(ids) == expected
        given = {"tools": tools, "thinking": True} | own.get("chat_template_kwargs", {})
        assert ids == encode_prompt(served.template, TOKENIZER, messages, **given)
    with pytest.raises(ApiError, match="chat_template_kwargs sets tools, which has a place of its own"):
        read_chat(body | {"chat_template_kwargs": {"tools": 1}}, served)


def test_an_answer_at_the_end_is_continued() -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Hel"}]
    expected = [[*chat().prompts[0], *TOKENIZER.encode("Hel")]]
    agreed = {"continue_final_message": True, "add_generation_prompt": False}
    assert chat(messages=begun).prompts == chat(messages=begun, **agreed).prompts == expected
    assert chat(continue_final_message=False, add_generation_prompt=True) == chat()
    for body, field in (
        ({"messages": begun, "continue_final_message": False}, "continue_final_message"),
        ({"messages": begun, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"continue_final_message": True}, "continue_final_message"),
    ):
        with pytest.raises(ApiError, match=f"^{field} is (true|false), but the last message is") as refused:
            chat(**body)
        assert refused.value.param == field
