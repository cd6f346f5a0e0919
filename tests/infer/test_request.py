"""What becomes of a prompt: ends, stop strings and text as it can be told."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.infer.request import Completion, Request, TokenLogprobs
from dsv3_jax.infer.sampling import SamplingParams


class Letters:
    """A token is a letter."""

    def encode_raw(self, text: str, bos_token_id: int | None, *, plain: bool = False) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class Bytes:
    """A token is a byte of UTF-8."""

    def encode_raw(self, text: str, bos_token_id: int | None, *, plain: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def request(max_tokens: int = 100, ends: frozenset[int] = frozenset(), codec: object = None, **params: object) -> Request:
    return Request([1], SamplingParams(max_tokens=max_tokens, **params), max_tokens, ends, codec)


def test_tokens_after_the_last_are_not_taken() -> None:
    taken = request(3)
    assert taken.take([5, 6], None).tokens == [5, 6]
    assert taken.finish_reason is None
    assert taken.take([7, 8], None).tokens == [7]
    assert taken.completion == Completion([5, 6, 7], None, "length")


def test_an_end_is_left_out_and_counts_even_in_the_last_place() -> None:
    taken = request(2, ends=frozenset({9}))
    assert taken.take([5, 9, 7], None).tokens == [5]
    assert taken.completion == Completion([5], None, "stop")


def test_logprobs_are_those_of_the_tokens_taken() -> None:
    told = [TokenLogprobs(token, -1.0 * token, []) for token in (5, 9)]
    taken = request(4, ends=frozenset({9}), logprobs=0)
    taken.take([5, 9], told)
    assert taken.completion.logprobs == told[:1]


def test_a_character_is_told_when_it_is_whole() -> None:
    taken = request(codec=Bytes())
    texts = [taken.take([byte], None).text for byte in "é!".encode()]
    assert texts == ["", "é", "!"]


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    taken = request(codec=Letters(), stop=("END", "NIL"))
    texts = [taken.take([ord(letter)], None).text for letter in "aENbEN"]
    assert texts == ["a", "", "", "ENb", "", ""]
    assert taken.finish_reason is None
    update = taken.take([ord("D"), ord("x")], None)
    assert (update.text, update.tokens) == ("", [ord("D")])
    assert taken.completion == Completion([ord(letter) for letter in "aENbEND"], "aENb", "stop")


def test_what_was_held_back_is_told_at_the_end() -> None:
    taken = request(3, codec=Letters(), stop="abcd")
    assert [taken.take([ord(letter)], None).text for letter in "abc"] == ["", "", "abc"]
    assert taken.completion.text == "abc"
    assert taken.finish_reason == "length"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3), st.data())
def test_the_text_is_cut_at_the_first_stop_string_however_it_comes(text: str, stops: list[str], data: st.DataObject) -> None:
    taken, told, i = request(codec=Letters(), stop=tuple(stops)), "", 0
    while i < len(text) and taken.finish_reason is None:
        step = data.draw(st.integers(1, 4))
        told += taken.take([ord(letter) for letter in text[i : i + step]], None).text
        i += step
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert taken.finish_reason is None
        assert text.startswith(told)
        return
    # Whichever is complete first; of several that are complete at once, the one that begins first.
    end = min(ends)
    first = min(text.index(stop) for stop in stops if text[:end].endswith(stop) or stop in text[:end])
    assert (told, taken.finish_reason) == (text[:first], "stop")


def test_cancelling_ends_it_once() -> None:
    taken = request(2)
    taken.take([5], None)
    taken.cancel()
    assert taken.completion == Completion([5], None, "cancelled")
    done = request(1)
    done.take([5], None)
    done.cancel()
    assert done.finish_reason == "length"


def test_a_request_that_goes_on_has_no_completion() -> None:
    with pytest.raises(AssertionError):
        _ = request().completion
