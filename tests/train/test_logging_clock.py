"""Tokens a second and the share of waiting, lap by lap."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dsv3_jax.train import logging as clock_module
from dsv3_jax.train.logging import Clock


def test_laps_count_their_own_time_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(clock_module, "time", type("time", (), {"perf_counter": lambda: now}))

    def items() -> Iterator[int]:
        nonlocal now
        for number in range(4):
            now += 0.5  # making a batch
            yield number

    clock, seen = Clock(), []
    for number in clock.data_timer(items()):
        seen.append(number)
        now += 1.5  # the step
        if number == 1:
            assert clock.throughput(40) == {"tokens_per_second": pytest.approx(10), "input_wait": pytest.approx(0.25)}
            now += 7  # an evaluation
            clock.start()
    assert seen == [0, 1, 2, 3]
    assert clock.throughput(40)["tokens_per_second"] == pytest.approx(10)
