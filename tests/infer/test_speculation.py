"""Drafts of a trained model: how many stand. A drafter that is fed the wrong token, state or position would guess worse."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from dsv3_jax.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from dsv3_jax.infer import Engine, SamplingParams
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.model.losses import Batch
from dsv3_jax.train.state import state_of
from dsv3_jax.train.step import train_step
from tests.model.tiny import CONFIG, random_variables

V, LENGTH, STEPS = 16, 24, 150
RUN = Config(
    model=dataclasses.replace(
        CONFIG,
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=1,
        num_nextn_predict_layers=1,
        rms_norm_eps=1e-6,
        rope_scaling=None,
        eos_token_id=None,
    ),
    optimizer=OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=10),
    train=TrainConfig(steps=STEPS, batch_size=16, sequence_length=LENGTH, mtp_loss_weight=1.0),
)


def texts(rng: np.random.Generator, count: int) -> np.ndarray:
    """[count, LENGTH + 1]: sequences that go on by one of two orders of the tokens, each told by any two of its neighbours."""
    orders = np.stack([np.random.default_rng(seed).permutation(V) for seed in (0, 1)])
    order, token = orders[rng.integers(0, 2, count)], rng.integers(0, V, count)
    rows = []
    for _ in range(LENGTH + 1):
        rows.append(token)
        position = (order == token[:, None]).argmax(1)
        token = np.take_along_axis(order, ((position + 1) % V)[:, None], axis=1)[:, 0]
    return np.stack(rows, axis=1).astype(np.int32)


@pytest.fixture(scope="module")
def trained() -> tuple[ModelConfig, dict[str, Any]]:
    rng = np.random.default_rng(0)
    state = jax.jit(functools.partial(state_of, RUN))(random_variables(RUN.model))
    step = jax.jit(functools.partial(train_step, config=RUN), donate_argnums=0)
    for number in range(STEPS):
        rows = texts(rng, 16)[None]
        weights = np.ones((1, 16, LENGTH), np.float32)
        state, metrics, _ = step(state, Batch(rows[..., :-1], rows[..., 1:], weights, None), RUN.schedules.at(number))
    assert float(metrics["main_loss"]) < 0.5
    return RUN.model, state.variables


def test_most_drafts_of_a_trained_model_stand(trained: tuple[ModelConfig, dict[str, Any]]) -> None:
    """Of the two a step the first nearly always, the second more often than not; the tokens are the most likely ones."""
    config, variables = trained
    prompts = [row[:4].tolist() for row in texts(np.random.default_rng(1), 16)]
    engine = Engine(config, variables, max_length=64, chunk=16, drafts=2)
    requests = [engine.submit(prompt, SamplingParams(max_tokens=20)) for prompt in prompts]
    counts = []
    while not engine.idle:
        # A first token is prefill's, and the last ones may have been cut off.
        counts += [
            len(update.tokens)
            for update in engine.step()
            if len(update.request.tokens) > len(update.tokens) and update.request.finish_reason is None
        ]
    assert np.mean(np.array(counts) > 1) > 0.95
    assert np.mean(np.array(counts) > 2) > 0.5
    assert engine.step_tokens == 16 * 19
    whole = np.array([prompt + request.tokens for prompt, request in zip(prompts, requests, strict=True)], np.int32)
    best = np.asarray(jax.jit(DeepSeekV3(config).apply)(variables, whole).logits).argmax(-1)
    np.testing.assert_array_equal(best[:, 3:-1], whole[:, 4:])
    # A drafter that gives no numbers costs drafts, and no token.
    params = variables["params"] | {"mtp_0": jax.tree.map(lambda leaf: leaf * np.nan, variables["params"]["mtp_0"])}
    engine = Engine(config, variables | {"params": params}, max_length=64, chunk=16, drafts=2)
    completions = engine.generate(prompts, SamplingParams(max_tokens=20))
    assert [completion.tokens for completion in completions] == whole[:, 4:].tolist()
    drawn = SamplingParams(max_tokens=20, temperature=0.8, ignore_eos=True)
    assert all(0 <= token < V for completion in engine.generate(prompts, drawn) for token in completion.tokens)
    assert engine.step_tokens < 1.6 * engine.steps
