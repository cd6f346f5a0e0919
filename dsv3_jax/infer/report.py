"""Texts that infer.py prints to stderr: model, devices, backends and engine at the start, and speed at the end."""

from __future__ import annotations

import time

from jax.sharding import Mesh

from dsv3_jax.infer.engine import Engine
from dsv3_jax.infer.load import LoadedModel
from dsv3_jax.kernels.attention import choose_attention
from dsv3_jax.kernels.experts import choose_backend
from dsv3_jax.kernels.latent_attention import choose_latent_backend
from dsv3_jax.parallel.mesh import describe


def opening(model: LoadedModel, mesh: Mesh, engine: Engine) -> list[str]:
    """Return lines about the model's source, the devices, the backends, the cache and the programs."""
    c = model.config
    experts = choose_backend(c.expert_backend, c.dtype)
    attention = choose_attention(c.attention_backend, c.dtype, (c.qk_head_dim, c.v_head_dim))
    over_cache = choose_latent_backend(c.cache_backend, c.dtype, (c.kv_lora_rank, c.qk_rope_head_dim))
    backends = f"attention by {attention}, over the cache by {over_cache}, experts by {experts}"
    return [f"{model.origin}, in {c.dtype} on {describe(mesh)}; {backends}", *engine.describe()]


class Speed:
    """Meter of the time from its creation to the first token, and of tokens per second after it."""

    def __init__(self) -> None:
        self.count = 0
        """Tokens noted so far."""
        self._started = time.perf_counter()
        self._until_first: float | None = None
        self._before: float | None = None
        # Tokens that followed others without a pause, and their time.
        self._following, self._seconds = 0, 0.0

    def resume(self) -> None:
        """Exclude the time since the last tokens from the speed; before any tokens, restart the time to the first."""
        self._before = None
        if self._until_first is None:
            self._started = time.perf_counter()

    def note(self, tokens: int) -> None:
        """Count tokens that have arrived now; they enter the speed unless they are the first, or the first after `resume`."""
        if not tokens:
            return
        now = time.perf_counter()
        self.count += tokens
        if self._until_first is None:
            self._until_first = now - self._started
        if self._before is not None:
            self._following += tokens
            self._seconds += now - self._before
        self._before = now

    def summary(self, engine: Engine) -> str:
        """Return a line: number of tokens, seconds to the first, tokens per second after it, and `speculation`."""
        text = f"{self.count} tokens"
        if self._until_first is not None:
            text += f"; the first after {self._until_first:.1f} s"
        if self._seconds:
            text += f", then {self._following / self._seconds:.1f} tokens/s"
        return text + speculation(engine)


def speculation(engine: Engine) -> str:
    """Return tokens per step and % of drafts accepted (all tokens of a step but one), as text; "" without drafts or steps."""
    steps, tokens = engine.counts["steps"], engine.counts["step_tokens"]
    if not engine.sizes.drafts or not steps:
        return ""
    return f"; {tokens / steps:.2f} tokens a step, {(tokens - steps) / (steps * engine.sizes.drafts):.0%} of drafts accepted"
