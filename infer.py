"""Completes a prompt, streaming the text as it comes.

    python infer.py --checkpoint runs/tiny --prompt "def main(" --max-tokens 64
    python infer.py --checkpoint path/to/hf_folder --prompt "..." --temperature 0.7 --top-p 0.95

The checkpoint is a run directory of train.py, or a Hugging Face folder with a tokenizer.json.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Literal

import jax

from dsv3_jax import Engine, SamplingParams
from dsv3_jax.config import DataConfig
from dsv3_jax.config.command_line import exits_with_one_line, parse_flags
from dsv3_jax.data.tokenizer import StreamDecoder
from dsv3_jax.infer.load import load_model
from dsv3_jax.kernels.attention import choose_attention
from dsv3_jax.kernels.expert_ffn import choose_backend
from dsv3_jax.kernels.latent_attention import choose_latent_backend
from dsv3_jax.parallel.compilation import cache_compilations


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to complete, and how."""

    checkpoint: str
    """Run directory of train.py, or Hugging Face folder."""
    prompt: str | None = None
    """Text to continue; this and the next three default to the run's `infer` group."""
    max_tokens: int | None = None
    """Longest completion, in tokens."""
    temperature: float | None = None
    """Divides the logits; 0 takes the most likely token each time."""
    top_p: float | None = None
    """Draws from the smallest set of most likely tokens that together have this probability."""
    seed: int = 0
    """Seed of the draws."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype to compute in; None is the checkpoint's own."""


@exits_with_one_line
def main() -> None:
    arguments = parse_flags(Arguments, description=__doc__)
    started = time.perf_counter()
    model = load_model(arguments.checkpoint, arguments.dtype)
    given = {name: value for name, value in dataclasses.asdict(arguments).items() if value is not None}
    wanted = dataclasses.asdict(model.infer) | given
    params = SamplingParams(wanted["max_tokens"], wanted["temperature"], wanted["top_p"], wanted["seed"])
    cache_compilations(DataConfig.cache_dir)
    # The cache of a completion has room for what was asked, so that a long context costs nothing by itself.
    engine = Engine(model.config, model.variables, model.tokenizer, max_length=model.config.max_position_embeddings)
    tokens = engine.stream(wanted["prompt"], params)
    c = model.config
    experts = choose_backend(c.expert_backend, c.dtype)
    attention = choose_attention(c.attention_backend, c.dtype, (c.qk_head_dim, c.v_head_dim))
    over_cache = choose_latent_backend(c.cache_backend, c.dtype, (c.kv_lora_rank, c.qk_rope_head_dim))
    backends = f"attention by {attention}, over the cache by {over_cache}, experts by {experts}"
    print(f"{model.origin}, in {model.config.dtype} on {jax.devices()[0]}; {backends}", file=sys.stderr)

    print(wanted["prompt"], end="", flush=True)
    decoder, count = StreamDecoder(model.tokenizer), 0
    for count, token in enumerate(tokens, 1):
        print(decoder.feed([token]), end="", flush=True)
        if count == 1:
            first = time.perf_counter()
    print(decoder.finish(), flush=True)

    if count > 1:
        rate = (count - 1) / (time.perf_counter() - first)
        print(f"{count} tokens; the first after {first - started:.1f} s, then {rate:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main()
