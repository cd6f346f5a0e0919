"""Speculative decoding of a trained run: share of accepted drafts, and the effect on time.

    python benchmarks/speculation.py --run runs/tiny [--batch 1] [--prompts 16] [--repeats 5]

Prompts are the beginnings of held-out source files. For each number of drafts it prints a JSON line: the share of drafts that
greedy verification accepts, tokens a step, and the seconds of plain decoding over its own, both measured in turn and warm; the
tokens have to be the same. The first line is plain decoding against itself, which shows the noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from machine import machine

from dsv3_jax import Engine, SamplingParams
from dsv3_jax.checkpoint.run import load_run
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.infer.load import load_model

PROMPT, NEW = 64, 128


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/tiny", help="run directory of train.py")
    parser.add_argument("--batch", type=int, default=1, help="sequences at a time")
    parser.add_argument("--prompts", type=int, default=16, help="prompts")
    parser.add_argument("--repeats", type=int, default=5, help="turns that are timed")
    parser.add_argument("--drafts", type=int, nargs="+", default=[0, 1, 2, 3], help="drafts a step")
    flags = parser.parse_args()

    run, *_ = load_run(flags.run)
    model = load_model(flags.run)
    sources = [document.text for document in load_corpus(run.data).validation if document.name.endswith(".py")]
    prompts = [ids[:PROMPT] for ids in map(model.tokenizer.encode, sources) if len(ids) > PROMPT + NEW][: flags.prompts]
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)

    def engine(drafts: int) -> Engine:
        # No prefix cache: otherwise every turn after the first would find its prompts there.
        sizes = {"max_batch": flags.batch, "max_length": PROMPT + NEW, "drafts": drafts}
        return Engine(model.config, model.variables, prefix_cache=False, **sizes)

    def seconds(of: Engine) -> float:
        started = time.perf_counter()
        for _ in of.generate(prompts, params):
            pass
        return time.perf_counter() - started

    plain = engine(0)
    expected = list(plain.generate(prompts, params))
    for drafts in flags.drafts:
        drafting = engine(drafts)
        same = list(drafting.generate(prompts, params)) == expected
        per_step = drafting.step_tokens / drafting.steps
        ratios = [seconds(plain) / seconds(drafting) for _ in range(flags.repeats)]
        result = {
            "benchmark": "speculation",
            "drafts": drafts,
            "accepted_share": round((per_step - 1) / drafts, 4) if drafts else None,
            "tokens_per_step": round(per_step, 3),
            "speedup_over_plain": round(statistics.median(ratios), 3),
            "speedup_range": [round(min(ratios), 3), round(max(ratios), 3)],
            "same_tokens": same,
            "batch": flags.batch,
            "prompts": len(prompts),
            "new": NEW,
            "repeats": flags.repeats,
        }
        print(json.dumps(result | machine()), flush=True)


if __name__ == "__main__":
    main()
