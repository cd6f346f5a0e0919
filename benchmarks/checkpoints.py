"""Cost of a checkpoint: the blocking part of a save, checksums, and verification during a restore.

    python benchmarks/checkpoints.py [--repeats 7]

The state of configs/tiny.py on one device, compared with one training step. Prints one JSON line of medians.
"""

from __future__ import annotations

import argparse
import functools
import json
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from machine import machine

from dsv3_jax.checkpoint.run import Checkpoints, checksums
from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.model.losses import Batch
from dsv3_jax.train.state import init_state
from dsv3_jax.train.step import train_step


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="how often each is timed")
    repeats = parser.parse_args().repeats
    config = runpy.run_path(str(Path(__file__).parent.parent / "configs" / "tiny.py"))["config"]
    state = jax.block_until_ready(jax.jit(functools.partial(init_state, config))())
    items = {"variables": state.variables, "optimizer": state.optimizer}
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(items))

    def median(function: Callable[[], Any]) -> float:
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            function()
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    begun = time.perf_counter()
    checksums(items)
    first = time.perf_counter() - begun
    sums = median(lambda: checksums(items))

    waits, saves = [], []
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory.create_or_resume(folder, config, resume=False)
        with Checkpoints(run, config.checkpoint) as checkpoints:
            for step in range(1, repeats + 2):
                begun = time.perf_counter()
                checkpoints.save(step, state.variables, state.optimizer)
                waits.append(time.perf_counter() - begun)
                checkpoints.wait()
                saves.append(time.perf_counter() - begun)
        with Checkpoints(run) as checkpoints:
            restore = median(lambda: jax.block_until_ready(checkpoints.restore(repeats + 1, **items)))

    shape = config.train.batch_size, config.train.sequence_length + 1
    rows = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    batch, values = Batch.of(rows[:, :-1], rows[:, 1:]), config.schedules.at(0)
    step_program = jax.jit(functools.partial(train_step, config=config))

    def take() -> None:
        jax.block_until_ready(step_program(state, batch, values))

    take()
    result = {
        "benchmark": "checkpoints",
        "state_bytes": nbytes,
        "arrays": len(jax.tree.leaves(items)),
        "step_seconds": median(take),
        "save_foreground_seconds": statistics.median(waits[1:]),
        "save_seconds": statistics.median(saves[1:]),
        "checksums_seconds": sums,
        "checksums_first_seconds": first,
        "restore_seconds": restore,
    }
    print(json.dumps(result | machine()))


if __name__ == "__main__":
    main()
