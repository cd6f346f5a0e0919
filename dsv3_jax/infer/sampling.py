"""From logits to a token: greedy, or temperature and top-p."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from dsv3_jax.config.checks import require_seed


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How a completion is drawn and when it ends."""

    max_tokens: int = 64
    """Longest completion, in tokens."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token each time."""
    top_p: float = 1.0
    """Draws from the smallest set of most likely tokens that together have this probability."""
    seed: int = 0
    """Seed of the draws; the i-th prompt of a call uses seed + i."""

    def __post_init__(self) -> None:
        if not isinstance(self.max_tokens, int):
            raise ValueError(f"max_tokens is {self.max_tokens!r}; use an integer")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it cannot be negative (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        require_seed("seed", self.seed)


def sample(logits_BV: jax.Array, key_B: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """Draws one token a sequence: [B] int32.

    Args:
      logits_BV: float32 logits.
      key_B: one random key a sequence.
      temperature: scalar; 0 is greedy.
      top_p: scalar in (0, 1].
    """

    def draw() -> jax.Array:
        # From the largest down, so that the smallest temperature gives -inf and never inf - inf.
        scaled_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / temperature
        kept_BV = jnp.where(nucleus(scaled_BV, top_p), scaled_BV, -jnp.inf)
        return jax.vmap(jax.random.categorical)(key_B, kept_BV)

    chosen = jax.lax.cond(temperature > 0, draw, lambda: jnp.argmax(logits_BV, axis=-1))
    return chosen.astype(jnp.int32)


def nucleus(logits_BV: jax.Array, top_p: jax.Array) -> jax.Array:
    """Which tokens are in the smallest set of most likely ones with probability at least `top_p`: [B, V] bool."""
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
    # A token stays if those before it do not reach top_p yet; the first one always does.
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    rank_BV = jnp.argsort(order_BV, axis=-1)
    return jnp.take_along_axis(before_BV < top_p, rank_BV, axis=-1)
