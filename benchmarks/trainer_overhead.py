"""Overhead of saving, logging and watching: the tiny run compared with the bare loop over the same steps.

    python benchmarks/trainer_overhead.py [--steps 100] [--repeats 5]

Both take the same steps, in turn, in one process. The bare loop calls the compiled step on prepared batches. The other
is the loop of train.py over as many steps as lie between two checkpoints, held-out scores left out: it saves, asynchronously,
and takes the steps while that is written, on batches from the pipeline, waiting for the flag of each step before it sends off
the next but one, polling the save and the signals, and logging to metrics.jsonl and TensorBoard; it ends when the checkpoint
is whole. The log of the run goes to stderr.

Prints one JSON line: the ratio of their times, which is 1 and what saving, logging and all else around the steps cost of the
time of the steps, as the median of the turns' ratios; and the share of its time that the loop waited for batches.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from machine import machine

from dsv3_jax.checkpoint.run import Checkpoints
from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import MeshConfig
from dsv3_jax.config.cli import load_config
from dsv3_jax.data.batches import TrainBatches
from dsv3_jax.data.text import build_dataset
from dsv3_jax.parallel.devices import BatchPlacement
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.train.guards import GracefulShutdown, NaNGuard
from dsv3_jax.train.logging import Observer, keep_batch
from dsv3_jax.train.state import init_state
from dsv3_jax.train.step import compile_train_step


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="steps of each loop, as many as between two checkpoints")
    parser.add_argument("--repeats", type=int, default=5, help="turns that are timed")
    flags = parser.parse_args()
    for name, least in (("steps", 2), ("repeats", 1)):  # The clock of a run starts after its first step.
        if getattr(flags, name) < least:
            parser.error(f"--{name} is {getattr(flags, name)}; it must be at least {least}")
    config = load_config("configs/tiny.py")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=flags.steps))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    text = build_dataset(config.data, config.model, config.train)
    batches = TrainBatches(text.rows, config.train, config.schedules)
    place = functools.partial(jax.tree.map, BatchPlacement(mesh, config.train.micro_batch, config.train.sequence_length).place)
    values = [config.schedules.at(number) for number in range(flags.steps)]
    with jax.set_mesh(mesh):
        step, ready = compile_train_step(config, mesh), [place(batches[number]) for number in range(flags.steps)]

        def bare(state: Any) -> tuple[float, float]:
            started = time.perf_counter()
            for batch, now in zip(ready, values, strict=True):
                state, _, _ = step(state, batch, now)
            jax.block_until_ready(state)
            return time.perf_counter() - started, 0.0

        def whole(state: Any) -> tuple[float, float]:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
                run = RunDirectory.create_or_resume(f"{folder}/run", config, resume=False)
                skipped = NaNGuard(config.train.max_skipped, functools.partial(keep_batch, run, batches, True))
                opened = Observer(run, config, mesh, 0, profiled=range(0), started=time.perf_counter(), writes=True)
                with Checkpoints(run, config.checkpoint) as checkpoints, opened as observer, GracefulShutdown(1) as stop:
                    started = time.perf_counter()
                    with observer.paused():
                        checkpoints.save(0, state.variables, state.optimizer, skipped.counters)
                    for number, batch in enumerate(observer.data_timer(batches.iterate()), 1):
                        observer.before_step(number)
                        state, metrics, load = step(state, place(batch), values[number - 1])
                        observer.after_step(number, state, load)
                        skipped.see(number, metrics["skipped"])
                        checkpoints.poll()
                        ends = number == flags.steps or skipped.abort_reason is not None or stop.after(number)
                        if ends or number % config.train.log_every == 0:
                            skipped.update()
                            observer.log(number, metrics, values[number - 1], skipped.total)
                        if ends:
                            break
                    jax.block_until_ready(state)
                    checkpoints.wait()
                    seconds = time.perf_counter() - started
                if number < flags.steps:
                    raise SystemExit(f"stopped after step {number} of {flags.steps}: {skipped.abort_reason or stop.reason}")
                return seconds, float(np.mean([row["input_wait"] for row in observer.rows]))

        taken: dict[str, list[tuple[float, float]]] = {"bare": [], "whole": []}
        for turn in range(flags.repeats + 1):
            for name, loop in (("bare", bare), ("whole", whole)):
                measured = loop(jax.jit(functools.partial(init_state, config))())
                if turn:  # The first turn compiles.
                    taken[name].append(measured)
    ratios = [one[0] / other[0] for one, other in zip(taken["whole"], taken["bare"], strict=True)]
    result = {
        "benchmark": "trainer_overhead",
        "steps": flags.steps,
        "ratio": round(float(np.median(ratios)), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "seconds_per_step_bare": round(float(np.median([seconds for seconds, _ in taken["bare"]])) / flags.steps, 4),
        "input_wait": float(np.median([wait for _, wait in taken["whole"]])),
    }
    print(json.dumps(result | machine()))


if __name__ == "__main__":
    main()
