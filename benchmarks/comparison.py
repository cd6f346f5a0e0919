"""Shared code of the benchmarks against transformers: one model in both libraries. Needs `make parity`'s environment."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import torch
import transformers

from dsv3_jax import ModelConfig, load_hf, save_hf
from dsv3_jax.model import init_variables

# 32 experts, four for a token; float32, as CPUs compute it. No MTP: transformers does not train it.
CONFIG = ModelConfig(
    vocab_size=4096,
    hidden_size=512,
    num_hidden_layers=4,
    num_nextn_predict_layers=0,
    first_k_dense_replace=1,
    num_attention_heads=8,
    q_lora_rank=192,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    intermediate_size=1536,
    moe_intermediate_size=256,
    n_routed_experts=32,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    max_position_embeddings=1024,
    initializer_range=0.02,
    eos_token_id=None,
    dtype="float32",
)


def both_models(folder: str, checkpoint: str | None = None) -> tuple[ModelConfig, dict[str, Any], Callable[[str], Any]]:
    """Config and variables, and a function that loads the same weights in transformers with a given experts implementation.

    Args:
      folder: where a random model of `CONFIG` is saved.
      checkpoint: a Hugging Face folder to use instead.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    if checkpoint is None:
        config, variables = CONFIG, jax.jit(lambda: init_variables(CONFIG, jax.random.key(0)))()
        save_hf(folder, config, variables)
    else:
        folder, (config, variables) = checkpoint, load_hf(checkpoint, dtype="float32")

    def load(experts: str) -> Any:
        return transformers.DeepseekV3ForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
        )

    return config, variables, load


def fastest_experts(
    load: Callable[[str], Any], time_it: Callable[[Any], float], candidates: tuple[str, ...]
) -> tuple[str, dict[str, float]]:
    """Return transformers' fastest experts implementation, and the seconds of all, each warm."""
    seconds = {}
    for experts in candidates:
        model = load(experts)
        time_it(model)
        seconds[experts] = min(time_it(model) for _ in range(2))
    return min(seconds, key=seconds.__getitem__), seconds


def paired(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Time both in turn after one warm-up each; the ratio is the median over turns of theirs / ours."""
    ours(), theirs()
    seconds: list[tuple[float, float]] = []
    for _ in range(repeats):
        marks = [time.perf_counter()]
        for run in (ours, theirs):
            run()
            marks.append(time.perf_counter())
        seconds.append((marks[1] - marks[0], marks[2] - marks[1]))
    ratios = [theirs_s / ours_s for ours_s, theirs_s in seconds]
    return {
        "speedup_over_transformers": round(statistics.median(ratios), 2),
        "speedup_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "seconds": statistics.median(ours_s for ours_s, _ in seconds),
        "seconds_transformers": statistics.median(theirs_s for _, theirs_s in seconds),
        "repeats": repeats,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
