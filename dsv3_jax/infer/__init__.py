"""Inference: cache, prefill and decoding, sampling, and the engine that drives them."""

from dsv3_jax.infer.engine import Completion, Engine
from dsv3_jax.infer.sampling import SamplingParams

__all__ = ["Completion", "Engine", "SamplingParams"]
