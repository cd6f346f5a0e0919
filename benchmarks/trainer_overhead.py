"""What saving, logging and watching cost a run: the tiny run with them, beside the bare loop over the same steps.

    python benchmarks/trainer_overhead.py [--steps 100] [--repeats 5]

Both take the same steps, in turn, in one process. The bare loop calls the compiled step on batches that lie ready; the other
does what train.py does: it saves, asynchronously, and while that is written takes the steps, on batches from the pipeline,
logging every tenth to metrics.jsonl and TensorBoard; it ends when the checkpoint is whole. Prints one JSON line: the ratio of
their times, and the share of its time that the loop waited for batches.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import tempfile
import time
from typing import Any

import jax
import numpy as np
from machine import machine

from dsv3_jax.checkpoint.orbax import Checkpoints
from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import MeshConfig
from dsv3_jax.config.command_line import load_config
from dsv3_jax.data import TrainBatches, prepare_text
from dsv3_jax.parallel.feed import BatchPlacement
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.train.observer import Observer
from dsv3_jax.train.state import init_state
from dsv3_jax.train.step import compile_train_step


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="steps of each loop, as many as between two checkpoints")
    parser.add_argument("--repeats", type=int, default=5, help="turns that are timed")
    flags = parser.parse_args()
    config = load_config("configs/tiny.py")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=flags.steps))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    text = prepare_text(config.data, config.model, config.train)
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
            with tempfile.TemporaryDirectory() as folder:
                run = RunDirectory.create_or_resume(f"{folder}/run", config, resume=False)
                started = time.perf_counter()
                observed = functools.partial(Observer, run, config, mesh, 0, profiled=range(0), started=started, writes=True)
                with Checkpoints(run, config.checkpoint) as checkpoints, observed() as observer:
                    checkpoints.save(1, state.variables, state.optimizer)
                    for number, batch in enumerate(observer.waiting_for(batches.iterate()), 1):
                        observer.before_step(number)
                        state, metrics, load = step(state, place(batch), values[number - 1])
                        observer.after_step(number, state, load)
                        if number % config.train.log_every == 0:
                            observer.log(number, metrics, values[number - 1], 0)
                    jax.block_until_ready(state)
                    checkpoints.wait()
                    seconds = time.perf_counter() - started
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
