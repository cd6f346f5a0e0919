"""Speculative acceptance: what comes out is distributed as the model says, and rules that are not quite it are found out.

Two made-up models over 8 tokens, each a table from the last two tokens to the next one's probabilities, stand for the model
and its drafter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from dsv3_jax.infer import sampling
from dsv3_jax.infer.sampling import Stream, draw, logprobs, rejection_sample

V, N, COUNT, NEW, ROWS = 8, 2, 20_000, 3, 500
PROMPT = (3, 5)
PLACE = len(PROMPT)


def tables(seed: int, scale: float) -> np.ndarray:
    """[before last, last, next]: softmax of random logits."""
    p = np.exp(scale * np.random.default_rng(seed).standard_normal((V, V, V)))
    return p / p.sum(-1, keepdims=True)


MODEL, DRAFTER = tables(0, 0.7), tables(1, 0.7)


@jax.jit
def step(text_BS: jax.Array, cached_length_B: jax.Array, draft_stream: Any) -> tuple[jax.Array, jax.Array]:
    """A speculative step of all sequences: their texts with the new tokens, and how many of those count."""
    model, drafter = np.asarray(MODEL, np.float32), np.asarray(DRAFTER, np.float32)
    seed_B, row_B1 = jnp.arange(COUNT, dtype=jnp.uint32), jnp.arange(COUNT)[:, None]
    before_B, last_B = (text_BS[row_B1[:, 0], cached_length_B - i] for i in (2, 1))
    target, drafts, probs = [jnp.asarray(model)[before_B, last_B]], [], []
    for i in range(N):
        probs.append(jnp.asarray(drafter)[before_B, last_B])
        drafts.append(draw(probs[-1], seed_B, cached_length_B + i, draft_stream))
        before_B, last_B = last_B, drafts[-1]
        target.append(jnp.asarray(model)[before_B, last_B])
    tokens_BT, count_B = rejection_sample(
        jnp.stack(target, 1), jnp.stack(probs, 1), jnp.stack(drafts, 1), seed_B, cached_length_B
    )
    # What a count leaves out is written too, and overwritten by the next step.
    return text_BS.at[row_B1, cached_length_B[:, None] + jnp.arange(N + 1)].set(tokens_BT), count_B


BIASED = "all drafts accepted", "a threshold in place of chance", "rejected drafts replaced by the model's draw"


@jax.jit
def biased_step(text_BS: jax.Array, cached_length_B: jax.Array, rule: Any) -> tuple[jax.Array, jax.Array]:
    """The same by one of the rules that are `BIASED`."""
    is_accepted, residual = sampling.is_accepted, sampling.residual

    def accepts(p: jax.Array, q: jax.Array, uniform: jax.Array) -> jax.Array:
        return jnp.select([rule == 0, rule == 1], [jnp.ones(p.shape, bool), p >= q], is_accepted(p, q, uniform))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "is_accepted", accepts)
        patch.setattr(sampling, "residual", lambda p, q: jnp.where(rule == 2, p, residual(p, q)))
        return step.__wrapped__(text_BS, cached_length_B, Stream.DRAFT)


def generated(step: Callable[..., tuple[jax.Array, jax.Array]], variant: int) -> tuple[np.ndarray, np.ndarray]:
    """The first 3 new tokens of 20,000 sequences, [B, 3], by speculative steps with 2 drafts each; and the tokens a step gave.

    As in an engine: whatever lies behind a rejection is thrown away, and drafted again at the same places, by the same
    random numbers.
    """
    text_BS = np.full((COUNT, PLACE + 2 * NEW + N), -1, np.int32)
    text_BS[:, :PLACE] = PROMPT
    cached_length_B, counts = np.full(COUNT, PLACE, np.int32), []
    for _ in range(NEW):
        text_BS, count_B = map(np.asarray, step(text_BS, cached_length_B, variant))
        # Sequences that have their tokens stay where they are.
        cached_length_B = np.where(cached_length_B < PLACE + NEW, cached_length_B + count_B, cached_length_B)
        counts.append(count_B)
    assert (cached_length_B >= PLACE + NEW).all()
    return text_BS[:, PLACE : PLACE + NEW], np.stack(counts, 1)


def p_value(tokens_BT: np.ndarray, p: np.ndarray) -> float:
    """Pearson's chi-square test of the tokens' joint distribution; cells where fewer than 5 are expected count as one."""
    counts = np.zeros(p.shape)
    np.add.at(counts, tuple(tokens_BT.T), 1)
    expected, counts = len(tokens_BT) * p.ravel(), counts.ravel()
    rare = expected < 5
    if rare.any():
        expected, counts = (np.append(x[~rare], x[rare].sum()) for x in (expected, counts))
    statistic = np.sum((counts - expected) ** 2 / expected)
    return float(scipy.special.chdtrc(len(expected) - 1, statistic))


def joint() -> np.ndarray:
    """The model's own distribution of 3 tokens behind the prompt: [V, V, V]."""
    first, second = MODEL[PROMPT], MODEL[PROMPT[1]]
    return first[:, None, None] * second[:, :, None] * MODEL


def test_generated_tokens_are_distributed_as_the_models_own() -> None:
    """All three together, and each count of tokens a step must occur for this to mean something."""
    tokens_BT, counts = generated(step, Stream.DRAFT)
    assert np.bincount(counts[:, 0], minlength=4)[1:].min() > 1000
    assert p_value(tokens_BT, joint()) > 1e-3
    assert p_value(tokens_BT[:, :2], joint().sum(-1)) > 1e-3
    assert p_value(tokens_BT[:, :1], joint().sum((1, 2))) > 1e-3


@pytest.mark.parametrize("rule", range(3), ids=BIASED)
def test_the_chi_square_test_finds_biased_rules_out(rule: int) -> None:
    assert p_value(generated(biased_step, rule)[0], joint()) < 1e-6


@pytest.mark.parametrize("stream", [Stream.ACCEPT, Stream.RESIDUAL], ids=lambda stream: stream.name)
def test_drafts_that_share_random_numbers_with_what_judges_or_replaces_them_are_found_out(stream: Stream) -> None:
    assert p_value(generated(step, stream)[0], joint()) < 1e-6


verified, drawn = jax.jit(rejection_sample), jax.jit(draw)


def random_step(rows: int, seed: int) -> tuple[np.ndarray, ...]:
    """Arguments of `rejection_sample`: distributions, drafts, seeds and places that differ from row to row."""
    rng = np.random.default_rng(seed)
    target_BTV = rng.dirichlet(np.ones(V), (rows, N + 1)).astype(np.float32)
    draft_BnV = rng.dirichlet(np.ones(V), (rows, N)).astype(np.float32)
    draft_Bn = rng.integers(0, V, (rows, N)).astype(np.int32)
    return target_BTV, draft_BnV, draft_Bn, rng.integers(0, 2**32, rows, np.uint32), rng.integers(0, 100, rows, np.int32)


def test_a_row_does_not_depend_on_the_others() -> None:
    arguments = random_step(ROWS, 0)
    tokens_BT, count_B = verified(*arguments)
    chex.assert_shape(tokens_BT, (ROWS, N + 1))
    chex.assert_type([tokens_BT, count_B], jnp.int32)
    assert set(np.asarray(count_B).tolist()) == {1, 2, 3}
    order = np.random.default_rng(1).permutation(ROWS)[:7]
    few_BT, few_count_B = verified(*(argument[order] for argument in arguments))
    np.testing.assert_array_equal(few_count_B, count_B[order])
    for found, expected, count in zip(few_BT, tokens_BT[order], few_count_B, strict=True):
        np.testing.assert_array_equal(found[:count], expected[:count])


def test_accepted_drafts_come_first_and_a_sure_draft_is_always_accepted() -> None:
    target_BTV, _, draft_Bn, seed_B, position_B = random_step(ROWS, 2)
    tokens_BT, count_B = map(np.asarray, verified(target_BTV, target_BTV[:, :N], draft_Bn, seed_B, position_B))
    np.testing.assert_array_equal(count_B, N + 1)
    np.testing.assert_array_equal(tokens_BT[:, :N], draft_Bn)
    np.testing.assert_array_equal(tokens_BT[:, N], drawn(target_BTV[:, N], seed_B, position_B + N, Stream.TARGET))


@pytest.mark.parametrize("beside_drawn_ones", [False, True])
def test_greedy_rows_give_exactly_the_most_likely_tokens(beside_drawn_ones: bool) -> None:
    """One-hot distributions; drafts that agree for 0, 1 and 2 tokens."""
    rng = np.random.default_rng(3)
    best_BT, draft_Bn = rng.integers(0, V, (ROWS, N + 1)), rng.integers(0, V, (ROWS, N))
    draft_Bn = np.where(rng.random(draft_Bn.shape) < 0.6, best_BT[:, :N], draft_Bn).astype(np.int32)
    target_BTV, draft_BnV = (np.eye(V, dtype=np.float32)[tokens] for tokens in (best_BT, draft_Bn))
    if beside_drawn_ones:
        target_BTV[::2] = 1 / V
    seed_B = np.arange(ROWS, dtype=np.uint32)
    tokens_BT, count_B = map(np.asarray, verified(target_BTV, draft_BnV, draft_Bn, seed_B, np.arange(ROWS, dtype=np.int32)))
    agreeing_B = np.cumprod(draft_Bn == best_BT[:, :N], axis=1).sum(1)
    assert set(agreeing_B) == {0, 1, 2}
    for b in range(beside_drawn_ones, ROWS, 1 + beside_drawn_ones):
        assert count_B[b] == agreeing_B[b] + 1
        np.testing.assert_array_equal(tokens_BT[b, : count_B[b]], best_BT[b, : count_B[b]])


def test_a_one_hot_draft_of_a_drawn_row_is_accepted_as_often_as_the_model_says() -> None:
    """A draft by no chance, as from a lookup: q is 1 on it, and the rule is as good."""
    p_V = np.array([0.4, 0.1, 0.05, 0.2, 0.05, 0.1, 0.05, 0.05])
    target_BTV = np.tile(p_V.astype(np.float32), (COUNT, 2, 1))
    draft_Bn = np.full((COUNT, 1), 3)
    q_BnV = np.eye(V, dtype=np.float32)[draft_Bn]
    tokens_BT, count_B = map(
        np.asarray, verified(target_BTV, q_BnV, draft_Bn, np.arange(COUNT, dtype=np.uint32), draft_Bn[:, 0])
    )
    assert p_value(tokens_BT[:, :1], p_V) > 1e-3
    assert p_value(count_B[:, None] - 1, np.array([0.8, 0.2])) > 1e-3


def test_without_drafts_it_is_a_plain_draw() -> None:
    target_BTV, q_BnV, draft_Bn, seed_B, position_B = random_step(ROWS, 4)
    tokens_BT, count_B = verified(target_BTV[:, :1], q_BnV[:, :0], draft_Bn[:, :0], seed_B, position_B)
    np.testing.assert_array_equal(tokens_BT[:, 0], drawn(target_BTV[:, 0], seed_B, position_B, Stream.TARGET))
    np.testing.assert_array_equal(count_B, 1)


def test_a_residual_that_rounding_leaves_empty_is_the_models_distribution() -> None:
    """Exaggerated: a row of p that adds up to a half, and is nowhere above q."""
    q_V = np.array([0.5, 0.25, 0.125, 0.125, 0, 0, 0, 0], np.float32)
    q_BV = np.tile(q_V, (COUNT, 1))
    seed_B, position_B = np.arange(COUNT, dtype=np.uint32), np.zeros(COUNT, np.int32)
    draft_B = np.asarray(drawn(q_BV, seed_B, position_B, Stream.DRAFT))
    target_BTV = np.stack([q_BV / 2, q_BV], axis=1)
    tokens_BT, count_B = map(np.asarray, verified(target_BTV, q_BV[:, None], draft_B[:, None], seed_B, position_B))
    assert p_value(count_B[:, None] - 1, np.array([0.5, 0.5])) > 1e-3
    replaced = tokens_BT[count_B == 1, :1]
    assert replaced.max() < 4
    assert p_value(replaced, q_V[:4]) > 1e-3


@pytest.mark.parametrize("num", [0, 1, 5, V])
def test_logprobs_are_those_of_the_logits(num: int) -> None:
    rng = np.random.default_rng(5)
    logits_BTV = (10 * rng.standard_normal((4, 3, V))).astype(np.float32)
    tokens_BT = rng.integers(0, V, (4, 3))
    chosen_BT, top_BTk, id_BTk = jax.jit(logprobs, static_argnums=2)(logits_BTV, tokens_BT, num)
    wide = logits_BTV.astype(np.float64)
    expected_BTV = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    order = np.argsort(-expected_BTV, axis=-1)[..., :num]
    np.testing.assert_allclose(
        chosen_BT, np.take_along_axis(expected_BTV, tokens_BT[..., None], -1)[..., 0], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(top_BTk, np.take_along_axis(expected_BTV, order, -1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(id_BTk, order)
    assert chosen_BT.dtype == top_BTk.dtype == np.float32


def test_logprobs_of_bfloat16_logits_are_float32() -> None:
    logits_BTV = jnp.asarray(np.random.default_rng(6).standard_normal((1, 2, V)), jnp.bfloat16)
    chosen_BT, top_BTk, _ = logprobs(logits_BTV, jnp.zeros((1, 2), jnp.int32), V)
    chex.assert_type([chosen_BT, top_BTk], jnp.float32)
    np.testing.assert_allclose(np.exp(top_BTk).sum(-1), 1, rtol=1e-6)
