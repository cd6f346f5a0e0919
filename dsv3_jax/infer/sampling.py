"""From logits to a token: what a completion asks for, the distribution that follows from it, and the draw.

The distribution is a value of its own, so that the acceptance of drafts (infer/sampling.py) can weigh two of them.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dsv3_jax.config.checks import check, check_numbers, check_positive, check_seed

MOST_LOGPROBS = 20
# Of float32; the smallest is the smallest normal number, by which 0 can still be divided.
LARGEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


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
    top_k: int = 0
    """Draws from this many most likely tokens; 0 is all of them."""
    min_p: float = 0.0
    """Draws from the tokens with at least this share of the most likely one's probability."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of the prompt and the completion so far less likely, below 1 more likely."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Added to the logits, by token id."""
    logprobs: int | None = None
    """How many most likely tokens to report with their log-probabilities beside the chosen one; None reports nothing."""
    stop: tuple[str, ...] = ()
    """Texts that end the completion; a single one may be given as it is."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the completion, besides those of the model."""
    ignore_eos: bool = False
    """Goes on after an end-of-text token of the model."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check_positive(self, "max_tokens")
        check_seed("seed", self.seed)
        check(self.temperature >= 0, f"temperature is {self.temperature}; it cannot be negative (0 is greedy)")
        check(0 < self.top_p <= 1, f"top_p is {self.top_p}; it must lie in (0, 1] (1 keeps every token)")
        check(self.top_k >= 0, f"top_k is {self.top_k}; it cannot be negative (0 keeps every token)")
        check(0 <= self.min_p <= 1, f"min_p is {self.min_p}; it must lie in [0, 1] (0 keeps every token)")
        penalty = self.repetition_penalty
        check(penalty > 0, f"repetition_penalty is {penalty}; it must be above 0 (1 changes nothing)")
        if self.logprobs is not None:
            in_range = 0 <= self.logprobs <= MOST_LOGPROBS
            check(in_range, f"logprobs is {self.logprobs}; it must lie in 0..{MOST_LOGPROBS}, or be None")
        check(isinstance(self.ignore_eos, bool), f"ignore_eos is {self.ignore_eos!r}; use True or False")
        # Copies of the collections, which a caller may go on to change.
        object.__setattr__(self, "stop", _stop_texts(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    def ending_at(self, tokens: tuple[int, ...]) -> SamplingParams:
        """The same, with further end-of-text tokens; those too are nothing to one that ignores them."""
        return self if self.ignore_eos else dataclasses.replace(self, stop_token_ids=(*self.stop_token_ids, *tokens))


def _stop_texts(stop: Any) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else stop
    is_texts = isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)
    check(is_texts, f"stop is {stop!r}; use a string or a list of strings")
    for text in texts:
        is_text = not any("\ud800" <= character <= "\udfff" for character in text)
        check(is_text, f"stop has {text!r}, which is no text: half of a surrogate pair is never generated; leave it out")
    check("" not in texts, f"stop is {stop!r}; an empty string would end every completion, leave it out")
    return tuple(texts)


def _stop_ids(ids: Any) -> tuple[int, ...]:
    is_ids = isinstance(ids, list | tuple) and all(_is_id(i) for i in ids)
    check(is_ids, f"stop_token_ids is {ids!r}; use a list of token ids, which are integers from 0")
    return tuple(ids)


def _biases(biases: Any) -> dict[int, float]:
    check(isinstance(biases, Mapping), f"logit_bias is {biases!r}; use a dict from token id to what its logit gains")
    for token, bias in biases.items():
        check(_is_id(token), f"logit_bias has the token {token!r}; token ids are integers from 0")
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        is_finite = is_number and abs(bias) <= sys.float_info.max
        check(is_finite, f"logit_bias of token {token} is {bias!r}; use a finite number (-100 all but forbids a token)")
    return dict(biases)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@struct.dataclass
class Sampler:
    """What the device needs of the parameters and the text, one row a sequence."""

    seed_B: jax.Array
    """uint32; with the place of a token it tells the draw, whatever shares the batch."""
    temperature_B: jax.Array
    """float32, as all that is no whole number."""
    top_k_B: jax.Array
    """int32, 0 for every token."""
    top_p_B: jax.Array
    min_p_B: jax.Array
    repetition_penalty_B: jax.Array
    bias_BV: jax.Array
    seen_BV: jax.Array
    """bool: the tokens of the prompt and the completion so far."""

    @classmethod
    def empty(cls, slots: int, vocab_size: int) -> Sampler:
        """Greedy rows that have seen nothing."""
        row = cls.row(SamplingParams(), (), vocab_size)
        return jax.tree.map(lambda leaf: jnp.asarray(np.repeat(leaf, slots, axis=0)), row)

    @classmethod
    def row(cls, params: SamplingParams, text: Sequence[int] | np.ndarray, vocab_size: int) -> Sampler:
        """The one row of a sequence, in NumPy.

        Args:
          params: what is asked for; numbers that float32 cannot hold become the nearest that it can.
          text: ids of the prompt and of the completion so far, each in the vocabulary.
          vocab_size: V.

        Raises:
          ValueError: if a token of `logit_bias` is outside the vocabulary.
        """
        for token in params.logit_bias:
            check(token < vocab_size, f"logit_bias has the token {token}; the vocabulary ends at {vocab_size - 1}")
        bias_BV = np.zeros((1, vocab_size), np.float32)
        for token, bias in params.logit_bias.items():
            bias_BV[0, token] = min(max(bias, -LARGEST), LARGEST)
        seen_BV = np.zeros((1, vocab_size), bool)
        seen_BV[0, np.asarray(text, np.int32)] = True
        fields: dict[str, Any] = {
            "seed_B": np.array([params.seed], np.uint32),
            "temperature_B": np.array([min(params.temperature, LARGEST)], np.float32),
            "top_k_B": np.array([min(params.top_k, vocab_size)], np.int32),
            "top_p_B": np.array([params.top_p], np.float32),
            "min_p_B": np.array([params.min_p], np.float32),
            "repetition_penalty_B": np.array([min(max(params.repetition_penalty, SMALLEST), LARGEST)], np.float32),
            "bias_BV": bias_BV,
            "seen_BV": seen_BV,
        }
        return cls(**fields)


def with_row(sampler: Sampler, slot: jax.Array | int, row: Sampler) -> Sampler:
    """The sampler with `row` (of `Sampler.row`) in place `slot`; both may be traced."""
    return jax.tree.map(lambda old, new: old.at[slot].set(new[0]), sampler, row)


def seen_along(seen_BV: jax.Array, token_Bn: jax.Array) -> jax.Array:
    """What has been seen before the first of n more tokens, and after each of them: [B, n + 1, V] bool."""
    hot_BnV = jax.nn.one_hot(token_Bn, seen_BV.shape[-1], dtype=bool)
    return jnp.logical_or.accumulate(jnp.concatenate([seen_BV[:, None], hot_BnV], axis=1), axis=1)


def distribution(logits_BTV: jax.Array, sampler: Sampler, seen_BTV: jax.Array) -> jax.Array:
    """The probabilities that a token is drawn with: [B, T, V] float32.

    In the order of Hugging Face's `generate`: the bias is added; the logits of seen tokens are divided by the repetition
    penalty if positive, else multiplied (Keskar et al., arXiv 1909.05858); temperature; top-k; top-p of what is left; min-p.
    (vLLM puts min-p before top-k.) Where equals compete for the last place of top-k or top-p, lower ids come first. At
    temperature 0 all is on the most likely token after bias and penalty, the lowest id of equals.

    Args:
      logits_BTV: logits of any float dtype.
      sampler: parameters of each row; what it has seen is not read.
      seen_BTV: the tokens before each position, bool (`seen_along`).
    """
    logits_BTV = _with_bias_and_penalty(logits_BTV.astype(jnp.float32), sampler, seen_BTV)
    # Any lower, and 0 / temperature may be 0 / 0; all but the largest logit would be out of reach anyway.
    drawn_B = sampler.temperature_B >= SMALLEST
    one_hot_BTV = jax.nn.one_hot(jnp.argmax(logits_BTV, axis=-1), logits_BTV.shape[-1])

    def drawn() -> jax.Array:
        temperature_B = jnp.where(drawn_B, sampler.temperature_B, 1)
        # From the largest down, so that the smallest temperature gives -inf and never inf - inf.
        scaled_BTV = (logits_BTV - logits_BTV.max(-1, keepdims=True)) / temperature_B[:, None, None]
        sorts_B = (sampler.top_k_B > 0) | (sampler.top_p_B < 1)
        kept_BTV = jax.lax.cond(
            jnp.any(drawn_B & sorts_B),
            lambda: _most_likely(scaled_BTV, sampler.top_k_B, sampler.top_p_B),
            lambda: jnp.ones(scaled_BTV.shape, bool),
        )
        # The largest is 0, so that this is the share of the largest probability.
        kept_BTV &= jnp.exp(scaled_BTV) >= sampler.min_p_B[:, None, None]
        probs_BTV = jax.nn.softmax(jnp.where(kept_BTV, scaled_BTV, -jnp.inf), axis=-1)
        return jnp.where(drawn_B[:, None, None], probs_BTV, one_hot_BTV)

    return jax.lax.cond(jnp.any(drawn_B), drawn, lambda: one_hot_BTV)


def _with_bias_and_penalty(logits_BTV: jax.Array, sampler: Sampler, seen_BTV: jax.Array) -> jax.Array:
    """Finite, whatever the bias and the penalty."""
    logits_BTV += sampler.bias_BV[:, None]
    penalty_B11 = sampler.repetition_penalty_B[:, None, None]
    penalised_BTV = jnp.where(logits_BTV > 0, logits_BTV / penalty_B11, logits_BTV * penalty_B11)
    return jnp.clip(jnp.where(seen_BTV, penalised_BTV, logits_BTV), -LARGEST, LARGEST)


def _most_likely(logits_BTV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Which tokens top-k, and top-p after it, leave: [B, T, V] bool."""
    vocab_size = logits_BTV.shape[-1]
    sorted_BTV = jnp.sort(logits_BTV, axis=-1, descending=True)
    k_B1 = jnp.where(top_k_B > 0, top_k_B, vocab_size)[:, None]
    left_BTV = jnp.where(jnp.arange(vocab_size) < k_B1[..., None], sorted_BTV, -jnp.inf)
    cumulated_BTV = jnp.cumsum(jax.nn.softmax(left_BTV, axis=-1), axis=-1)
    # A token stays if those before it do not reach top_p yet. Sums of float32 may reach 1 too early, so 1 is no bound at all.
    nucleus_BT = 1 + jnp.sum(cumulated_BTV < top_p_B[:, None, None], axis=-1)
    count_BT = jnp.minimum(k_B1, jnp.where(top_p_B[:, None] < 1, nucleus_BT, vocab_size))
    least_BT1 = jnp.take_along_axis(sorted_BTV, count_BT[..., None] - 1, axis=-1)
    above_BTV, level_BTV = logits_BTV > least_BT1, logits_BTV == least_BT1
    places_BT = count_BT - above_BTV.sum(-1)
    return above_BTV | (level_BTV & (jnp.cumsum(level_BTV, axis=-1) <= places_BT[..., None]))


class Stream(enum.IntEnum):
    """What a random number is for: each use has its own, or one would tell of another."""

    TARGET = 0
    """A token from the model's own distribution."""
    ACCEPT = 1
    """Whether a draft is accepted."""
    RESIDUAL = 2
    """A token in place of a rejected draft."""
    DRAFT = 3
    """A draft."""


def random_key(seed: jax.Array, position: jax.Array, stream: jax.Array | int) -> jax.Array:
    """The key of one random number: told by the seed, the token's place in its sequence and the use, and nothing else."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), stream)


def draw(probs_BV: jax.Array, seed_B: jax.Array, position_B: jax.Array, stream: jax.Array | int) -> jax.Array:
    """Draws one token a row: [B] int32. A row with a single possible token gives exactly that.

    Args:
      probs_BV: probabilities, which need not add up to 1.
      seed_B: uint32.
      place_B: place of the token in its sequence.
      stream: a `Stream`, or one a row.
    """

    def drawn() -> jax.Array:
        key_B = jax.vmap(random_key)(seed_B, position_B, jnp.broadcast_to(jnp.asarray(stream), seed_B.shape))
        return jax.vmap(jax.random.categorical)(key_B, jnp.log(probs_BV))

    # Greedy batches need none of the B V random numbers.
    is_certain = jnp.all(jnp.sum(probs_BV > 0, axis=-1) <= 1)
    return jax.lax.cond(is_certain, lambda: jnp.argmax(probs_BV, axis=-1), drawn).astype(jnp.int32)


# ----------------------------------------------------------------------------------------------------------------------
# Which drafts of speculative decoding stand, so that what comes out is distributed as if drawn token by token.


def rejection_sample(
    target_BTV: jax.Array, draft_probs_BnV: jax.Array, draft_Bn: jax.Array, seed_B: jax.Array, position_B: jax.Array
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
    accepted_Bn = is_accepted(p_Bn, q_Bn, _uniform(seed_B[:, None], position_B[:, None] + jnp.arange(n)))
    kept_B = jnp.sum(jnp.cumprod(accepted_Bn, axis=1), axis=1)

    at_B11 = kept_B[:, None, None]
    p_BV = jnp.take_along_axis(target_BTV, at_B11, axis=1)[:, 0]
    # Behind the last draft q is 0, and the residual is p itself.
    q_BV = jnp.take_along_axis(draft_probs_BnV, at_B11, axis=1, mode="fill", fill_value=0)[:, 0]
    stream_B = jnp.where(kept_B < n, Stream.RESIDUAL, Stream.TARGET)
    new_B = draw(residual(p_BV, q_BV), seed_B, position_B + kept_B, stream_B)
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
def _uniform(seed: jax.Array, position: jax.Array) -> jax.Array:
    return jax.random.uniform(random_key(seed, position, Stream.ACCEPT))


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
