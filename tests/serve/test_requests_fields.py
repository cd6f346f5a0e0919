"""Fields of a body: types, ranges, neutral values and names."""

from __future__ import annotations

from typing import Any

import pytest

from dsv3_jax.serve.requests import ApiError
from tests.serve.test_requests import HELLO, SERVED, chat, completion, read_completion


def test_null_is_absent_and_whole_numbers_are_integers() -> None:
    assert completion(n=None, stop=None, temperature=None, logit_bias=None, stream_options=None) == completion()
    (params,) = completion(max_tokens=2.0).params
    assert (params.max_tokens, type(params.max_tokens)) == (2, int)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model", 3, "model is 3; input should be a valid string"),
        ("stream", 1, "stream is 1; input should be a valid boolean"),
        ("stream", "true", "stream is 'true'; input should be a valid boolean"),
        ("seed", True, "seed is true; input should be a valid integer"),
        ("seed", 1.5, "seed is 1.5; input should be a valid integer"),
        ("seed", float("inf"), "seed is inf; input should be a valid integer"),
        ("seed", [1], r"seed is \[1\]; input should be a valid integer"),
        (
            "seed",
            {str(i): i for i in range(30)},
            r"seed is \{'0': 0, '1': 1, '10': 10, '11': 11, \.\.\.\}; input should be a valid integer",
        ),
        ("seed", 10**4000, r"seed is 10{17}\.\.\.0{19}; use an integer of 64 bits"),
        ("seed", "5" * 500, r"seed is '5{12}\.\.\.5{13}'; input should be a valid integer"),
    ],
)
def test_another_type_is_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ApiError, match=f"^{message}$") as refused:
        completion(**{name: value})
    assert (refused.value.status, refused.value.param) == (400, name)


@pytest.mark.parametrize(("value", "fits"), [(0, True), (5, True), (-1, False), (6, False), (10**4000, False)])
def test_integers_keep_to_their_range(value: int, fits: bool) -> None:
    if fits:
        assert completion(logprobs=value).params[0].logprobs == value
    else:
        with pytest.raises(ApiError, match=r"^logprobs is (-1|6|10{17}\.\.\.0{19}); (input should be|use an integer of 64)"):
            completion(logprobs=value)


@pytest.mark.parametrize("value", [-0.01, 2.01, float("inf"), float("nan"), True, "1", 10**400])
def test_numbers_keep_to_their_range(value: Any) -> None:
    with pytest.raises(ApiError, match=r"^temperature is "):
        completion(temperature=value)


@pytest.mark.parametrize(
    ("name", "value", "fits"),
    [
        ("presence_penalty", None, True),
        ("presence_penalty", 0, True),
        ("presence_penalty", 0.0, True),
        ("presence_penalty", False, False),
        ("store", 0, False),
        ("tools", [], True),
        ("audio", "", False),
    ],
)
def test_what_is_not_supported_may_stand_at_a_neutral_value(name: str, value: Any, fits: bool) -> None:
    if fits:
        assert chat(**{name: value}) == chat()
    else:
        with pytest.raises(ApiError, match=rf"^{name} is .*; this server does not support it, leave it out$"):
            chat(**{name: value})


def test_an_unknown_field_is_refused_by_its_whole_name() -> None:
    with pytest.raises(ApiError, match=r"^stream_options\.strange is 2; this server does not support it") as refused:
        completion(stream=True, stream_options={"include_usage": True, "strange": 2, "include_obfuscation": 3})
    assert refused.value.param == "stream_options.strange"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stop_token_ids": [3, "a"]}, "stop_token_ids"),
        ({"stop_token_ids": [6000]}, "stop_token_ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"6000": 1}}, "logit_bias"),
        ({"stop": [1]}, "stop"),
        ({"messages": [*HELLO, {"role": "user", "content": [{"type": "image_url"}]}]}, "messages[1].content[0].type"),
        # A misspelled name comes before what is missing for it.
        ({"messages": [{"rôle": "user", "content": "x"}]}, "messages[0].rôle"),
    ],
)
def test_an_error_names_its_field(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        chat(**body)
    assert (refused.value.status, refused.value.param) == (400, param)


def test_only_an_object_has_fields() -> None:
    with pytest.raises(ApiError, match=r"^the body is \[\]; use a JSON object$"):
        read_completion([], SERVED)
