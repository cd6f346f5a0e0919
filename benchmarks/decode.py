"""Decoding tokens/s, and the ratio to transformers' generate: greedy, same model, prompts and threads.

    python benchmarks/decode.py [--batch 1] [--repeats 5]

Prints one JSON line. Both are warm and timed in turn, prefill included; transformers runs its fastest experts
implementation. The tokens of both must be the same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from typing import Any

import numpy as np
import torch
from comparison import CONFIG, both_models, fastest_experts, paired
from machine import machine

from dsv3_jax import Engine, SamplingParams

PROMPT, NEW = 64, 128


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1, help="prompts at a time")
    parser.add_argument("--repeats", type=int, default=5, help="turns that are timed")
    arguments = parser.parse_args()
    prompts = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (arguments.batch, PROMPT))

    with tempfile.TemporaryDirectory() as folder:
        variables, load = both_models(f"{folder}/model")

        def generate(model: Any) -> list[list[int]]:
            with torch.inference_mode():
                ids = torch.from_numpy(prompts)
                mask = torch.ones_like(ids)
                new = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
            return new[:, PROMPT:].tolist()

        def seconds(model: Any) -> float:
            started = time.perf_counter()
            generate(model.eval())
            return time.perf_counter() - started

        experts, tried = fastest_experts(load, seconds, ("eager", "batched_mm", "grouped_mm"))
        model = load(experts).eval()

    engine = Engine(CONFIG, variables, max_batch=arguments.batch)

    def ours() -> list[list[int]]:
        return [completion.tokens for completion in engine.generate(prompts.tolist(), SamplingParams(max_tokens=NEW))]

    same = ours() == generate(model)
    result = paired(ours, lambda: generate(model), arguments.repeats)
    count = arguments.batch * NEW
    print(
        json.dumps(
            {
                "benchmark": "decode",
                "tokens_per_second": round(count / result["seconds"], 1),
                "tokens_per_second_transformers": round(count / result["seconds_transformers"], 1),
                **result,
                "same_tokens": same,
                "experts_transformers": experts,
                "experts_tried_seconds": tried,
                "batch": arguments.batch,
                "prompt": PROMPT,
                "new": NEW,
                "n_routed_experts": CONFIG.n_routed_experts,
                **machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
