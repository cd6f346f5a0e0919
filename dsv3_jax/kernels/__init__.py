"""Hot loops: one file a kernel, each with a plain specification, chosen by name in one place."""

from dsv3_jax.kernels.experts import choose_backend, expert_ffn

__all__ = ["choose_backend", "expert_ffn"]
