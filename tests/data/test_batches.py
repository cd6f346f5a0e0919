"""Batches: a pure function of (seed, step), the same on any number of processes; ramps and micro-batches."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from pathlib import Path

import chex
import numpy as np
import pytest

from dsv3_jax.config import OptimizerConfig, TrainConfig
from dsv3_jax.config.run import Schedules
from dsv3_jax.data.batches import TrainBatches
from dsv3_jax.model.losses import Batch
from tests.data.test_rows import flat_tokens, rows_of


def config(**fields: int) -> TrainConfig:
    return TrainConfig(**{"steps": 50, "batch_size": 4, "sequence_length": 16, "seed": 3, **fields})


def batches_of(lengths: list[int], train: TrainConfig, held: range | None = None, **options: bool) -> TrainBatches:
    rows = rows_of(flat_tokens(lengths), train.sequence_length, train.seed)
    return TrainBatches(rows, train, Schedules(OptimizerConfig(), train, 0.0), held, **options)


def test_batches_have_the_shape_of_the_run() -> None:
    train = config(batch_size=6, sequence_length=20)
    batches = batches_of([300], train)
    assert len(batches) == train.steps
    for batch in (batches[0], batches[train.steps - 1], next(batches.iterate())):
        assert isinstance(batch, Batch)
        arrays = [batch.tokens_ABT, batch.targets_ABT, batch.loss_weight_ABT]
        chex.assert_shape(arrays, (1, 6, 20))
        chex.assert_type(arrays, [np.int32, np.int32, np.float32])
        np.testing.assert_array_equal(batch.tokens_ABT[:, :, 1:], batch.targets_ABT[:, :, :-1])
        assert batch.segment_starts_ABT is None
    for step in (-1, train.steps):
        with pytest.raises(IndexError):
            batches[step]


def test_steps_read_the_rows_one_after_the_other() -> None:
    train = config(batch_size=12, micro_batch_size=4, initial_batch_size=4, batch_ramp_tokens=2000, batch_ramp_unit=4)
    rows = rows_of(flat_tokens([90, 70, 300]), 16, 3)
    schedules = Schedules(OptimizerConfig(), train, 0.0)
    batches = TrainBatches(rows, train, schedules, across_documents=False)
    number, sizes = 0, []
    for step in range(train.steps):
        batch = batches[step]
        chex.assert_shape(list(batch), (3, 4, 16))
        sizes.append(schedules.batch_size(step))
        for row in range(sizes[-1]):
            for array, expected in zip(batch, rows[number], strict=True):
                np.testing.assert_array_equal(array.reshape(12, 16)[row], expected)
            number += 1
        assert not batch.loss_weight_ABT.reshape(12, 16)[sizes[-1] :].any()
    assert set(sizes) == {4, 8, 12}


def test_what_a_step_leaves_empty_is_padding() -> None:
    train = config(batch_size=8, micro_batch_size=4, initial_batch_size=4, batch_ramp_tokens=2000, batch_ramp_unit=4)
    batch = batches_of([300], train, across_documents=False)[0]
    assert batch.segment_starts_ABT is not None
    assert (batch.segment_starts_ABT[0] >= 0).all()
    assert (batch.segment_starts_ABT[1] == -1).all()


def test_batch_does_not_depend_on_the_number_of_steps() -> None:
    short, long = (batches_of([90, 70], config(steps=steps)) for steps in (20, 4000))
    for step in range(20):
        chex.assert_trees_all_equal(short[step], long[step])
    assert long[3999].targets_ABT.min() >= 0  # 1600 epochs further


def test_seeds_give_other_batches() -> None:
    one, other, largest = (batches_of([90, 70, 50, 30], config(seed=seed))[0].tokens_ABT for seed in (0, 1, 2**32 - 1))
    assert not np.array_equal(one, other)
    assert not np.array_equal(largest, other)


def test_iterate_is_the_steps_in_order_from_any_start() -> None:
    batches = batches_of([90, 70], config(steps=30))
    for start in (0, 17, 29, 30):
        read = list(batches.iterate(start))
        assert len(read) == 30 - start
        for step, batch in enumerate(read, start):
            chex.assert_trees_all_equal(batch, batches[step])


def test_leaving_an_iterator_early_leaves_no_thread_behind() -> None:
    batches = batches_of([90, 70], config(steps=5000))
    before = set(threading.enumerate())
    iterator = batches.iterate()
    next(iterator)
    started = set(threading.enumerate()) - before
    assert started
    iterator.close()
    del iterator
    for thread in started:
        thread.join(timeout=10)
    assert not [thread for thread in started if thread.is_alive()]


def test_processes_share_the_rows_of_a_batch() -> None:
    train = config(batch_size=16, micro_batch_size=8)
    whole = batches_of([90, 70, 300], train)
    parts = [batches_of([90, 70, 300], train, held) for held in (range(3), range(3, 4), range(4, 8))]
    for step in (0, 7, 49):
        joined = np.concatenate([part[step].tokens_ABT for part in parts], axis=1)
        np.testing.assert_array_equal(joined, whole[step].tokens_ABT)


PROGRAM = """
import hashlib
from tests.data.test_batches import batches_of, config
batches = batches_of([90, 70, 300], config())
print(hashlib.sha256(b"".join(batches[step].tokens_ABT.tobytes() for step in (49, 0, 20))).hexdigest())
"""


def test_another_process_makes_the_same_batches() -> None:
    other = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    batches = batches_of([90, 70, 300], config())
    mine = hashlib.sha256(b"".join(batches[step].tokens_ABT.tobytes() for step in (49, 0, 20))).hexdigest()
    assert other.stdout.split()[-1] == mine
