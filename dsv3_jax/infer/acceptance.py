"""Which drafts of speculative decoding stand, so that what comes out is distributed as if drawn token by token.

The rule of Leviathan et al. (arXiv 2211.17192, section 2.3) and Chen et al. (arXiv 2302.01318, algorithm 2). A draft d, drawn
from q where the model says p, is accepted with probability min(1, p(d) / q(d)); the first that is not is replaced by a draw
from max(p - q, 0), and none after it counts. If all are accepted, the model's last distribution gives one token more.

Draws are told by a token's place (infer/sampling.py), so a draft that is thrown away is drawn again with the same random
numbers in a later step. That is sound: whatever has been settled by then was settled by those of earlier places alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv3_jax.infer.sampling import Stream, draw, random_key


def verify(
    target_BTV: jax.Array, draft_probs_BnV: jax.Array, draft_Bn: jax.Array, seed_B: jax.Array, place_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The new tokens that n drafts lead to: tokens [B, T] int32 with T = n + 1, and how many of them count, [B] in 1..T.

    The accepted drafts come first, then one token drawn here; what follows means nothing. Without drafts it is a plain draw.
    One-hot distributions, as greedy sequences have, accept exactly the drafts that are the most likely tokens.

    Args:
      target_BTV: float32 probabilities of the model; row i is for the token after i accepted drafts.
      draft_probs_BnV: the probabilities that the drafts were drawn with.
      draft_Bn: the drafts, drawn with `Stream.DRAFT` or by no chance at all.
      seed_B: uint32.
      place_B: place in its sequence of the first new token.
    """
    n = draft_Bn.shape[1]
    p_Bn = jnp.take_along_axis(target_BTV[:, :n], draft_Bn[..., None], axis=-1)[..., 0]
    q_Bn = jnp.take_along_axis(draft_probs_BnV, draft_Bn[..., None], axis=-1)[..., 0]
    accepted_Bn = is_accepted(p_Bn, q_Bn, _uniform(seed_B[:, None], place_B[:, None] + jnp.arange(n)))
    kept_B = jnp.sum(jnp.cumprod(accepted_Bn, axis=1), axis=1)

    at_B11 = kept_B[:, None, None]
    p_BV = jnp.take_along_axis(target_BTV, at_B11, axis=1)[:, 0]
    # Behind the last draft q is 0, and the residual is p itself.
    q_BV = jnp.take_along_axis(draft_probs_BnV, at_B11, axis=1, mode="fill", fill_value=0)[:, 0]
    stream_B = jnp.where(kept_B < n, Stream.RESIDUAL, Stream.TARGET)
    new_B = draw(residual(p_BV, q_BV), seed_B, place_B + kept_B, stream_B)
    draft_BT = jnp.pad(draft_Bn, ((0, 0), (0, 1)))
    tokens_BT = jnp.where(jnp.arange(n + 1) < kept_B[:, None], draft_BT, new_B[:, None])
    return tokens_BT.astype(jnp.int32), (kept_B + 1).astype(jnp.int32)


def is_accepted(p: jax.Array, q: jax.Array, uniform: jax.Array) -> jax.Array:
    """True with probability min(1, p / q), for `uniform` in [0, 1)."""
    return uniform * q < p


def residual(p_BV: jax.Array, q_BV: jax.Array) -> jax.Array:
    """max(p - q, 0), normalised: what a rejected draft is replaced from. p where rounding leaves nothing."""
    excess_BV = jnp.maximum(p_BV - q_BV, 0)
    total_B1 = excess_BV.sum(-1, keepdims=True)
    return jnp.where(total_B1 > 0, excess_BV / jnp.where(total_B1 > 0, total_B1, 1), p_BV)


@jnp.vectorize
def _uniform(seed: jax.Array, place: jax.Array) -> jax.Array:
    return jax.random.uniform(random_key(seed, place, Stream.ACCEPT))


def logprobs(logits_BTV: jax.Array, tokens_BT: jax.Array, num: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities, in nats, that the model itself gives, before temperature and whatever else changes its logits.

    Args:
      logits_BTV: logits of any float dtype.
      tokens_BT: the chosen tokens.
      num: how many of the most likely tokens to report, at most V.

    Returns:
      Those of the chosen tokens, [B, T] float32; the `num` largest, [B, T, num], from the largest down; their token ids.
    """
    logprobs_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)
    chosen_BT = jnp.take_along_axis(logprobs_BTV, tokens_BT[..., None], axis=-1)[..., 0]
    return chosen_BT, *jax.lax.top_k(logprobs_BTV, num)
