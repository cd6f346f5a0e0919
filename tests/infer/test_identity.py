"""Greedy completions are the same tokens however they are computed: batches, chunks, pages, drafts, devices, shortage."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import MeshConfig
from dsv3_jax.infer import Completion, Engine, SamplingParams
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.rebalance import rebalance_experts
from tests.model.tiny import CONFIG, random_variables

MODEL = dataclasses.replace(
    CONFIG,
    num_hidden_layers=2,
    num_nextn_predict_layers=1,
    eos_token_id=None,
    max_position_embeddings=256,
    # Multiples of what meshes split them along.
    vocab_size=32,
    num_attention_heads=4,
    q_lora_rank=12,
    kv_lora_rank=16,
    moe_intermediate_size=8,
)
ONE_LAYER = dataclasses.replace(MODEL, num_hidden_layers=1, first_k_dense_replace=0)
LONGEST, NEW = 120, 24
PARAMS = SamplingParams(max_tokens=NEW)
# One set of programs for all tests that are neither slow nor nightly.
SHARED: dict[str, Any] = {"max_length": 160, "page_size": 16, "chunk": 16, "drafts": 1, "cache_tokens": 288}
CASES: dict[str, dict[str, Any]] = {
    "alone": {"max_batch": 1, "chunk": 256, "prefix_cache": False},
    "batch 8": {},
    "chunks of 16": {"chunk": 16},
    "chunks of 64 in pages of 16": {"chunk": 64, "page_size": 16},
    "contiguous": {"page_size": 263, "prefix_cache": False},
    "without prefix cache": {"page_size": 16, "prefix_cache": False},
    "1 draft": {"drafts": 1, "page_size": 16},
    "2 drafts": {"drafts": 2, "page_size": 16, "chunk": 32},
    "3 drafts": {"drafts": 3, "chunk": 64},
    "too few pages": {"page_size": 16, "cache_tokens": 400, "drafts": 2},
}
ON_MESHES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "expert 4 x tensor 2": ({"expert": 4, "tensor": 2}, {}),
    "expert 4 x tensor 2, 2 drafts": ({"expert": 4, "tensor": 2}, {"drafts": 2, "chunk": 32, "page_size": 16}),
    "data 2 x expert 2 x tensor 2, 1 draft": ({"data": 2, "expert": 2, "tensor": 2}, {"drafts": 1, "page_size": 16}),
}


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    return jax.tree.map(jnp.asarray, random_variables(MODEL))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """64 of mixed length; every fourth begins like the one before it."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, MODEL.vocab_size, int(length)).tolist() for length in rng.integers(1, LONGEST, 64)]
    for i in range(3, 64, 4):
        prompts[i] = (prompts[i - 1] + prompts[i])[:LONGEST]
    return prompts


@functools.cache
def most_likely() -> Callable[..., jax.Array]:
    """(variables, texts) -> the most likely token after each, by the forward pass of training."""
    return jax.jit(lambda variables, texts: jnp.argmax(DeepSeekV3(MODEL).apply(variables, texts).logits, axis=-1))


def assert_most_likely(variables: dict[str, Any], prompts: list[list[int]], found: list[list[int]]) -> None:
    """Each token is the most likely one after all before it."""
    texts = np.zeros((64, LONGEST + NEW), np.int32)
    for row, prompt, tokens in zip(texts, prompts, found, strict=False):
        row[: len(prompt) + NEW] = prompt + tokens
    best = np.asarray(most_likely()(variables, texts))
    for i, (prompt, tokens) in enumerate(zip(prompts, found, strict=True)):
        assert best[i, len(prompt) - 1 : len(prompt) + NEW - 1].tolist() == tokens
    assert len({tuple(tokens) for tokens in found}) > 0.7 * len(prompts)


def complete(variables: dict[str, Any], prompts: list[list[int]], **options: Any) -> tuple[list[list[int]], Engine]:
    engine = Engine(MODEL, variables, **{"max_batch": 8, "max_length": 256} | options)
    return [completion.tokens for completion in engine.generate(prompts, PARAMS)], engine


def test_batch_chunks_pages_prefixes_and_drafts_change_nothing(variables: dict[str, Any], prompts: list[list[int]]) -> None:
    """All at once, and too few pages; `test_every_way` takes them one by one."""
    found, engine = complete(variables, prompts[:24], **SHARED)
    assert_most_likely(variables, prompts[:24], found)
    assert engine.counts["preemptions"] > 0
    assert engine.steps < engine.step_tokens, "no draft was ever accepted"


@pytest.mark.nightly
@pytest.mark.parametrize("case", CASES)
def test_every_way(variables: dict[str, Any], prompts: list[list[int]], case: str) -> None:
    found, engine = complete(variables, prompts, **CASES[case])
    assert_most_likely(variables, prompts, found)
    assert (engine.counts["preemptions"] > 0) == (case == "too few pages")


@pytest.mark.nightly
@pytest.mark.parametrize("case", ON_MESHES)
def test_on_meshes(variables: dict[str, Any], prompts: list[list[int]], case: str) -> None:
    sizes, options = ON_MESHES[case]
    found, _ = complete(variables, prompts, mesh=make_mesh(MeshConfig(**sizes)), **options)
    assert_most_likely(variables, prompts, found)


@pytest.mark.slow
def test_a_mesh_and_redundant_experts_change_nothing(variables: dict[str, Any], prompts: list[list[int]]) -> None:
    """Every axis split, and four more copies of experts in demand, others for the layer than for the drafting depth."""
    counts = np.random.default_rng(2).lognormal(0, 2, (2, MODEL.n_routed_experts))
    slots = rebalance_experts(counts, num_shards=2, slots_per_shard=6)
    placement = {"moe_layers": slots[:1], "mtp_0": slots[1]}
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    found, _ = complete(variables, prompts[:8], **SHARED | {"cache_tokens": None}, mesh=mesh, placement=placement)
    assert_most_likely(variables, prompts[:8], found)


def test_a_prefix_is_computed_once(variables: dict[str, Any]) -> None:
    """A prompt that begins like one before it, even while that one still runs, takes its pages; the tokens stay the same."""
    rng = np.random.default_rng(1)
    shared = rng.integers(0, MODEL.vocab_size, 100).tolist()
    prompts = [[*shared, *rng.integers(0, MODEL.vocab_size, 5).tolist()] for _ in range(4)]
    engine = Engine(MODEL, variables, **SHARED)
    requests = [engine.submit(prompt, PARAMS) for prompt in prompts]
    reused = [0] * 4
    while not engine.idle:
        engine.step()
        reused = [max(*pair) for pair in zip(reused, (request.sequence.reused for request in requests), strict=True)]
    assert reused == [0, 96, 96, 96]
    assert_most_likely(variables, prompts, [request.tokens for request in requests])


@pytest.mark.parametrize(
    ("drafts", "count"),
    [
        pytest.param(0, 4000, marks=pytest.mark.nightly),
        pytest.param(1, 1500, marks=pytest.mark.slow),
        pytest.param(1, 4000, marks=pytest.mark.nightly),
        pytest.param(2, 4000, marks=pytest.mark.nightly),
    ],
)
def test_sampled_tokens_have_the_models_distribution(drafts: int, count: int) -> None:
    """The first two tokens of many completions, by chi-squared over the pairs, against the whole model's probabilities."""
    variables, prompt, V = random_variables(ONE_LAYER), [3, 7, 1], ONE_LAYER.vocab_size
    params = SamplingParams(max_tokens=3, temperature=0.6, top_k=4, seed=1)
    engine = Engine(ONE_LAYER, variables, max_batch=128, max_length=64, drafts=drafts)
    seen = np.zeros((V, V))
    for completion in engine.generate([prompt] * count, params):
        seen[tuple(completion.tokens[:2])] += 1
    texts = np.array([[*prompt, i] for i in range(V)], np.int32)
    logits_BTV = np.asarray(jax.jit(DeepSeekV3(ONE_LAYER).apply)(variables, texts).logits, np.float64) / 0.6
    kept_BTV = np.where(logits_BTV >= np.sort(logits_BTV, axis=-1)[..., -4, None], logits_BTV, -np.inf)
    exponentials_BTV = np.exp(kept_BTV - kept_BTV.max(-1, keepdims=True))
    probs_BTV = exponentials_BTV / exponentials_BTV.sum(-1, keepdims=True)
    expected = count * probs_BTV[0, len(prompt) - 1][:, None] * probs_BTV[:, len(prompt)]
    assert seen[expected == 0].sum() == 0
    likely = expected >= 5
    rest = seen[~likely].sum(), expected[~likely].sum()
    statistic = ((seen - expected)[likely] ** 2 / expected[likely]).sum() + (rest[0] - rest[1]) ** 2 / max(rest[1], 1)
    # The upper 1e-4 of chi-squared, by the approximation of Wilson and Hilferty.
    k = likely.sum()
    assert statistic < k * (1 - 2 / (9 * k) + 3.719 * (2 / (9 * k)) ** 0.5) ** 3
    assert k > 8


def test_a_completion_does_not_depend_on_what_shares_its_batch(variables: dict[str, Any], prompts: list[list[int]]) -> None:
    """Drawn ones either, with other parameters in every row."""
    engine = Engine(MODEL, variables, **SHARED)
    params = [
        SamplingParams(10, temperature=0.8, seed=i, top_p=0.9 if i % 2 else 1.0, repetition_penalty=1 + i / 10)
        for i in range(6)
    ]
    together = list(engine.generate(prompts[:6], params))
    fresh = Engine(MODEL, variables, **SHARED)
    for prompt, param, completion in zip(prompts[:6], params, together, strict=True):
        assert next(fresh.generate([prompt], [param])) == completion
    assert isinstance(together[0], Completion)
