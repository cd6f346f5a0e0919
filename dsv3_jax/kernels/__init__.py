"""Kernels: the hot loops, each with a plain XLA backend and Pallas kernels for TPUs and GPUs."""

from dsv3_jax.kernels.experts import choose_backend, expert_ffn

__all__ = ["choose_backend", "expert_ffn"]
