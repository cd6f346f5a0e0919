"""What infer.py says on stderr: by what it generates, and how fast it went."""

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
    """Where the model comes from, the devices, the backends, the cache and the programs."""
    c = model.config
    experts = choose_backend(c.expert_backend, c.dtype)
    attention = choose_attention(c.attention_backend, c.dtype, (c.qk_head_dim, c.v_head_dim))
    over_cache = choose_latent_backend(c.cache_backend, c.dtype, (c.kv_lora_rank, c.qk_rope_head_dim))
    backends = f"attention by {attention}, over the cache by {over_cache}, experts by {experts}"
    return [f"{model.origin}, in {c.dtype} on {describe(mesh)}; {backends}", *engine.describe()]


class Speed:
    """Counts tokens against the clock, from its making on."""

    def __init__(self) -> None:
        self.count = 0
        """Tokens so far."""
        self._started = time.perf_counter()
        self._until_first: float | None = None
        self._before: float | None = None
        # Of the tokens that followed others without a pause.
        self._following, self._seconds = 0, 0.0

    def resume(self) -> None:
        """After a pause, which is nobody's time: the first tokens that come count for no speed."""
        self._before = None
        if self._until_first is None:
            self._started = time.perf_counter()

    def note(self, tokens: int) -> None:
        """Some tokens have come."""
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

    def told(self, engine: Engine) -> str:
        """Tokens, seconds to the first, tokens a second after it, and with speculation what the drafts brought."""
        told = f"{self.count} tokens"
        if self._until_first is not None:
            told += f"; the first after {self._until_first:.1f} s"
        if self._seconds:
            told += f", then {self._following / self._seconds:.1f} tokens/s"
        return told + speculation(engine)


def speculation(engine: Engine) -> str:
    """What drafts have brought so far, to end a line with; nothing without any.

    Of a step's tokens all but one are accepted drafts, so that the share comes from the same two counts.
    """
    steps, tokens = engine.counts["steps"], engine.counts["step_tokens"]
    if not engine.sizes.drafts or not steps:
        return ""
    return f"; {tokens / steps:.2f} tokens a step, {(tokens - steps) / (steps * engine.sizes.drafts):.0%} of drafts accepted"
