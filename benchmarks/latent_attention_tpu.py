"""Schedule of the TPU kernel of attention over cached latents, from the TPU compiler; needs no TPU.

    python benchmarks/latent_attention_tpu.py [--chip v5p] [--page 128]

At the published widths (latent 512, rotary 64), in bfloat16, for several numbers of new tokens and heads. Prints one JSON
line each: `bundles` of one step of the kernel's loop, which takes a block of cached tokens; `peak_cycles`, which its arithmetic
takes at the datasheet's peak, and `copy_cycles`, which its bytes take at the datasheet's bandwidth, both of one TensorCore; and
`ratio`, of bundles to the larger. `once` is the extra cost of a sequence's first and last blocks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
from machine import machine
from tpu_schedule import CLOCK, CORES, TOPOLOGIES, Job, peak_flops_per_cycle, read_schedules

from dsv3_jax.kernels.tpu.latent_attention import block_tokens, past_attention_tpu
from dsv3_jax.parallel.devices import CHIPS

C, P = 512, 64
QUERIES = (1, 128), (2, 128), (4, 128), (1, 16)
"""New tokens, and heads."""
SEQUENCES, CAPACITY = 8, 8192


def program(tokens: int, heads: int, page: int) -> tuple[Callable, tuple]:
    """One call for a batch of sequences."""

    def shape(*axes: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(axes, jnp.dtype(dtype))

    pages = SEQUENCES * CAPACITY // page
    queries = shape(SEQUENCES, tokens, heads, C), shape(SEQUENCES, tokens, heads, P)
    table = shape(SEQUENCES, CAPACITY // page, dtype="int32"), shape(SEQUENCES, dtype="int32")
    return lambda *args: past_attention_tpu(*args, scale=0.1), (*queries, shape(pages, page, C), shape(pages, page, P), *table)


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=TOPOLOGIES, action="append", help="only this chip (may be given several times)")
    parser.add_argument("--page", type=int, default=128, choices=(16, 32, 64, 128), help="tokens of a page")
    args = parser.parse_args()
    for chip in args.chip or TOPOLOGIES:
        jobs = [Job("latent_attention_tpu:program", {"tokens": t, "heads": n, "page": args.page}) for t, n in QUERIES]
        for (tokens, heads), answer in zip(QUERIES, read_schedules(jobs, chip), strict=True):
            if isinstance(answer, str):
                raise SystemExit(f"error: {chip}, {tokens} x {heads}: {answer}")
            (schedule,) = (s for name, s in answer.items() if "latent_attention" in name)
            step = max(schedule.loops)  # On tpu7x, waiting for a copy is a loop, too.
            block = block_tokens(tokens * heads)
            peak = 2 * tokens * heads * (2 * C + P) * block / peak_flops_per_cycle(chip)
            copying = 2 * (C + P) * block * CLOCK[chip] * CORES[chip] / CHIPS[chip].hbm_bytes
            line = {
                "benchmark": "latent_attention_tpu",
                "chip": chip,
                "tokens": tokens,
                "heads": heads,
                "page": args.page,
                "block": block,
                "bundles": step.bundles,
                "peak_cycles": round(peak),
                "copy_cycles": round(copying),
                "ratio": round(step.bundles / max(peak, copying), 2),
                "once": schedule.body.bundles - step.bundles,
            }
            print(json.dumps(line | machine()), flush=True)


if __name__ == "__main__":
    main()
