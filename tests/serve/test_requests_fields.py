"""Fields of a JSON object: taken by type, refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from dsv3_jax.serve.requests import ApiError, Fields


def test_fields_are_given_as_they_are_and_null_is_absent() -> None:
    fields = Fields({"a": "x", "b": True, "c": 3, "d": 0.5, "e": None, "f": 2.0})
    assert (fields.text("a"), fields.flag("b"), fields.integer("c"), fields.number("d", 0, 1, 7.0)) == ("x", True, 3, 0.5)
    assert (fields.text("e"), fields.flag("e"), fields.integer("e"), fields.number("e", 0, 1, 7.0)) == (None, False, None, 7.0)
    whole = fields.integer("f")
    assert (whole, type(whole)) == (2, int)
    fields.finish()


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("text", 3, "x is 3; use a string"),
        ("flag", 1, "x is 1; use true or false"),
        ("flag", "true", "x is 'true'; use true or false"),
        ("integer", True, "x is true; use an integer"),
        ("integer", 1.5, "x is 1.5; use an integer"),
        ("integer", float("inf"), "x is inf; use an integer"),
        ("integer", [1], r"x is \[1\]; use an integer"),
        ("integer", {str(i): i for i in range(30)}, "x is a dict of 30; use an integer"),
        ("integer", 10**4000, "x is an enormous integer; use one of 64 bits"),
        ("integer", "5" * 500, r"x is '5{96}\.\.\.; use an integer"),
    ],
)
def test_another_type_is_refused(method: str, value: Any, message: str) -> None:
    with pytest.raises(ApiError, match=f"^{message}$") as refused:
        getattr(Fields({"x": value}), method)("x")
    assert (refused.value.status, refused.value.param) == (400, "x")


@pytest.mark.parametrize(("value", "fits"), [(0, True), (2, True), (-1, False), (3, False), (10**4000, False)])
def test_integers_keep_to_their_range(value: int, fits: bool) -> None:
    if fits:
        assert Fields({"x": value}).integer("x", 0, 2) == value
    else:
        with pytest.raises(ApiError, match=r"^x is (-1|3|an enormous integer); it must lie in 0\.\.2$"):
            Fields({"x": value}).integer("x", 0, 2)


@pytest.mark.parametrize("value", [-0.01, 2.01, float("inf"), float("nan"), True, "1", 10**400])
def test_numbers_keep_to_their_range(value: Any) -> None:
    with pytest.raises(ApiError, match=r"^x is "):
        Fields({"x": value}).number("x", 0, 2, 1.0)


@pytest.mark.parametrize(
    ("value", "neutral", "fits"),
    [
        (None, (), True),
        (0, (0,), True),
        (0.0, (0,), True),
        (False, (0,), False),
        (0, (False,), False),
        ([], ([],), True),
        ([1], ([],), False),
        ("", (), False),
    ],
)
def test_what_is_not_supported_may_stand_at_a_neutral_value(value: Any, neutral: tuple[Any, ...], fits: bool) -> None:
    fields = Fields({"x": value})
    if fits:
        fields.refuse("x", *neutral)
        fields.finish()
    else:
        with pytest.raises(ApiError, match=r"^x is .*; this server does not support it, leave it out$"):
            fields.refuse("x", *neutral)


def test_what_is_left_is_refused_by_its_whole_name() -> None:
    fields = Fields({"known": 1, "strange": 2, "user": 3}, "stream_options")
    fields.integer("known")
    fields.ignore("user")
    with pytest.raises(ApiError, match=r"^stream_options\.strange is not a field") as refused:
        fields.finish()
    assert refused.value.param == "stream_options.strange"


def test_only_an_object_has_fields() -> None:
    with pytest.raises(ApiError, match=r"^the body is \[\]; use a JSON object$"):
        Fields([])
