"""Counting skipped steps: late, in a row, and with the batch written down."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import Config, TrainConfig
from dsv3_jax.data.batches import TrainBatches
from dsv3_jax.data.rows import PackedRows, TokenStream
from dsv3_jax.data.storage import Part
from dsv3_jax.train.guards import NaNGuard
from dsv3_jax.train.logging import keep_batch


class Flag:
    """A flag on a device: remembers whether anybody has looked."""

    def __init__(self, skipped: bool) -> None:
        self.skipped, self.read = skipped, False

    def __float__(self) -> float:
        self.read = True
        return float(self.skipped)


def test_a_flag_is_read_when_the_next_step_is_on_its_way() -> None:
    steps, flags = NaNGuard(3, keep=str), [Flag(number in (1, 2, 5)) for number in range(7)]
    for number, flag in enumerate(flags):
        steps.see(number, flag)
        assert [flag.read for flag in flags[: number + 1]] == [True] * number + [False]
    assert (steps.total, steps.in_a_row) == (3, 1)
    steps.update()
    assert flags[-1].read
    assert (steps.total, steps.in_a_row) == (3, 0)
    steps.update()
    assert (steps.total, steps.in_a_row) == (3, 0)


def test_as_many_in_a_row_end_the_run_and_keep_the_batch() -> None:
    kept: list[int] = []
    steps = NaNGuard(3, keep=lambda step: kept.append(step) or f"file {step}", total=4, in_a_row=1)  # type: ignore[func-returns-value]
    steps.see(11, 1.0)
    steps.see(12, 1.0)
    assert steps.abort_reason is None
    steps.update()
    assert re.search(r"3 steps in a row, up to step 12, was not finite.*; file 12; start again with", steps.abort_reason or "")
    assert kept == [12]
    assert (steps.total, steps.in_a_row) == (6, 3)


def test_one_good_step_begins_the_count_anew() -> None:
    steps = NaNGuard(2, keep=str)
    for number in range(20):
        steps.see(number, float(number % 2))
    steps.update()
    assert steps.total == 10


@pytest.mark.parametrize("writes", [True, False])
def test_the_batch_in_the_file_is_the_one_of_the_step(tmp_path: Path, writes: bool) -> None:
    config = Config(train=TrainConfig(steps=9, batch_size=6, micro_batch_size=2, sequence_length=5))
    tokens = np.arange(2, 400, dtype=np.uint16)
    tokens[-1] = 1
    rows = PackedRows(TokenStream([Part.closed_by(1, tokens)], 1, 0), 5, 0)
    batches = TrainBatches(rows, config.train, config.schedules)
    said = keep_batch(RunDirectory(str(tmp_path)), batches, writes, 3)
    file = tmp_path / "skipped_step_3.npz"
    assert said == f"the batch of step 3 is in {file}"
    assert file.exists() == writes
    if writes:
        found, wanted = np.load(file), batches[2]
        assert set(found) == {"tokens_ABT", "targets_ABT", "weights_ABT"}
        for name, array in zip(("tokens_ABT", "targets_ABT", "weights_ABT"), wanted[:3], strict=True):
            np.testing.assert_array_equal(found[name], array)
        assert found["tokens_ABT"].shape == (3, 2, 5)


def test_a_batch_that_cannot_be_written_does_not_hide_why_the_run_ends(tmp_path: Path) -> None:
    (tmp_path / "skipped_step_1.npz").mkdir()
    rows = PackedRows(TokenStream([Part.closed_by(1, np.array([2, 3, 1], np.uint16))], 1, 0), 2, 0)
    config = Config(train=TrainConfig(steps=2, batch_size=1, sequence_length=2))
    batches = TrainBatches(rows, config.train, config.schedules)
    said = keep_batch(RunDirectory(str(tmp_path)), batches, True, 1)
    assert re.fullmatch(r"the batch of step 1 cannot be written to .*skipped_step_1.npz \(.* is a directory\)", said)
