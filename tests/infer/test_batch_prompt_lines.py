"""Batch files: what a line may say, and every way to get one wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.data.chat_template import encode_prompt
from dsv3_jax.infer import SamplingParams
from dsv3_jax.infer.batch import PromptLines, encode_lines, read_prompt_lines
from tests.infer.talkative import MODEL, TEMPLATE, TOKENIZER

USER = [{"role": "user", "content": "Hi"}]


def read(folder: Path, *lines: Any) -> PromptLines:
    """Texts as they are, everything else as JSON."""
    file = folder / "in.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return read_prompt_lines(str(file))


def test_lines_are_counted_and_empty_ones_passed_over(tmp_path: Path) -> None:
    prompts = read(tmp_path, {"prompt": "a", "id": "x"}, "", {"prompt": [1, 2], "id": 7}, {"messages": USER})
    assert [(line.index, line.content, line.is_chat, line.id) for line in prompts.lines] == [
        (0, "a", False, "x"),
        (2, [1, 2], False, 7),
        (3, USER, True, None),
    ]
    assert prompts.need_template
    assert prompts.lines[1].where == f"{tmp_path}/in.jsonl:3"
    assert not read(tmp_path, {"prompt": "messages"}).need_template


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    one, other = read(tmp_path, {"prompt": "a"}), read(tmp_path, {"prompt": "b"})
    assert one.digest != other.digest
    assert one.digest == read(tmp_path, {"prompt": "a"}).digest


def test_what_a_line_says_of_sampling_counts_for_it_alone(tmp_path: Path) -> None:
    own = {"temperature": 1, "stop": "\n", "logit_bias": {"5": -1.5}, "logprobs": 2, "stop_token_ids": [3], "ignore_eos": True}
    lines = read(tmp_path, {"prompt": "a", "max_tokens": 3, **own}, {"prompt": "b"}, {"prompt": "c", "seed": 9}).lines
    defaults = SamplingParams(max_tokens=8, top_p=0.9, seed=2**32 - 1)
    of_own = {"stop": ("\n",), "logit_bias": {5: -1.5}, "logprobs": 2, "stop_token_ids": (3,), "ignore_eos": True}
    assert [line.params(defaults) for line in lines] == [
        SamplingParams(max_tokens=3, temperature=1.0, top_p=0.9, seed=2**32 - 1, **of_own),
        SamplingParams(max_tokens=8, top_p=0.9, seed=0),
        SamplingParams(max_tokens=8, top_p=0.9, seed=9),
    ]


def test_messages_go_through_the_template(tmp_path: Path) -> None:
    chat, plain, ids = read(tmp_path, {"messages": USER}, {"prompt": "a"}, {"prompt": [4, 5]}).lines
    assert encode_lines([chat, plain, ids], MODEL, TEMPLATE, TOKENIZER) == [
        encode_prompt(TEMPLATE, TOKENIZER, USER),
        [MODEL.bos_token_id, *TOKENIZER.encode("a")],
        [4, 5],
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not valid JSON"),
        ("\udcff", "is not valid JSON"),
        ("[1]", "is list, not an object"),
        ({"promt": "x"}, 'has the unknown key "promt"; the nearest is "prompt"'),
        ({"prompt": "x", "maxtokens": 3}, 'has the unknown key "maxtokens"; the nearest is "max_tokens"'),
        ({"id": "x"}, 'has no prompt; give either "prompt" or "messages"'),
        ({"prompt": "x", "messages": USER}, "has prompt and messages; give either"),
        ({"prompt": 3}, "prompt is 3; use a string or a list of token ids"),
        ({"prompt": [1, True]}, "prompt is [1, True]; use a string"),
        ({"prompt": ["a"]}, "prompt is ['a']; use a string"),
        ({"messages": []}, "messages is []; use a list like"),
        ({"messages": "Hi"}, "messages is 'Hi'; use a list like"),
        ({"messages": [*USER, {"role": "user"}]}, 'messages[1] needs a "content" that is text'),
        ({"messages": [*USER, {"content": "x"}]}, 'messages[1] needs a "role", such as "user", not None'),
        ({"messages": USER, "tools": "[1"}, "tools is a text that is not JSON"),
        ({"messages": USER, "chat_template_kwargs": [1]}, "chat_template_kwargs is [1]; use an object"),
        ({"messages": USER, "chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs sets tools"),
        ({"prompt": "x", "tools": []}, 'has "tools" with "prompt", where it means nothing'),
        ({"messages": USER, "add_special_tokens": False}, 'has "add_special_tokens" with "messages"'),
        ({"prompt": "x", "add_special_tokens": 0}, "add_special_tokens is 0; use true or false"),
        ({"prompt": "x", "id": [1]}, "id is [1]; use an integer or valid Unicode text"),
        ({"prompt": "x", "id": True}, "id is True"),
        ('{"prompt": "x", "id": "\\ud800"}', "id is '\\ud800'"),
        ({"prompt": "x", "max_tokens": "3"}, "max_tokens is '3'; use an integer"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ('{"prompt": "x", "temperature": NaN}', "temperature is nan; use a finite number"),
        ({"prompt": "x", "seed": -1}, "seed is -1"),
        ({"prompt": "x", "stop": ["a", 1]}, "stop is ['a', 1]"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias has the token 'a'"),
        ({"prompt": "x", "logit_bias": [1]}, "logit_bias is [1]"),
        ({"prompt": "x", "logit_bias": {"9" * 5000: 1}}, "Exceeds the limit"),
        ({"prompt": "x", "logprobs": 21}, "logprobs is 21"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(tmp_path: Path, line: Any, message: str) -> None:
    file = tmp_path / "in.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    file.write_text(f'{{"prompt": "good"}}\n{text}\n', errors="surrogateescape")
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}:2[: ].*{re.escape(message)}"):
        read_prompt_lines(str(file))


def test_no_file_and_no_line_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere does not exist; name a file"):
        read_prompt_lines(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="is empty; write one object a line"):
        read(tmp_path, "", " ")
