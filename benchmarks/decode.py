"""Decoding tokens/s, and the ratio to transformers' generate: greedy, same model, prompts and threads.

    python benchmarks/decode.py [--batch 1] [--repeats 5] [--model FOLDER --drafts 1]

Prints one JSON line. Both are warm and timed in turn, prefill included; transformers runs its fastest experts
implementation. The tokens of both must be the same. FOLDER is a Hugging Face checkpoint with a tokenizer.json, as
`python -m dsv3_jax.convert` makes of a run: prompts are then source code, and `--drafts` times speculation too; otherwise
the model and the prompts are random.
"""

from __future__ import annotations

import argparse
import inspect
import json
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from comparison import CONFIG, both_models, fastest_experts, paired
from machine import machine

from dsv3_jax import Engine, SamplingParams
from dsv3_jax.data.tokenizer import load_tokenizer

PROMPT, NEW = 64, 128


def _prompts(folder: str | None, count: int) -> np.ndarray:
    """[count, PROMPT] ids: parts of a module of the standard library, or random ones."""
    if folder is None:
        return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (count, PROMPT))
    ids = load_tokenizer(folder).encode(inspect.getsource(argparse))
    starts = np.random.default_rng(0).integers(0, len(ids) - PROMPT, count)
    return np.array([ids[start : start + PROMPT] for start in starts])


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1, help="prompts at a time")
    parser.add_argument("--repeats", type=int, default=5, help="turns that are timed")
    parser.add_argument("--model", help="Hugging Face folder in place of a random model")
    parser.add_argument("--drafts", type=int, default=0, help="also time speculation with so many drafts")
    arguments = parser.parse_args()
    if arguments.drafts and arguments.model is None:
        parser.error("--drafts needs --model: the random model has no MTP depth to draft with")
    prompts = _prompts(arguments.model, arguments.batch)

    with tempfile.TemporaryDirectory() as folder:
        config, variables, load = both_models(f"{folder}/model", arguments.model)

        def generate(model: Any) -> list[list[int]]:
            with torch.inference_mode():
                ids = torch.from_numpy(prompts)
                mask = torch.ones_like(ids)
                lengths = {"max_new_tokens": NEW, "min_new_tokens": NEW}
                new = model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, eos_token_id=None, **lengths)
            return new[:, PROMPT:].tolist()

        def seconds(model: Any) -> float:
            started = time.perf_counter()
            generate(model.eval())
            return time.perf_counter() - started

        experts, tried = fastest_experts(load, seconds, ("eager", "batched_mm", "grouped_mm"))
        model = load(experts).eval()

    def ours(drafts: int) -> Callable[[], list[list[int]]]:
        # No prefix cache: otherwise every turn after the first would find its prompts there.
        length = PROMPT + NEW
        engine = Engine(config, variables, max_batch=arguments.batch, max_length=length, drafts=drafts, prefix_cache=False)
        params = SamplingParams(max_tokens=NEW, ignore_eos=True)
        return lambda: [completion.tokens for completion in engine.generate(prompts.tolist(), params)]

    plain = ours(0)
    same = plain() == generate(model)
    result = paired(plain, lambda: generate(model), arguments.repeats)
    count = arguments.batch * NEW
    if arguments.drafts:
        drafting = ours(arguments.drafts)
        same &= drafting() == generate(model)
        speculative = paired(drafting, lambda: generate(model), arguments.repeats)
        result["drafts"] = arguments.drafts
        result["speedup_with_drafts"] = speculative["speedup_over_transformers"]
        result["speedup_range_with_drafts"] = speculative["speedup_range"]
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
                "model": arguments.model,
                "n_routed_experts": config.n_routed_experts,
                **machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
