"""Kernels: expert FFN, causal attention and attention over cached latents, each in plain XLA and in Pallas for TPU and GPU."""

from dsv3_jax.kernels.experts import choose_backend, expert_ffn

__all__ = ["choose_backend", "expert_ffn"]
