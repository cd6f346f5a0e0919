"""The two programs of generation: prefill of whole prompts, and decoding of one more token for every sequence.

Prefill runs materialised attention and stores the latents; decoding runs the absorbed form over the cache (section
2.1.1 of the report). Both end by choosing a token on device, so that only ids travel to the host.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dsv3_jax.infer.cache import Cache, append, empty_cache
from dsv3_jax.infer.sampling import sample
from dsv3_jax.model import DeepSeekV3


@struct.dataclass
class Draw:
    """How tokens are chosen."""

    seed_B: jax.Array
    """One seed a sequence, uint32: its draws do not depend on what shares the batch."""
    temperature: jax.Array
    top_p: jax.Array

    def choose(self, logits_BV: jax.Array, place_B: jax.Array) -> jax.Array:
        """The token for position `place_B` of each sequence: [B] int32."""
        key_B = jax.vmap(lambda seed, place: jax.random.fold_in(jax.random.key(seed), place))(self.seed_B, place_B)
        return sample(logits_BV, key_B, self.temperature, self.top_p)


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def prefill(
    model: DeepSeekV3, variables: Any, tokens_BT: jax.Array, length_B: jax.Array, draw: Draw, *, capacity: int
) -> tuple[jax.Array, Cache]:
    """The first new token of every prompt, and the cache of the prompts.

    Args:
      model: the unrolled model.
      variables: its variables, as `unstack` lays them out.
      tokens_BT: prompts, padded on the right with any valid id.
      length_B: tokens in each prompt, at least 1.
      draw: how the token is chosen.
      capacity: places in the cache for each sequence, at least T.
    """
    features = model.apply(variables, tokens_BT, keep=("latents",), method="features")
    last_BD = jnp.take_along_axis(features.h_BTD, (length_B - 1)[:, None, None], axis=1)[:, 0]
    latents = {name: output.latents for name, output in features.outputs.items()}
    cache = append(empty_cache(model.config, tokens_BT.shape[0], capacity), latents, length_B)
    return draw.choose(model.apply(variables, last_BD, method="head"), length_B), cache


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def decode(model: DeepSeekV3, variables: Any, token_B: jax.Array, cache: Cache, draw: Draw) -> tuple[jax.Array, Cache]:
    """The token after `token_B` for every sequence, and the cache with `token_B` in it."""
    logits_BTV, new = model.apply(variables, token_B[:, None], cache.layers, cache.length_B, method="decode")
    cache = append(cache, new, jnp.ones_like(cache.length_B))
    return draw.choose(logits_BTV[:, 0], cache.length_B), cache
