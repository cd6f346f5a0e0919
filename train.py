"""Train a DeepSeek-V3 on texts or conversations, on one device, a mesh of devices, or the processes of a pod.

    python train.py                                      # configs/tiny.py: minutes on two CPU cores
    python train.py --config configs/tiny.py --run-dir runs/short --train.steps 200
    python train.py --config configs/tiny.py --run-dir runs/short --train.steps 400 --resume
    python train.py --config configs/chat.py --init-from path/to/hf_folder --data.source chats.jsonl
    python train.py --config configs/v3_671b.py --mesh.fsdp 8 --mesh.expert 64

Every field of the config can be set under its dotted name; --help lists them. SIGTERM or Ctrl-C finishes the step, saves,
and prints the command that resumes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time

import jax

from dsv3_jax.checkpoint.run import Checkpoints
from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config.cli import cli_main, how_to_resume, parse_run
from dsv3_jax.data.batches import TrainBatches
from dsv3_jax.data.text import build_dataset
from dsv3_jax.data.tokenizer import save_tokenizer
from dsv3_jax.data.tokens import compressor_bits_per_byte
from dsv3_jax.parallel.devices import BatchPlacement, cache_compilations
from dsv3_jax.parallel.mesh import check_fits, describe, make_mesh
from dsv3_jax.parallel.multihost import (
    by_first_process,
    check_agreement,
    check_shared,
    first_process_first,
    is_first_process,
    join_processes,
    wait_for_first_process,
)
from dsv3_jax.train.evaluation import Evaluator, evaluate_sources
from dsv3_jax.train.guards import GracefulShutdown, NaNGuard
from dsv3_jax.train.logging import Observer, keep_batch
from dsv3_jax.train.profiling import profiled_steps
from dsv3_jax.train.start import check_start, init_or_restore, resume_config
from dsv3_jax.train.step import compile_train_step, describe_backends


@cli_main
def main() -> None:
    started = time.perf_counter()
    arguments = parse_run(description=__doc__ or "")
    config, steps, schedules = arguments.config, arguments.config.train.steps, arguments.config.schedules
    profiled_steps(arguments.profile, steps=steps)
    join_processes(arguments.distributed)
    first_process = is_first_process()
    check_agreement({"run_dir": arguments.run_dir, "resume": arguments.resume, **dataclasses.asdict(config)})
    mesh = make_mesh(config.mesh)
    check_fits(config, mesh)
    config = resume_config(config, arguments.run_dir, resume=arguments.resume)
    notes = check_start(config, arguments.run_dir, resume=arguments.resume)
    backends = describe_backends(config.model, mesh, documents=not config.data.cross_document_attention)
    cache_compilations(config.data.cache_dir)

    # Text to tokens. Errors in the text are raised before the run directory is touched.
    text = first_process_first(lambda: build_dataset(config.data, config.model, config.train))
    check_agreement({"text and tokenizer": text.digest, "held-out text": text.validation_digest})
    placement = BatchPlacement(mesh, config.train.micro_batch, config.train.sequence_length)
    make_batches = functools.partial(
        TrainBatches, text.rows, config.train, schedules, across_documents=config.data.cross_document_attention
    )
    batches, whole_batches = make_batches(placement.rows), make_batches()  # This process's rows, and all rows.
    place = functools.partial(jax.tree.map, placement.place)

    # From here on the first process holds the lock of the run directory.
    held: list[RunDirectory] = []
    open_run = functools.partial(RunDirectory.create_or_resume, arguments.run_dir, config)
    by_first_process(lambda: held.append(open_run(resume=arguments.resume, text_digest=text.digest)))
    run = RunDirectory(arguments.run_dir)
    check_shared(run.config_file)
    if first_process:
        save_tokenizer(text.tokenizer, run.path, config.data.tokenizer, config.train.init_from)
        epochs = text.epochs_in_words(schedules.rows_before(steps))
        print(f"{run.path}: {text.report}; {epochs}", *notes, sep="\n", flush=True)

    with jax.set_mesh(mesh), Checkpoints(run, config.checkpoint) as checkpoints:
        state, saved = init_or_restore(config, mesh, checkpoints)
        first, counters = (saved.record.step, saved.record.counters) if saved else (0, {})
        profiled = profiled_steps(arguments.profile, steps=steps, done=first)
        if first_process:
            if saved:
                print(f"continuing after step {first} of {steps}", flush=True)
            count = sum(leaf.size for leaf in jax.tree.leaves(state.variables))
            print(f"{count:,} parameters, computing in {config.model.dtype} on {describe(mesh)}; {backends}", flush=True)

        # The loop.
        step = compile_train_step(config, mesh)
        score = functools.partial(evaluate_sources, Evaluator(config.model, placement.place))
        keep = functools.partial(keep_batch, run, whole_batches, first_process)
        skipped = NaNGuard(config.train.max_skipped, keep, **counters)
        with Observer(run, config, mesh, first, profiled=profiled, started=started, writes=first_process) as observer:
            with GracefulShutdown(jax.process_count()) as stop:
                for number, batch in enumerate(observer.data_timer(batches.iterate(first)), first + 1):
                    values = schedules.at(number - 1)
                    observer.before_step(number)
                    state, metrics, load = step(state, place(batch), values)
                    observer.after_step(number, state, load)
                    skipped.see(number, metrics["skipped"])
                    checkpoints.poll()
                    ends = number == steps or skipped.abort_reason is not None or stop.after(number)
                    evaluates = config.train.eval_every and number % config.train.eval_every == 0
                    if ends or evaluates or number % config.train.log_every == 0:
                        skipped.update()
                        sample = functools.partial(score, state.variables, text.validation, config.train.eval_batches)
                        observer.log(number, metrics, values, skipped.total, sample if evaluates else None)
                    if ends or number % config.checkpoint.every == 0:
                        skipped.update()
                        with observer.paused():
                            checkpoints.save(number, state.variables, state.optimizer, skipped.counters)
                    if ends:
                        break

            with observer.paused():
                observer.draw_report()
                checkpoints.wait()
                if skipped.abort_reason is not None:
                    raise ValueError(skipped.abort_reason)
                if (taken := int(state.step)) < steps:
                    checkpoints.check_saved()
                    observer.say(f"{stop.reason}: stopped after step {taken} of {steps}, saved; go on with: {how_to_resume()}")
                    return

                # The result, to compare with general compressors on the same bytes.
                observer.say(f"scoring {sum(windows.num_bytes for windows in text.validation.values()):,} held-out bytes")
                scored = score(state.variables, text.validation).total

    if first_process:
        documents = [document for source in text.sources.values() for document in source.documents]
        compressors = compressor_bits_per_byte(documents)
        summary = {
            "steps": steps,
            "tokens": schedules.tokens_before(steps),
            "seconds": time.perf_counter() - started,
            "tokens_per_second": observer.median_speed,
            "final_loss": observer.rows[-1].get("loss"),
            "skipped": skipped.total,
            "heldout_loss": scored.loss,
            "heldout_bits_per_byte": scored.bits_per_byte,
            "mtp_acceptance": scored.acceptance,
            "gzip_bits_per_byte": compressors["gzip"],
            "xz_bits_per_byte": compressors["xz"],
        }
        print(json.dumps(summary))
        run.write_summary(summary)
    checkpoints.check_saved()
    wait_for_first_process()


if __name__ == "__main__":
    main()
