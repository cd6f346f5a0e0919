"""The watchdog: silent over steps that take what they take, and loud once over one that hangs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest

from dsv3_jax.train.guards import Watchdog


def hang_here(seconds: float) -> None:
    time.sleep(seconds)


def said(capfd: pytest.CaptureFixture, steps: Callable[[Watchdog], None], least: float = 0.5) -> str:
    """What goes to stderr while `steps` run under a watchdog, after eight short ones."""
    with Watchdog(factor=5.0, least=least) as watchdog:
        for number in range(8):
            time.sleep(0.02)
            watchdog.step_done(number)
        steps(watchdog)
    return capfd.readouterr().err


def test_a_step_that_hangs_shows_where_and_once(capfd: pytest.CaptureFixture) -> None:
    def steps(watchdog: Watchdog) -> None:
        for number in (8, 9):
            hang_here(1.0)
            watchdog.step_done(number)

    text = said(capfd, steps)
    assert text.count("where all threads stand") == 2
    assert "step 8 has taken" in text
    assert "hang_here" in text
    for step in (8, 9):
        assert re.search(rf"step {step} is done after [1-3] s", text)


@pytest.mark.parametrize("least", [0.5, 60.0])
def test_pauses_and_what_is_short_by_the_clock_say_nothing(capfd: pytest.CaptureFixture, least: float) -> None:
    def steps(watchdog: Watchdog) -> None:
        if least > 1:
            hang_here(0.7)
        with watchdog.paused():
            hang_here(0.7)
        watchdog.step_done(8)

    assert said(capfd, steps, least) == ""


def test_the_first_step_is_not_watched(capfd: pytest.CaptureFixture) -> None:
    with Watchdog(factor=5.0, least=0.2) as watchdog:
        hang_here(0.5)
        watchdog.step_done(1)
    assert capfd.readouterr().err == ""
