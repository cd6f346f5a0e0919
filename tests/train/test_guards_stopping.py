"""SIGTERM and SIGINT: noted, a second SIGINT obeyed at once, and agreed upon by all processes of a run."""

from __future__ import annotations

import os
import signal

import pytest

from dsv3_jax.train import guards
from dsv3_jax.train.guards import GracefulShutdown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    with GracefulShutdown(1) as stop:
        assert not stop.after(1)
        os.kill(os.getpid(), number)
        assert stop.after(2)
        assert stop.reason == number.name
        # A second SIGINT ends the process; SIGTERM may be repeated.
        assert (signal.getsignal(signal.SIGINT) == before[signal.SIGINT]) == (number == signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == number.name
    assert {each: signal.getsignal(each) for each in before} == before


def test_without_a_signal_nothing_stops_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with GracefulShutdown(1) as stop:
        assert signal.getsignal(signal.SIGINT) != before
        assert not any(stop.after(step) for step in range(5))
    assert signal.getsignal(signal.SIGINT) == before


def test_processes_stop_after_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests share the notes of a run; one is told, and is a step or two behind or ahead of the other."""
    notes: dict[str, str] = {}
    monkeypatch.setattr(guards, "write_note", notes.setdefault)
    monkeypatch.setattr(guards, "read_note", notes.get)
    for told_at, lead in ((5, 2), (5, -2), (5, 0)):
        notes.clear()
        told, other = GracefulShutdown(2), GracefulShutdown(2)
        last: dict[str, int] = {}
        for step in range(1, 20):
            if step == told_at:
                told._note(signal.SIGTERM, None)
            for name, request, at in (("told", told, step), ("other", other, step + lead)):
                if name not in last and at > 0 and request.after(at):
                    last[name] = at
        assert last["told"] == last["other"]
        assert (told.reason, other.reason) == ("SIGTERM", "another process")
