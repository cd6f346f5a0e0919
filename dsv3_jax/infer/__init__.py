"""Inference: the engine, with the parts it drives: paged cache, prefill, decoding and sampling."""

from dsv3_jax.infer.engine import Completion, Engine
from dsv3_jax.infer.sampling import SamplingParams

__all__ = ["Completion", "Engine", "SamplingParams"]
