"""What is said of the speed, on a clock of our own."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest

from dsv3_jax.infer.report import Speed, speculation


@pytest.fixture
def tick(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the clock on."""
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def engine(drafts: int = 0, steps: int = 0, step_tokens: int = 0) -> Any:
    return types.SimpleNamespace(
        sizes=types.SimpleNamespace(drafts=drafts), counts={"steps": steps, "step_tokens": step_tokens}
    )


def test_tokens_after_the_first_make_the_speed(tick: Callable[[float], None]) -> None:
    speed = Speed()
    assert speed.summary(engine()) == "0 tokens"
    tick(3)
    speed.note(1)
    assert speed.summary(engine()) == "1 tokens; the first after 3.0 s"
    for _ in range(4):
        tick(0.5)
        speed.note(3)
    tick(9)
    speed.note(0)
    assert speed.summary(engine()) == "13 tokens; the first after 3.0 s, then 6.0 tokens/s"


def test_a_pause_is_no_time(tick: Callable[[float], None]) -> None:
    speed = Speed()
    for pause in (50, 60):
        tick(pause)
        speed.resume()
        for seconds in (2, 1, 1):
            tick(seconds)
            speed.note(1)
    assert speed.summary(engine()) == "6 tokens; the first after 2.0 s, then 1.0 tokens/s"


def test_speculation_is_told_by_steps_and_their_tokens() -> None:
    assert speculation(engine(drafts=0, steps=8, step_tokens=8)) == ""
    assert speculation(engine(drafts=2)) == ""
    # Eight steps drafted sixteen tokens, of which four came to be.
    assert speculation(engine(drafts=2, steps=8, step_tokens=12)) == "; 1.50 tokens a step, 25% of drafts accepted"
