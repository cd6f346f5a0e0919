"""What the progress bar prints, on a terminal and into a file."""

from __future__ import annotations

import functools
import io

import pytest
from rich.console import Console

from dsv3_jax.train import logging
from dsv3_jax.train.logging import ProgressBar

STEP = 1000
"""Tokens."""


def row(step: int, **more: float) -> dict[str, float]:
    figures = {"main_loss": 5 - step / 100, "tokens_per_second": 12345.6, "max_violation": 1.234}
    return {"step": step, "tokens": step * STEP, **figures, **more}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list of one."""
    now = [0.0]
    monkeypatch.setattr(logging.time, "perf_counter", lambda: now[0])
    return now


def test_without_a_terminal_a_line_every_tenth_of_the_run(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with ProgressBar(0, 100 * STEP) as bar:
        for step in range(4, 101, 4):
            clock[0] += 40.0
            bar.show(row(step))
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1]) for line in lines] == [12, 20, 32, 40, 52, 60, 72, 80, 92, 100]
    # 100 tokens a second by the clock.
    assert lines[0] == "step 12  loss 4.880  12,346 tokens/s  violation 1.23  12K of 100K tokens, 15 min left"
    assert lines[-1].endswith("100K of 100K tokens, 0 s left")


def test_the_first_row_goes_by_its_own_speed_and_says_what_the_machine_gives(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(0, 3_300_000) as bar:
        bar.show(row(1200, mfu=0.4123))
        bar.show(row(1800, model_flops_per_second=0.0179e12))
    text = "step 1200  loss -7.000  12,346 tokens/s (41.2% MFU)  violation 1.23  1.2M of 3.3M tokens, 3 min left"
    first, second = capsys.readouterr().out.splitlines()
    assert first == text
    # On a machine of unknown peak.
    assert "12,346 tokens/s (0.018 model TFLOP/s)  violation" in second


def lefts(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.rpartition("tokens, ")[2] for line in capsys.readouterr().out.splitlines()]


def test_the_time_left_counts_tokens_and_not_steps(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    """Batches grow from 100 tokens in 10 s to 1000 tokens in 100 s: half of the steps are a tenth of the time."""
    with ProgressBar(0, 11_000) as bar:
        for tokens in (*range(100, 1001, 100), 2000):
            clock[0] = tokens / 10
            bar.show({**row(1), "tokens": tokens})
    assert lefts(capsys) == ["15 min left"]  # 9000 tokens at 10 a second.


def test_an_old_speed_is_forgotten(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with ProgressBar(0, 100 * STEP) as bar:
        for step in range(1, 51):
            clock[0] += 1.0 if step <= 25 else 10.0
            bar.show(row(step))
    assert lefts(capsys)[-1] == "8 min left"  # 50 steps to go, of 10 s each.


def test_a_continued_run_prints_no_line_for_what_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(55 * STEP, 100 * STEP) as bar:
        for step in (56, 58, 60, 62):
            bar.show(row(step))
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["60"]


def test_the_last_row_of_a_run_is_always_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever a tenth of its tokens is in binary."""
    for steps in range(1, 100):
        with ProgressBar(0, steps * 2048) as bar:
            bar.show({**row(steps), "tokens": steps * 2048})
        assert f"step {steps} " in capsys.readouterr().out


def test_a_short_run_prints_every_logged_step(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(0, 3 * STEP) as bar:
        bar.say("compiled")
        for step in (1, 2, 3):
            bar.show(row(step))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "compiled"
    assert [line.split()[1] for line in lines[1:]] == ["1", "2", "3"]


def test_only_one_process_prints(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(0, STEP, shows=False) as bar:
        bar.show(row(1))
        bar.say("said")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("width", [80, 140])
def test_a_terminal_gets_a_bar(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = io.StringIO()
    console = functools.partial(Console, file=terminal, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(logging, "Console", console)
    with ProgressBar(25 * STEP, 100 * STEP) as bar:
        bar.say("said above")
        bar.show(row(50))
    drawn = terminal.getvalue()
    assert "said above" in drawn
    for part in ("step 50  loss 4.500", "12,346 tokens/s", "violation 1.23"):  # Over several lines, if need be.
        assert part in drawn
    assert ("12,346 tokens/s  violation 1.23" in drawn) == (width == 140)
    assert "50%" in drawn
    assert "50K of 100K tokens, 4 s left" in drawn
    assert capsys.readouterr().out == ""
