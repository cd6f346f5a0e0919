"""Trains a DeepSeek-V3, from text to a sample, on one device, a mesh of them, or many processes of a pod.

    python train.py                                      # configs/tiny.py: minutes on two CPU cores
    python train.py --config configs/tiny.py --run-dir runs/short --train.steps 200
    python train.py --config configs/tiny.py --run-dir runs/short --train.steps 400 --resume
    python train.py --config configs/v3_671b.py --mesh.fsdp 8 --mesh.expert 64

Every field of the config can be set under its dotted name; --help lists them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
import time

import jax

from dsv3_jax.checkpoint.orbax import Checkpoints
from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config.command_line import exits_with_one_line, parse_run
from dsv3_jax.data import TrainBatches, compressor_bits_per_byte, prepare_text
from dsv3_jax.parallel.compilation import cache_compilations
from dsv3_jax.parallel.distributed import (
    by_first_process,
    first_process_first,
    is_first_process,
    join_processes,
    require_agreement,
    require_shared,
    wait_for_first_process,
)
from dsv3_jax.parallel.feed import BatchPlacement
from dsv3_jax.parallel.mesh import check_fits, describe, make_mesh
from dsv3_jax.train.evaluation import Evaluator
from dsv3_jax.train.metrics import MetricsLog, write_report
from dsv3_jax.train.progress import ProgressBar
from dsv3_jax.train.state import TrainState, init_state, state_shardings
from dsv3_jax.train.step import compile_train_step, describe_backends


@exits_with_one_line
def main() -> None:
    started = time.perf_counter()
    arguments = parse_run(description=__doc__ or "")
    config, steps = arguments.config, arguments.config.train.steps
    join_processes(arguments.distributed)
    first_process = is_first_process()
    require_agreement({"run_dir": arguments.run_dir, "resume": arguments.resume, **dataclasses.asdict(config)})
    mesh = make_mesh(config.mesh)
    check_fits(config, mesh)
    backends = describe_backends(config.model, mesh)
    shardings = state_shardings(config, mesh)
    cache_compilations(config.data.cache_dir)

    # Text to tokens. Whatever is wrong with the text is said before the run directory is touched.
    text = first_process_first(lambda: prepare_text(config.data, config.model, config.train))
    require_agreement({"text and tokenizer": text.digest, "held-out text": text.corpus.heldout_digest})
    placement = BatchPlacement(mesh, config.train.batch_size, config.train.sequence_length)
    batches = TrainBatches(config.train, config.model, text.tokens, placement.rows)
    tokens_per_step = config.train.batch_size * config.train.sequence_length

    open_run = functools.partial(RunDirectory.create_or_resume, arguments.run_dir, config)
    by_first_process(lambda: open_run(resume=arguments.resume, text_digest=text.digest))
    run = RunDirectory(arguments.run_dir)
    require_shared(run.config_file)
    if first_process:
        text.tokenizer.save(run.tokenizer_file)
        print(f"{run.path}: {text.corpus.report}", flush=True)

    with jax.set_mesh(mesh), Checkpoints(run, config.checkpoint) as checkpoints:
        # The state: fresh, or the newest checkpoint's.
        state = jax.jit(functools.partial(init_state, config), out_shardings=shardings)()
        newest = checkpoints.latest_step()
        require_agreement({"newest checkpoint": newest})
        first = newest or 0
        if newest is not None:
            saved = checkpoints.restore(newest, variables=state.variables, optimizer=state.optimizer)
            state = TrainState(state.step + first, **saved["variables"], optimizer=saved["optimizer"])
        if first_process:
            if newest is not None:
                print(f"continuing after step {newest} of {steps}", flush=True)
            count = sum(leaf.size for leaf in jax.tree.leaves(state.variables))
            print(f"{count:,} parameters in {config.model.dtype} on {describe(mesh)}; {backends}", flush=True)

        # The loop.
        step = compile_train_step(config, mesh)
        evaluate = Evaluator(config.model, placement.place)
        with MetricsLog(run, first, writes=first_process) as log, ProgressBar(first, steps, shows=first_process) as bar:
            logged, clock = first, time.perf_counter()
            for number, batch in enumerate(batches.iterate(first), first + 1):
                state, metrics = step(state, *map(placement.place, batch))
                if number == first + 1:
                    jax.block_until_ready(state)
                    bar.say(f"first step done {time.perf_counter() - started:.1f} s after the start")
                log_now = number % config.train.log_every == 0 or number == steps
                save_now = number % config.checkpoint.every == 0 or number == steps
                if log_now or save_now:
                    row = {"step": number, **{name: float(value) for name, value in metrics.items()}}
                    broken = {name: value for name, value in row.items() if not math.isfinite(value)}
                    if broken:
                        raise ValueError(f"step {number} gave {broken}; lower optimizer.learning_rate, in another --run-dir")
                if log_now:
                    row["tokens"] = number * tokens_per_step
                    row["tokens_per_second"] = (number - logged) * tokens_per_step / (time.perf_counter() - clock)
                    if config.train.eval_every and number % config.train.eval_every == 0:
                        row["heldout_loss"] = evaluate(state.variables, text.heldout.sample(config.train.eval_batches)).loss
                    log.write(row)
                    bar.show(row)
                    logged, clock = number, time.perf_counter()
                if save_now:
                    checkpoints.save(number, state.variables, state.optimizer)

            # What it learned, beside what general compressors make of the same bytes.
            bar.say(f"scoring {text.heldout.num_bytes:,} held-out bytes")
        scored = evaluate(state.variables, text.heldout)

    if first_process:
        write_report(run, log.rows)
        compressors = compressor_bits_per_byte(text.corpus.heldout)
        summary = {
            "steps": int(state.step),
            "tokens": int(state.step) * tokens_per_step,
            "seconds": time.perf_counter() - started,
            "tokens_per_second": statistics.median(row["tokens_per_second"] for row in log.rows),
            "final_loss": log.rows[-1]["loss"],
            "heldout_bits_per_byte": text.heldout.bits_per_byte(scored.nats),
            "gzip_bits_per_byte": compressors["gzip"],
            "xz_bits_per_byte": compressors["xz"],
        }
        run.write_summary(summary)
        print(json.dumps(summary))
    wait_for_first_process()


if __name__ == "__main__":
    main()
