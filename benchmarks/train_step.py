"""Training tokens/s, and the ratio to transformers: loss, gradients and AdamW, same model, batch and threads.

    python benchmarks/train_step.py [--repeats 7]

Prints one JSON line. Both are warm and timed in turn; transformers runs its fastest experts implementation.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from typing import Any

import jax
import numpy as np
import torch
from comparison import CONFIG, both_models, fastest_experts, paired
from machine import machine

from dsv3_jax.config import Config, OptimizerConfig, TrainConfig
from dsv3_jax.model.losses import Batch
from dsv3_jax.train.state import state_of
from dsv3_jax.train.step import train_step

BATCH, LENGTH = 8, 256


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="turns that are timed")
    repeats = parser.parse_args().repeats
    rows = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (BATCH, LENGTH + 1))
    tokens_BT, target_BT = rows[:, :-1].astype(np.int32), rows[:, 1:].astype(np.int32)

    with tempfile.TemporaryDirectory() as folder:
        _, variables, load = both_models(f"{folder}/model")

        def torch_step(model: Any) -> Any:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
            inputs, labels = torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:]).contiguous()

            def run() -> None:
                logits = model(inputs, use_cache=False).logits
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

            return run

        def seconds(model: Any) -> float:
            run = torch_step(model.train())
            started = time.perf_counter()
            run()
            return time.perf_counter() - started

        # "batched_mm" copies an expert's weights for every token it serves: more memory than a machine like this has.
        experts, tried = fastest_experts(load, seconds, ("eager", "grouped_mm"))
        theirs = torch_step(load(experts).train())

    optimizer = OptimizerConfig(learning_rate=1e-4, final_learning_rate=1e-5, warmup_steps=1, moment_dtype="float32")
    config = Config(model=CONFIG, optimizer=optimizer, train=TrainConfig(batch_size=BATCH, sequence_length=LENGTH))
    step = jax.jit(functools.partial(train_step, config=config), donate_argnums=0)
    batch, values = Batch.of(tokens_BT, target_BT), config.schedules.at(0)
    state = state_of(config, variables)

    def ours() -> None:
        nonlocal state
        state, _, _ = step(state, batch, values)
        jax.block_until_ready(state)

    result = paired(ours, theirs, repeats)
    print(
        json.dumps(
            {
                "benchmark": "train_step",
                "tokens_per_second": round(BATCH * LENGTH / result["seconds"], 1),
                "tokens_per_second_transformers": round(BATCH * LENGTH / result["seconds_transformers"], 1),
                **result,
                "experts_transformers": experts,
                "experts_tried_seconds": tried,
                "batch_size": BATCH,
                "sequence_length": LENGTH,
                "n_routed_experts": CONFIG.n_routed_experts,
                **machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
