"""infer.py as two real processes: the first reads, writes and serves, and what comes is what one process says."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

import infer
from tests.cli.conftest import ROOT, Done
from tests.cli.processes import running

pytestmark = pytest.mark.slow

ASKED = "--checkpoint", "runs/straight", "--max-length", "48", "--temperature", "0"
ON_MESH = str(ROOT / "infer.py"), "--checkpoint", "runs/straight", "--max-length", "48"
BY_EXPERT, BY_TENSOR = ("--mesh.expert", "2"), ("--mesh.tensor", "2")
MANY = "--max-batch", "2", "--chunk", "16", "--drafts", "0"


def _ended(children: list[subprocess.Popen[str]]) -> list[Done]:
    outputs = [child.communicate(timeout=300) for child in children]
    return [Done(child.returncode, *output) for child, output in zip(children, outputs, strict=True)]


def _together(folder: Path, *processes: tuple[str, ...]) -> list[Done]:
    with running(folder, *processes, devices=1) as children:
        return _ended(children)


def test_a_prompt(workplace: Path, straight: tuple[Path, Done], called: Callable[..., Done]) -> None:
    asked = "--prompt", "import ", "--max-tokens", "12", "--temperature", "0.8"
    expected = called(infer.main, *ASKED, *asked)
    assert expected.code == 0, expected.stderr
    first, second = _together(workplace, *[(*ON_MESH, *BY_TENSOR, *asked)] * 2)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert first.stdout == expected.stdout
    assert "on 2 cpu devices (tensor 2)" in first.stderr
    assert (second.stdout, second.stderr) == ("", "")


def test_a_batch_file_is_read_and_written_by_the_first_alone(
    workplace: Path, straight: tuple[Path, Done], called: Callable[..., Done], tmp_path: Path
) -> None:
    lines = [{"prompt": text, "max_tokens": 4 + i} for i, text in enumerate(("def ", "import os", "x = ", "#"))]
    prompts, alone, together = (str(tmp_path / f"{name}.jsonl") for name in ("prompts", "alone", "together"))
    Path(prompts).write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = called(infer.main, *ASKED, "--max-batch", "1", "--batch-file", prompts, alone)
    assert done.code == 0, done.stderr
    asked = "--temperature", "0", *MANY, "--batch-file", prompts, together
    first, second = _together(workplace, *[(*ON_MESH, *BY_EXPERT, *asked)] * 2)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert second.stderr == ""
    expected, found = (sorted(Path(path).read_text().splitlines()) for path in (alone, together))
    assert len(expected) == 4
    assert found == expected


def test_a_server_drains_when_both_get_a_signal(
    workplace: Path, straight: tuple[Path, Done], called: Callable[..., Done]
) -> None:
    expected = called(infer.main, *ASKED, "--prompt", "def f(", "--max-tokens", "8")
    question = {"model": "straight", "prompt": "def f(", "max_tokens": 8, "temperature": 0}
    asked = *ON_MESH, *BY_EXPERT, "--serve", "--port", "0", *MANY
    with running(workplace, asked, asked, devices=1) as children:
        assert children[0].stderr is not None
        while not (line := children[0].stderr.readline()).startswith("serving straight on "):
            assert line
        answers = [httpx2.post(f"{line.split()[-1]}/v1/completions", json=question, timeout=200) for _ in range(2)]
        for child in reversed(children):  # And of the others none is heard, how often it may come.
            child.send_signal(signal.SIGTERM)
        children[1].send_signal(signal.SIGTERM)
        first, second = _ended(children)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert ["def f(" + answer.json()["choices"][0]["text"] + "\n" for answer in answers] == [expected.stdout] * 2
    assert second.stderr == ""


@pytest.mark.parametrize(
    ("first", "second", "fragment"),
    [
        (("--prompt", "a"), ("--prompt", "b"), "process 1 has prompt 'b', process 0 has 'a'"),
        pytest.param(("--prompt", "a " * 99), ("--prompt", "a " * 99), "max_length", marks=pytest.mark.nightly),
        pytest.param(("--mesh.tensor", "4"), ("--mesh.tensor", "4"), "2 devices", marks=pytest.mark.nightly),
        (("--batch-file", "absent", "new"), ("--batch-file", "absent", "new"), "absent"),
    ],
    ids=["other commands", "prompt", "mesh", "file"],
)
def test_what_is_wrong_ends_both_with_the_same_line(
    workplace: Path, straight: tuple[Path, Done], first: tuple[str, ...], second: tuple[str, ...], fragment: str
) -> None:
    outcomes = _together(workplace, (*ON_MESH, *BY_EXPERT, *first), (*ON_MESH, *BY_EXPERT, *second))
    for done in outcomes:
        done.assert_refused(fragment)
    assert outcomes[0].stderr == outcomes[1].stderr
