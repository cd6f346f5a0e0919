"""The file of completions: what is in it, what a second start makes of it, and whose it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.infer import Completion, SamplingParams
from dsv3_jax.infer.batch import CompletionLines, PromptLine, check_place
from dsv3_jax.infer.request import TokenLogprobs

SETTINGS = {"prompts": "digest", "temperature": 0.5, "stop": ("\n",), "logit_bias": {3: 1.0}}
INDICES = {0, 1, 4}


def opened(path: Path, settings: dict[str, Any] = SETTINGS) -> CompletionLines:
    return CompletionLines(str(path), settings, INDICES)


def line(index: int, name: str | None = None) -> PromptLine:
    return PromptLine(index, f"in:{index + 1}", "x", False, name, {})


def completion(text: str = "é\n") -> Completion:
    return Completion([7, 8], text, "stop")


def test_lines_hold_the_whole_completion_and_are_there_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with opened(out) as file:
        assert file.done == set()
        file.write(line(4, "mine"), completion())
        first = out.read_text("utf-8")
        file.write(line(0), Completion([7], "x", "length", [TokenLogprobs(7, -0.5, [(7, -0.5), (9, -1.0)])]))
    assert first == '{"index": 4, "id": "mine", "text": "é\\n", "tokens": [7, 8], "finish_reason": "stop"}\n'
    told = [{"token": 7, "logprob": -0.5, "top": [[7, -0.5], [9, -1.0]]}]
    second = json.loads(out.read_text("utf-8").removeprefix(first))
    assert second == {"index": 0, "text": "x", "tokens": [7], "finish_reason": "length", "logprobs": told}


@pytest.mark.parametrize("torn", ["", '{"index": 1, "te', "{"])
def test_a_second_start_goes_on_and_drops_a_torn_line(tmp_path: Path, torn: str) -> None:
    out = tmp_path / "out.jsonl"
    with opened(out) as file:
        file.write(line(4), completion())
        file.write(line(0), completion())
    whole = out.read_text("utf-8")
    out.write_text(whole + torn, "utf-8")
    with opened(out) as file:
        assert file.done == {0, 4}
        file.write(line(1), completion())
    assert out.read_text("utf-8") == whole + whole.splitlines(keepends=True)[0].replace("4", "1", 1)
    assert opened(out).done == INDICES


def test_a_start_that_was_killed_before_its_first_line_is_none(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.touch()
    opened(out).__exit__()
    assert json.loads((tmp_path / "out.jsonl.settings.json").read_text()) == json.loads(json.dumps(SETTINGS))
    # Nothing hangs on settings of which no completion was made.
    with opened(out, SETTINGS | {"temperature": 0.7}) as file:
        file.write(line(0), completion())
    with pytest.raises(ValueError, match=r"was made with temperature 0\.7, not 0\.5"):
        opened(out)


def test_another_input_or_other_settings_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with opened(out) as file:
        file.write(line(0), completion())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changes = {"prompts": "other", "stop": (), "logit_bias": {}}
    for name, value in changes.items():
        with pytest.raises(ValueError, match=f"out.jsonl was made with {name} .*; name another file, or delete out.jsonl"):
            opened(out, SETTINGS | {name: value})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("my notes\n")
    with pytest.raises(ValueError, match="exists, but the settings it was made with cannot be read"):
        opened(out)
    assert out.read_text() == "my notes\n"
    out.unlink()
    opened(out).__exit__()
    for wrong in ("my notes", '{"index": 3}', '{"index": [0]}', "[]", '{"text": "x"}'):
        out.write_text(f'{{"index": 0}}\n{wrong}\n{{"index": 1}}\n')
        with pytest.raises(ValueError, match=r"out\.jsonl:2 is no completion of this batch"):
            opened(out)


def test_two_writers_are_refused(tmp_path: Path) -> None:
    with opened(tmp_path / "out.jsonl"), pytest.raises(ValueError, match="is being written by another process; wait"):
        opened(tmp_path / "out.jsonl")
    opened(tmp_path / "out.jsonl")


def test_where_no_file_can_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist; make the folder for out"):
        opened(tmp_path / "nowhere" / "out")
    with pytest.raises(ValueError, match="is a folder; name a file"):
        opened(tmp_path)


def test_what_a_completion_depends_on_can_be_written_down() -> None:
    """Every field of SamplingParams is of JSON's types, or becomes one."""
    assert json.loads(json.dumps(vars(SamplingParams(stop="x", logit_bias={1: 2.0}))))["stop"] == ["x"]


def test_the_file_of_the_prompts_is_no_place_for_completions(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("{}\n")
    with pytest.raises(ValueError, match=r"prompts.jsonl holds the prompts; name another file"):
        check_place(str(tmp_path / "." / "prompts.jsonl"), prompts=str(prompts))
    check_place(str(tmp_path / "completions.jsonl"), prompts=str(prompts))
    with pytest.raises(ValueError, match=r"nowhere does not exist; make the folder for completions.jsonl"):
        check_place(str(tmp_path / "nowhere" / "completions.jsonl"))
