"""Sampling: parameters of a completion, the distribution of its next token, draws, and rejection sampling of drafts."""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dsv3_jax.config.checks import Bound, PositiveInt, Seed, check, check_fields

MOST_LOGPROBS = 20
# The largest float32, and the smallest normal one: 0 divided by it is 0, divided by a smaller number it may be NaN.
LARGEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)

_NumLogprobs = Annotated[int, Bound(lambda num: 0 <= num <= MOST_LOGPROBS, f"it must lie in 0..{MOST_LOGPROBS}, or be None")]


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters and end conditions of a completion."""

    max_tokens: PositiveInt = 64
    """Longest completion, in tokens."""
    temperature: Annotated[float, Bound(lambda value: value >= 0, "it cannot be negative (0 is greedy)")] = 0.0
    """Divides the logits; 0 takes the most likely token each time."""
    top_p: Annotated[float, Bound(lambda value: 0 < value <= 1, "it must lie in (0, 1] (1 keeps every token)")] = 1.0
    """Draw from the smallest set of most likely tokens that together have this probability."""
    seed: Seed = 0
    """Seed of the draws; the i-th prompt of one `Engine.generate` uses seed + i."""
    top_k: Annotated[int, Bound(lambda value: value >= 0, "it cannot be negative (0 keeps every token)")] = 0
    """Draw from this many most likely tokens; 0 is all of them."""
    min_p: Annotated[float, Bound(lambda value: 0 <= value <= 1, "it must lie in [0, 1] (0 keeps every token)")] = 0.0
    """Draw from the tokens with at least this share of the most likely one's probability."""
    repetition_penalty: Annotated[float, Bound(lambda value: value > 0, "it must be above 0 (1 changes nothing)")] = 1.0
    """Above 1 makes tokens of the prompt and the completion so far less likely, below 1 more likely."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Token id -> number added to its logit."""
    logprobs: _NumLogprobs | None = None
    """Number of most likely tokens to report with log-probabilities, in addition to the chosen one; None reports nothing."""
    stop: tuple[str, ...] = ()
    """Texts that end the completion, whose text stops before them; a single string is accepted."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the completion, in addition to the model's end-of-text tokens."""
    ignore_eos: bool = False
    """Continue after an end-of-text token of the model; `stop` and `stop_token_ids` still end."""

    def __post_init__(self) -> None:
        check_fields(self)
        # Copies of the collections, which a caller may go on to change.
        object.__setattr__(self, "stop", _stop_texts(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    def ending_at(self, tokens: tuple[int, ...]) -> SamplingParams:
        """Return a copy with `tokens` added to `stop_token_ids`; the same parameters if `ignore_eos`."""
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
    check(isinstance(biases, Mapping), f"logit_bias is {biases!r}; use a dict from token id to the number its logit gains")
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
    """Sampling state on the device: parameters and seen tokens, one row a sequence. Real numbers are float32."""

    seed_B: jax.Array
    """uint32; seed and position determine a draw, independently of the rest of the batch."""
    temperature_B: jax.Array
    top_k_B: jax.Array
    """int32; 0 keeps every token."""
    top_p_B: jax.Array
    min_p_B: jax.Array
    repetition_penalty_B: jax.Array
    bias_BV: jax.Array
    seen_BV: jax.Array
    """bool: the tokens of the prompt and the completion so far."""

    @classmethod
    def empty(cls, slots: int, vocab_size: int) -> Sampler:
        """Return a sampler of `slots` greedy rows with no seen tokens."""
        row = cls.row(SamplingParams(), (), vocab_size)
        return jax.tree.map(lambda leaf: jnp.asarray(np.repeat(leaf, slots, axis=0)), row)

    @classmethod
    def row(cls, params: SamplingParams, text: Sequence[int] | np.ndarray, vocab_size: int) -> Sampler:
        """Return the row of one sequence, in NumPy, with numbers clipped to the range of float32.

        `text` is the prompt and the completion so far. Raises ValueError for a token of `logit_bias` outside the vocabulary.
        """
        bias_BV = np.zeros((1, vocab_size), np.float32)
        for token, bias in params.logit_bias.items():
            check(token < vocab_size, f"logit_bias has the token {token}; the vocabulary ends at {vocab_size - 1}")
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
    """Return the sampler with its row `slot` replaced by `row` (of `Sampler.row`); both may be traced."""
    return jax.tree.map(lambda old, new: old.at[slot].set(new[0]), sampler, row)


def seen_along(seen_BV: jax.Array, token_Bn: jax.Array) -> jax.Array:
    """Return the tokens seen before the first of n further tokens and after each of them: [B, n + 1, V] bool."""
    hot_BnV = jax.nn.one_hot(token_Bn, seen_BV.shape[-1], dtype=bool)
    return jnp.logical_or.accumulate(jnp.concatenate([seen_BV[:, None], hot_BnV], axis=1), axis=1)


def distribution(logits_BTV: jax.Array, sampler: Sampler, seen_BTV: jax.Array) -> jax.Array:
    """Return the probabilities that the next token is drawn from: [B, T, V] float32.

    The transforms, in the order of Hugging Face's `generate`: add the bias; divide the logits of seen tokens by the repetition
    penalty if positive, else multiply (Keskar et al., arXiv 1909.05858); temperature; top-k; top-p of the remaining tokens;
    min-p (vLLM applies min-p before top-k). Ties at the bounds of top-k and top-p go to the lower ids. At temperature 0 the
    most likely token after bias and penalty, of ties the lowest id, has probability 1.

    Args:
      logits_BTV: of any float dtype.
      sampler: parameters of each row; its seen tokens are not read.
      seen_BTV: the tokens before each position, bool (`seen_along`).
    """
    logits_BTV = _with_bias_and_penalty(logits_BTV.astype(jnp.float32), sampler, seen_BTV)
    # A lower temperature could make 0 / 0, and is greedy anyway.
    drawn_B = sampler.temperature_B >= SMALLEST
    one_hot_BTV = jax.nn.one_hot(jnp.argmax(logits_BTV, axis=-1), logits_BTV.shape[-1])

    def drawn() -> jax.Array:
        temperature_B = jnp.where(drawn_B, sampler.temperature_B, 1)
        # Relative to the largest logit, so that the smallest temperature gives -inf and never inf - inf.
        scaled_BTV = (logits_BTV - logits_BTV.max(-1, keepdims=True)) / temperature_B[:, None, None]
        sorts_B = (sampler.top_k_B > 0) | (sampler.top_p_B < 1)
        kept_BTV = jax.lax.cond(
            jnp.any(drawn_B & sorts_B),
            lambda: _most_likely(scaled_BTV, sampler.top_k_B, sampler.top_p_B),
            lambda: jnp.ones(scaled_BTV.shape, bool),
        )
        # The largest scaled logit is 0, so this exponential is the share of the largest probability.
        kept_BTV &= jnp.exp(scaled_BTV) >= sampler.min_p_B[:, None, None]
        probs_BTV = jax.nn.softmax(jnp.where(kept_BTV, scaled_BTV, -jnp.inf), axis=-1)
        return jnp.where(drawn_B[:, None, None], probs_BTV, one_hot_BTV)

    return jax.lax.cond(jnp.any(drawn_B), drawn, lambda: one_hot_BTV)


def _with_bias_and_penalty(logits_BTV: jax.Array, sampler: Sampler, seen_BTV: jax.Array) -> jax.Array:
    """Return logits + bias; those of seen tokens then divided by the repetition penalty, if negative multiplied; finite."""
    logits_BTV += sampler.bias_BV[:, None]
    penalty_B11 = sampler.repetition_penalty_B[:, None, None]
    penalised_BTV = jnp.where(logits_BTV > 0, logits_BTV / penalty_B11, logits_BTV * penalty_B11)
    return jnp.clip(jnp.where(seen_BTV, penalised_BTV, logits_BTV), -LARGEST, LARGEST)


def _most_likely(logits_BTV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Return a mask of the tokens that top-k, and then top-p, keep: [B, T, V] bool."""
    vocab_size = logits_BTV.shape[-1]
    sorted_BTV = jnp.sort(logits_BTV, axis=-1, descending=True)
    k_B1 = jnp.where(top_k_B > 0, top_k_B, vocab_size)[:, None]
    left_BTV = jnp.where(jnp.arange(vocab_size) < k_B1[..., None], sorted_BTV, -jnp.inf)
    cumulated_BTV = jnp.cumsum(jax.nn.softmax(left_BTV, axis=-1), axis=-1)
    # Keep a token if those before it have less than top_p. Sums in float32 may reach 1 too early, so 1 disables the bound.
    nucleus_BT = 1 + jnp.sum(cumulated_BTV < top_p_B[:, None, None], axis=-1)
    count_BT = jnp.minimum(k_B1, jnp.where(top_p_B[:, None] < 1, nucleus_BT, vocab_size))
    least_BT1 = jnp.take_along_axis(sorted_BTV, count_BT[..., None] - 1, axis=-1)
    above_BTV, tied_BTV = logits_BTV > least_BT1, logits_BTV == least_BT1
    num_tied_BT = count_BT - above_BTV.sum(-1)
    return above_BTV | (tied_BTV & (jnp.cumsum(tied_BTV, axis=-1) <= num_tied_BT[..., None]))


class Stream(enum.IntEnum):
    """Uses of random numbers. Each has a stream of its own, so that they are independent."""

    TARGET = 0
    """Draw of a token from the model's own distribution."""
    ACCEPT = 1
    """Acceptance of a draft."""
    RESIDUAL = 2
    """Draw of the token that replaces a rejected draft."""
    DRAFT = 3
    """Draw of a draft."""


def random_key(seed: jax.Array, position: jax.Array, stream: jax.Array | int) -> jax.Array:
    """Return the key of one random number, a function of the seed, the token's position and the stream only."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), stream)


def draw(probs_BV: jax.Array, seed_B: jax.Array, position_B: jax.Array, stream: jax.Array | int) -> jax.Array:
    """Draw one token a row, int32 [B], for its position in the sequence. Probabilities need not be normalised.

    A row with a single possible token yields exactly that one. `stream` is a `Stream`, or one for each row.
    """

    def drawn() -> jax.Array:
        key_B = jax.vmap(random_key)(seed_B, position_B, jnp.broadcast_to(jnp.asarray(stream), seed_B.shape))
        return jax.vmap(jax.random.categorical)(key_B, jnp.log(probs_BV))

    # Greedy batches skip the B V random numbers.
    is_certain = jnp.all(jnp.sum(probs_BV > 0, axis=-1) <= 1)
    return jax.lax.cond(is_certain, lambda: jnp.argmax(probs_BV, axis=-1), drawn).astype(jnp.int32)


# ----------------------------------------------------------------------------------------------------------------------
# Rejection sampling of drafts (speculative decoding): the tokens are distributed as if drawn one by one from the model.


def rejection_sample(
    target_BTV: jax.Array, draft_probs_BnV: jax.Array, draft_Bn: jax.Array, seed_B: jax.Array, position_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Accept or reject n drafts; return new tokens, int32 [B, T] with T = n + 1, and their valid number, int32 [B] in 1..T.

    The accepted drafts come first, then one token drawn here; later entries are undefined. Without drafts it is a plain draw.
    One-hot distributions, those of greedy sequences, accept exactly the drafts that are the most likely tokens.

    Args:
      target_BTV: float32 probabilities of the model; row i is for the token after i accepted drafts.
      draft_probs_BnV: the probabilities that the drafts were drawn from.
      draft_Bn: the drafts, drawn with `Stream.DRAFT` or deterministic.
      seed_B: uint32 seeds of the sequences.
      position_B: position of the first new token in its sequence.
    """
    n = draft_Bn.shape[1]
    p_Bn = jnp.take_along_axis(target_BTV[:, :n], draft_Bn[..., None], axis=-1)[..., 0]
    q_Bn = jnp.take_along_axis(draft_probs_BnV, draft_Bn[..., None], axis=-1)[..., 0]
    accepted_Bn = is_accepted(p_Bn, q_Bn, _uniform(seed_B[:, None], position_B[:, None] + jnp.arange(n)))
    kept_B = jnp.sum(jnp.cumprod(accepted_Bn, axis=1), axis=1)

    at_B11 = kept_B[:, None, None]
    p_BV = jnp.take_along_axis(target_BTV, at_B11, axis=1)[:, 0]
    # After the last draft q is 0, and the residual is p itself.
    q_BV = jnp.take_along_axis(draft_probs_BnV, at_B11, axis=1, mode="fill", fill_value=0)[:, 0]
    stream_B = jnp.where(kept_B < n, Stream.RESIDUAL, Stream.TARGET)
    new_B = draw(residual(p_BV, q_BV), seed_B, position_B + kept_B, stream_B)
    draft_BT = jnp.pad(draft_Bn, ((0, 0), (0, 1)))
    tokens_BT = jnp.where(jnp.arange(n + 1) < kept_B[:, None], draft_BT, new_B[:, None])
    return tokens_BT.astype(jnp.int32), (kept_B + 1).astype(jnp.int32)


def is_accepted(p: jax.Array, q: jax.Array, uniform: jax.Array) -> jax.Array:
    """Return uniform * q < p elementwise: True with probability min(1, p / q) if `uniform` is drawn from [0, 1)."""
    return uniform * q < p


def residual(p_BV: jax.Array, q_BV: jax.Array) -> jax.Array:
    """Return max(p - q, 0), normalised, which replaces a rejected draft; p if rounding leaves nothing."""
    excess_BV = jnp.maximum(p_BV - q_BV, 0)
    total_B1 = excess_BV.sum(-1, keepdims=True)
    return jnp.where(total_B1 > 0, excess_BV / jnp.where(total_B1 > 0, total_B1, 1), p_BV)


@jnp.vectorize
def _uniform(seed: jax.Array, position: jax.Array) -> jax.Array:
    return jax.random.uniform(random_key(seed, position, Stream.ACCEPT))


def logprobs(logits_BTV: jax.Array, tokens_BT: jax.Array, num: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return log-softmax values of `tokens_BT` [B, T]; the `num` largest ones [B, T, num], descending; and their token ids."""
    logprobs_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)
    chosen_BT = jnp.take_along_axis(logprobs_BTV, tokens_BT[..., None], axis=-1)[..., 0]
    return chosen_BT, *jax.lax.top_k(logprobs_BTV, num)
