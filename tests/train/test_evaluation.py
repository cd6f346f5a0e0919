"""The Evaluator against log-probabilities taken one by one, and bits per byte."""

from __future__ import annotations

import dataclasses
import math

import chex
import jax
import numpy as np
import pytest

from dsv3_jax.data import Document, HeldoutBatch, HeldoutWindows
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.train.evaluation import Evaluation, Evaluator
from tests.model.tiny import DENSE_ONLY, random_tokens, random_variables

B, T = 3, 16
CONFIG = DENSE_ONLY  # compiles fast


def batches(count: int) -> list[HeldoutBatch]:
    """Random windows with random tokens unscored, the last window all padding."""
    rng = np.random.default_rng(0)
    made = []
    for seed in range(count):
        tokens_BX = random_tokens(B, T + 1, seed=seed)
        weights_BT = rng.integers(0, 2, (B, T)).astype(np.float32)
        made.append(HeldoutBatch(tokens_BX[:, :-1], tokens_BX[:, 1:], weights_BT))
    made[-1].weights_BT[-1] = 0
    return made


def test_nats_and_tokens_are_those_of_every_scored_token() -> None:
    variables, scored = random_variables(CONFIG), batches(3)
    model = jax.jit(DeepSeekV3(CONFIG).apply)
    nats, count = 0.0, 0
    for tokens_BT, targets_BT, weights_BT in scored:
        logits_BTV = np.asarray(model(variables, tokens_BT).logits, np.float64)
        for b, t in zip(*np.nonzero(weights_BT), strict=True):
            row_V = logits_BTV[b, t]
            nats -= row_V[targets_BT[b, t]] - math.log(np.exp(row_V).sum())
            count += 1
    evaluator = Evaluator(CONFIG)
    evaluation = evaluator(variables, scored)
    assert evaluation.tokens == count
    assert evaluation.nats == pytest.approx(nats, rel=1e-5)
    assert evaluation.loss == pytest.approx(nats / count, rel=1e-5)
    assert evaluator._loss._cache_size() == 1
    # Batches add up, whatever feeds them.
    parts = [evaluator(variables, iter([batch])) for batch in scored]
    assert evaluation.nats == pytest.approx(math.fsum(part.nats for part in parts))
    assert evaluation.tokens == sum(part.tokens for part in parts)


def test_sums_keep_their_digits_over_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, 2^24 + 1 is 2^24."""
    evaluator = Evaluator(CONFIG)
    monkeypatch.setattr(evaluator, "_loss", lambda variables, tokens, targets, weights: np.float32(tokens[0, 0]))
    ones = np.ones((1, 1), np.float32)
    parts = [HeldoutBatch(np.full((1, 1), nats), np.zeros((1, 1), np.int32), ones) for nats in (2**24, 1, 1)]
    assert evaluator({}, parts) == Evaluation(2**24 + 2, 3)


def test_bits_per_byte_of_a_text() -> None:
    """Over windows of a text, and once over its whole stream of tokens in one go."""
    text = "for x in range(3):\n    print(x, 'ünï')\n" * 3
    tokenizer = train_tokenizer([text], 270, ["<bos>", "<eos>"])
    model = dataclasses.replace(CONFIG, vocab_size=300, max_position_embeddings=512)
    variables = random_variables(model)
    windows = HeldoutWindows([Document("a", text)], tokenizer, model, batch_size=1, sequence_length=512)
    evaluation = Evaluator(model)(variables, windows)

    ids = [1, 0, *tokenizer.encode(text)]
    chex.assert_axis_dimension_lt(np.array([ids]), 1, 512)
    logits_TV = np.asarray(jax.jit(DeepSeekV3(model).apply)(variables, np.array([ids[:-1]])).logits[0, 1:], np.float64)
    log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    bits = -log_p_TV[np.arange(len(ids) - 2), ids[2:]].sum() / math.log(2)
    assert evaluation.tokens == len(ids) - 2
    assert windows.bits_per_byte(evaluation.nats) == pytest.approx(bits / len(text.encode()), rel=1e-5)
    assert len(text.encode()) > len(text)
