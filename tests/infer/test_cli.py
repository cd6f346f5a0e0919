"""The flags of infer.py: whose choice counts, and what is refused before a model is read."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_jax.config import InferConfig, MeshConfig
from dsv3_jax.config.cli import parse_flags
from dsv3_jax.infer import SamplingParams
from dsv3_jax.infer.cli import InferFlags
from tests.model.tiny import CONFIG, DENSE_ONLY

RUN = InferConfig(prompt="def ", max_tokens=7, temperature=0.5, top_p=0.8)


def parsed(*arguments: str) -> InferFlags:
    return parse_flags(InferFlags, ["--checkpoint", "here", *arguments])


def test_what_is_not_given_is_the_runs() -> None:
    assert parsed().sampling(RUN, 99) == SamplingParams(max_tokens=7, temperature=0.5, top_p=0.8)
    # An explicit 0 is a choice.
    given = parsed("--temperature", "0", "--max-tokens", "3", "--seed", "4").sampling(RUN, 99)
    assert given == SamplingParams(max_tokens=3, temperature=0.0, top_p=0.8, seed=4)


def test_every_way_of_drawing_has_a_flag() -> None:
    flags = ["--top-k", "5", "--min-p", "0.1", "--repetition-penalty", "1.2", "--stop", "\n", "<end>", "--top-p", "0.9"]
    expected = SamplingParams(
        max_tokens=7, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.2, stop=("\n", "<end>")
    )
    assert parsed(*flags).sampling(RUN, 99) == expected


def test_replies_of_a_chat_are_as_long_as_there_is_room_unless_bounded() -> None:
    assert parsed("--interactive").sampling(RUN, 99).max_tokens == 99
    assert parsed("--interactive", "--max-tokens", "3").sampling(RUN, 99).max_tokens == 3


def test_sizes_of_the_engine() -> None:
    sizes = parsed().sizes(CONFIG)
    assert sizes == {
        "max_batch": 1,
        "max_length": None,
        "drafts": 1,
        "chunk": 512,
        "page_size": None,
        "cache_tokens": None,
    }
    assert parsed().sizes(DENSE_ONLY)["drafts"] == 0
    assert parsed("--batch-file", "a", "b").sizes(CONFIG) == sizes | {"max_batch": 8}
    flags = "--max-batch 3 --max-length 50 --drafts 0 --chunk 64 --page-size 8 --cache-tokens 640"
    assert parsed(*flags.split()).sizes(CONFIG) == {
        "max_batch": 3,
        "max_length": 50,
        "drafts": 0,
        "chunk": 64,
        "page_size": 8,
        "cache_tokens": 640,
    }


def test_a_mesh_is_a_group() -> None:
    assert parsed("--mesh.expert", "4", "--mesh.tensor", "2").mesh == MeshConfig(expert=4, tensor=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--prompt x --interactive", "--prompt and --interactive are different things to do; give one of them"),
        ("--interactive --batch-file a b", "--interactive and --batch-file are different"),
        ("--batch-file a", "--batch_file is 'a'; give two texts or None"),
        ("--top-k -1", "top_k is -1; it cannot be negative"),
        ("--seed -1", "seed is -1; it must be an integer in"),
        ("--mesh.expert 0", "mesh.expert is 0; use a positive size"),
        ("--top-k x", "--top_k is 'x'; give an integer"),
    ],
)
def test_contradictions_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(*arguments.split())


def test_the_runs_group_and_the_flags_have_the_same_names() -> None:
    own = {field.name for field in dataclasses.fields(InferFlags)}
    assert {field.name for field in dataclasses.fields(InferConfig)} <= own


@pytest.mark.parametrize("flags", [["--max-batch", "0"], ["--drafts", "-1"], ["--chunk", "48"], ["--page-size", "0"]])
def test_sizes_that_no_model_can_have_are_refused_before_one_is_read(flags: list[str]) -> None:
    name = flags[0].removeprefix("--").replace("-", "_")
    with pytest.raises(ValueError, match=f"{name} is {flags[1]}; it "):
        parsed(*flags)
