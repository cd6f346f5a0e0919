"""What the progress bar prints, on a terminal and into a file."""

from __future__ import annotations

import functools
import io

import pytest
from rich.console import Console

from dsv3_jax.train import progress
from dsv3_jax.train.progress import ProgressBar


def row(step: int) -> dict[str, float]:
    return {"step": step, "main_loss": 5 - step / 100, "tokens_per_second": 12345.6, "max_violation": 1.234}


def test_without_a_terminal_a_line_every_tenth_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(0, 100) as bar:
        for step in range(4, 101, 4):
            bar.show(row(step))
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1]) for line in lines] == [12, 20, 32, 40, 52, 60, 72, 80, 92, 100]
    assert lines[0] == "step 12  loss 4.880  12,346 tokens/s  violation 1.23  of 100 steps"


def test_a_continued_run_prints_no_line_for_what_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(55, 100) as bar:
        for step in (56, 58, 60, 62):
            bar.show(row(step))
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["60"]


def test_a_short_run_prints_every_logged_step(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(0, 3) as bar:
        bar.say("compiled")
        for step in (1, 2, 3):
            bar.show(row(step))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "compiled"
    assert [line.split()[1] for line in lines[1:]] == ["1", "2", "3"]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = io.StringIO()
    console = functools.partial(Console, file=terminal, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(progress, "Console", console)
    with ProgressBar(25, 100) as bar:
        bar.say("said above")
        bar.show(row(50))
    drawn = terminal.getvalue()
    assert "said above" in drawn
    assert "step 50  loss 4.500  12,346 tokens/s  violation 1.23" in drawn
    assert "50%" in drawn
    assert capsys.readouterr().out == ""
