"""Completing a file of prompts: each line what it is alone, whatever runs beside it and however often it was begun."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.data.chat_template import ChatTemplate, encode_prompt
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.infer import Completion, Engine, SamplingParams
from dsv3_jax.infer.batch import (
    CompletionLines,
    PromptLine,
    PromptLines,
    complete_lines,
    encode_lines,
    read_otherwise_before,
    read_prompt_lines,
)
from dsv3_jax.infer.batch import submit_lines as submit_encoded
from dsv3_jax.infer.report import Speed
from dsv3_jax.infer.request import Request
from tests.data.test_chat_template import ASSISTANT, BOS, EOS, IDS, THINK
from tests.data.test_chat_template import USER as USER_TOKEN
from tests.infer.talkative import BROKEN, MODEL, TEMPLATE, TOKENIZER, make_broken_engine, make_engine

USER = [{"role": "user", "content": "Hi there"}]
LINES: list[dict[str, Any]] = [
    {"prompt": "Hello", "max_tokens": 9},
    {"prompt": [5, 9, 3], "id": "ids"},
    {"messages": USER, "max_tokens": 12, "temperature": 0.9},
    {"prompt": "there. " * 5},
    {"prompt": "Be brief.", "seed": 40, "temperature": 1.5},
    *({"prompt": f"number {i}"} for i in range(7)),
]
DRAWN = SamplingParams(max_tokens=6, temperature=0.8, top_p=0.95, seed=11)


@pytest.fixture
def prompts(tmp_path: Path) -> PromptLines:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return read_prompt_lines(str(tmp_path / "in.jsonl"))


def submit_lines(
    engine: Engine, lines: list[PromptLine], defaults: SamplingParams, template: ChatTemplate | None, tokenizer: Tokenizer
) -> dict[Request, PromptLine]:
    ids = encode_lines(lines, engine.config, template, tokenizer)
    return submit_encoded(engine, zip(lines, ids, strict=True), defaults, template, tokenizer)


def run(engine: Engine, prompts: PromptLines, out: Path, defaults: SamplingParams = DRAWN) -> Speed:
    speed = Speed()
    with CompletionLines(str(out), {"prompts": prompts.digest}, range(len(LINES))) as completions:
        left = [line for line in prompts.lines if line.index not in completions.done]
        complete_lines(engine, submit_lines(engine, left, defaults, TEMPLATE, TOKENIZER), completions, speed)
    return speed


def told(out: Path) -> dict[int, dict[str, Any]]:
    """The lines by their index, each of which is there once."""
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert len({line["index"] for line in lines}) == len(lines)
    return {line["index"]: line for line in lines}


def expected(defaults: SamplingParams) -> list[Completion]:
    """Every line alone."""
    completions = []
    engine = make_engine(prefix_cache=False)
    for i, line in enumerate(LINES):
        own = {"seed": defaults.seed + i} | {k: v for k, v in line.items() if k not in ("prompt", "messages", "id")}
        prompt = line["prompt"] if "prompt" in line else encode_prompt(TEMPLATE, TOKENIZER, line["messages"])
        completions += engine.generate([prompt], [dataclasses.replace(defaults, **own)])
    return completions


class Killed(Exception):
    """In place of a kill."""


def killed_after(engine: Engine, steps: int, monkeypatch: pytest.MonkeyPatch) -> Engine:
    step, left = engine.step, iter(range(steps))

    def dying() -> Any:
        if next(left, None) is None:
            raise Killed
        return step()

    monkeypatch.setattr(engine, "step", dying)
    return engine


@pytest.mark.parametrize("defaults", [DRAWN, SamplingParams(max_tokens=6)], ids=["drawn", "greedy"])
def test_a_batch_broken_off_twice_is_each_line_alone(
    prompts: PromptLines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defaults: SamplingParams
) -> None:
    out = tmp_path / "out.jsonl"
    counts = []
    for steps in (20, 15):
        with pytest.raises(Killed):
            run(killed_after(make_engine(), steps, monkeypatch), prompts, out, defaults)
        counts.append(len(told(out)))
        with out.open("a") as file:
            file.write('{"index": 11, "text": "to')
    assert 0 < counts[0] < counts[1] < len(LINES)
    speed = run(make_engine(), prompts, out, defaults)
    lines, alone = told(out), expected(defaults)
    assert sorted(lines) == list(range(len(LINES)))
    for i, completion in enumerate(alone):
        assert lines[i]["tokens"] == completion.tokens, i
        assert (lines[i]["text"], lines[i]["finish_reason"]) == (completion.text, completion.finish_reason)
    assert lines[1]["id"] == "ids"
    assert set(lines[0]) == {"index", "text", "tokens", "finish_reason"}
    assert 0 < speed.count < sum(len(completion.tokens) for completion in alone)
    # Nothing is left to do.
    before = out.read_bytes()
    assert run(make_engine(), prompts, out, defaults).count == 0
    assert out.read_bytes() == before


def test_a_line_that_does_not_fit_is_refused_before_anything_is_generated(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(f'{{"prompt": "good"}}\n\n{{"prompt": {json.dumps("x " * 200)}}}\n')
    engine = make_engine()
    lines = read_prompt_lines(str(file)).lines
    with pytest.raises(ValueError, match=r"in\.jsonl:3: the prompt's \d+ tokens leave no room in max_length 128"):
        submit_lines(engine, lines, DRAWN, None, TOKENIZER)
    assert engine.steps == 0
    file.write_text('{"prompt": [5000]}')
    with pytest.raises(ValueError, match=r"in\.jsonl:1: token id 5000 is outside the vocabulary"):
        submit_lines(engine, read_prompt_lines(str(file)).lines, DRAWN, None, TOKENIZER)


def test_messages_that_the_template_refuses_are_named(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "\\ud800"}]}')
    with pytest.raises(ValueError, match=r"in\.jsonl:1: the text cannot be encoded as UTF-8"):
        submit_lines(make_engine(), read_prompt_lines(str(file)).lines, DRAWN, TEMPLATE, TOKENIZER)


def test_the_end_of_a_turn_ends_a_chat_and_no_other_line(tmp_path: Path) -> None:
    """The template's eos_token is not the model's here, nor what it writes behind an answer."""
    (tmp_path / "in.jsonl").write_text(f'{{"messages": {json.dumps(USER)}}}\n{{"prompt": "Hello"}}')
    lines = read_prompt_lines(str(tmp_path / "in.jsonl")).lines
    template = ChatTemplate(TEMPLATE.source, TEMPLATE.special_tokens | {"eos_token": ASSISTANT})
    submitted = submit_lines(make_engine(), lines, DRAWN, template, TOKENIZER)
    assert [request.params.stop_token_ids for request in submitted] == [(IDS[EOS], IDS[ASSISTANT]), ()]


def test_progress_is_a_line_every_tenth_where_there_is_no_terminal(
    prompts: PromptLines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    speed = run(make_engine(), prompts, out)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("2 of 12 lines, ")
    assert lines[-1] == f"12 of 12 lines, {speed.count} tokens"
    assert speed.count == sum(len(line["tokens"]) for line in told(out).values())


def test_a_line_whose_logits_are_not_finite_is_written_as_an_error(tmp_path: Path) -> None:
    own = {"temperature": 0, "max_tokens": 3}
    lines = [own | {"prompt": [5, 9, 3], "logprobs": 1}, {"prompt": [5, BROKEN], "logprobs": 2}, own | {"prompt": [5, 9]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts, out = read_prompt_lines(str(tmp_path / "in.jsonl")), tmp_path / "out.jsonl"
    with CompletionLines(str(out), {}, range(3)) as completions:
        engine = make_broken_engine()
        submitted = submit_lines(engine, prompts.lines, DRAWN, None, TOKENIZER)
        assert complete_lines(engine, submitted, completions, Speed()) == 1
    found = told(out)
    assert [found[i]["finish_reason"] for i in range(3)] == ["length", "error", "length"]
    assert "logits after 2 tokens are not finite" in found[1]["error"]
    assert (found[1]["text"], found[1]["tokens"], found[1]["logprobs"]) == ("", [], [])
    assert json.loads(out.read_text().splitlines()[0], parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ({"prompt": "Hello"}, True),
        ({"prompt": [4, 5]}, True),
        ({"messages": USER}, True),
        ({"messages": [*USER, {"role": "assistant", "content": "a"}, *USER]}, True),
        ({"messages": [{"role": "developer", "content": "x"}, *USER]}, False),
        ({"messages": [{"role": "user", "content": "x", "name": None}]}, False),
        ({"messages": [{"role": "user", "content": USER_TOKEN}]}, False),
        ({"prompt": f"Hello{EOS}"}, False),
        ({"prompt": f"{BOS}Hello"}, False),
        ({"prompt": "Hello", "add_special_tokens": False}, False),
        ({"messages": [*USER, {"role": "assistant", "content": f"{THINK}a"}, *USER]}, False),
        ({"messages": [*USER, {"role": "assistant", "content": "a"}]}, False),
    ],
)
def test_a_file_of_an_older_version_goes_on_if_its_tokens_would_be_the_same(tmp_path: Path, line: Any, same: bool) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    lines = read_prompt_lines(str(tmp_path / "in.jsonl")).lines
    ids = encode_lines(lines, MODEL, TEMPLATE, TOKENIZER)
    otherwise = read_otherwise_before(lines, ids, MODEL, TOKENIZER)
    assert (otherwise is None) == same
    (tmp_path / "out.jsonl").write_text('{"index": 0}\n')
    (tmp_path / "out.jsonl.settings.json").write_text('{"prompts": "x"}')
    with contextlib.ExitStack() as stack:
        if not same:
            complaint = (
                r"out\.jsonl was begun by an older version, which made other tokens of .*in\.jsonl:1 .* or delete out\.jsonl"
            )
            stack.enter_context(pytest.raises(ValueError, match=complaint))
        with CompletionLines(str(tmp_path / "out.jsonl"), {"prompts": "x", "token_ids": "y"}, [0], otherwise) as completions:
            assert completions.done == {0}
