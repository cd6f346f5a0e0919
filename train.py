"""Trains a DeepSeek-V3, from text to a sample.

    python train.py                                      # configs/tiny.py: minutes on two CPU cores
    python train.py --config configs/tiny.py --run-dir runs/short --train.steps 200 --train.seed 1
    python train.py --config configs/tiny.py --run-dir runs/short --train.steps 400 --resume

Every field of the config can be set under its dotted name; --help lists them.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import time

import jax
from jax.sharding import SingleDeviceSharding

from dsv3_jax.checkpoint.orbax import Checkpoints
from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config.command_line import exits_with_one_line, parse_run
from dsv3_jax.data import (
    HeldoutWindows,
    TrainBatches,
    compressor_bits_per_byte,
    load_corpus,
    prepare_tokenizer,
    tokenize_corpus,
)
from dsv3_jax.data.cache import digest
from dsv3_jax.kernels.expert_ffn import choose_backend
from dsv3_jax.parallel.compilation import cache_compilations
from dsv3_jax.parallel.mesh import single_device
from dsv3_jax.train.evaluation import Evaluator
from dsv3_jax.train.metrics import MetricsLog, write_report
from dsv3_jax.train.progress import ProgressBar
from dsv3_jax.train.state import TrainState, init_state
from dsv3_jax.train.step import train_step


@exits_with_one_line
def main() -> None:
    started = time.perf_counter()
    arguments = parse_run(description=__doc__ or "")
    config, steps = arguments.config, arguments.config.train.steps
    device = single_device(config.mesh)
    cache_compilations(config.data.cache_dir)

    # Text to tokens. Whatever is wrong with the text is said before the run directory is touched.
    corpus = load_corpus(config.data)
    tokenizer = prepare_tokenizer(config.data, config.model, corpus)
    tokens = tokenize_corpus(corpus, tokenizer, config.data, config.model)
    batches = TrainBatches(config.train, config.model, tokens)
    shape = {"batch_size": config.train.batch_size, "sequence_length": config.train.sequence_length}
    heldout = HeldoutWindows(corpus.heldout, tokenizer, config.model, **shape)
    tokens_per_step = math.prod(shape.values())

    text = digest(corpus.train_digest, tokenizer.to_json())
    run = RunDirectory.create_or_resume(arguments.run_dir, config, resume=arguments.resume, text_digest=text)
    tokenizer.save(run.tokenizer_file)
    print(f"{run.path}: {corpus.report}", flush=True)

    with Checkpoints(run, config.checkpoint) as checkpoints:
        # The state: fresh, or the newest checkpoint's.
        state = jax.jit(functools.partial(init_state, config), out_shardings=SingleDeviceSharding(device))()
        newest = checkpoints.latest_step()
        first = newest or 0
        if newest is not None:
            saved = checkpoints.restore(newest, variables=state.variables, optimizer=state.optimizer)
            state = TrainState(state.step + first, **saved["variables"], optimizer=saved["optimizer"])
            print(f"continuing after step {newest} of {steps}", flush=True)
        count = sum(leaf.size for leaf in jax.tree.leaves(state.variables))
        experts = choose_backend(config.model.expert_backend)
        print(f"{count:,} parameters in {config.model.dtype} on {device}; experts by {experts}", flush=True)

        # The loop.
        step = jax.jit(functools.partial(train_step, config=config), donate_argnums=0)
        evaluate = Evaluator(config.model)
        with MetricsLog(run, first) as log, ProgressBar(first, steps) as bar:
            logged, clock = first, time.perf_counter()
            for number, batch in enumerate(batches.iterate(first), first + 1):
                state, metrics = step(state, *batch)
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
                        row["heldout_loss"] = evaluate(state.variables, heldout.sample(config.train.eval_batches)).loss
                    log.write(row)
                    bar.show(row)
                    logged, clock = number, time.perf_counter()
                if save_now:
                    checkpoints.save(number, state.variables, state.optimizer)

        # What it learned, beside what general compressors make of the same bytes.
        print(f"scoring {heldout.num_bytes:,} held-out bytes", flush=True)
        scored = evaluate(state.variables, heldout)

    write_report(run, log.rows)
    compressors = compressor_bits_per_byte(corpus.heldout)
    summary = {
        "steps": int(state.step),
        "tokens": int(state.step) * tokens_per_step,
        "seconds": time.perf_counter() - started,
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in log.rows),
        "final_loss": log.rows[-1]["loss"],
        "heldout_bits_per_byte": heldout.bits_per_byte(scored.nats),
        "gzip_bits_per_byte": compressors["gzip"],
        "xz_bits_per_byte": compressors["xz"],
    }
    run.write_summary(summary)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
