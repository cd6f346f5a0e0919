"""Greedy completions are the same tokens however they are computed: batches, chunks, pages, drafts, devices, shortage."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import MeshConfig
from dsv3_jax.infer import Completion, Engine, SamplingParams
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.redundancy import place_copies
from tests.model.tiny import CONFIG, random_variables

MODEL = dataclasses.replace(
    CONFIG,
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
LONGEST, NEW = 120, 24
PARAMS = SamplingParams(max_tokens=NEW)
CASES: dict[str, dict[str, Any]] = {
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
# Between them these have what the others have, one thing at a time.
SLOW = "chunks of 64 in pages of 16", "too few pages", "data 2 x expert 2 x tensor 2, 1 draft"


def slow_or_nightly(cases: dict[str, Any]) -> list[Any]:
    return [pytest.param(case, marks=pytest.mark.slow if case in SLOW else pytest.mark.nightly) for case in cases]


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


@pytest.fixture(scope="module")
def alone(variables: dict[str, Any], prompts: list[list[int]]) -> list[list[int]]:
    """One at a time, whole, in an engine that shares nothing."""
    engine = Engine(MODEL, variables, max_batch=1, max_length=256, chunk=256, prefix_cache=False)
    return [completion.tokens for completion in engine.generate(prompts, PARAMS)]


def complete(variables: dict[str, Any], prompts: list[list[int]], **options: Any) -> tuple[list[list[int]], Engine]:
    engine = Engine(MODEL, variables, max_batch=8, **{"max_length": 256} | options)
    return [completion.tokens for completion in engine.generate(prompts, PARAMS)], engine


def test_they_are_those_of_the_model_over_the_whole_text(
    variables: dict[str, Any], prompts: list[list[int]], alone: list[list[int]]
) -> None:
    """Each token is the most likely one after all before it, by the forward pass of training."""
    texts = np.zeros((64, LONGEST + NEW), np.int32)
    for row, prompt, tokens in zip(texts, prompts, alone, strict=True):
        row[: len(prompt) + NEW] = prompt + tokens
    logits = jax.jit(DeepSeekV3(MODEL).apply)(variables, texts).logits
    best = np.asarray(jnp.argmax(logits, axis=-1))
    for i, prompt in enumerate(prompts):
        assert best[i, len(prompt) - 1 : len(prompt) + NEW - 1].tolist() == alone[i]
    assert len({tuple(tokens) for tokens in alone}) > 50


def test_batch_chunks_pages_prefixes_and_drafts_change_nothing(
    variables: dict[str, Any], prompts: list[list[int]], alone: list[list[int]]
) -> None:
    """All at once, over some of the prompts; `test_every_way` takes them one by one."""
    found, engine = complete(variables, prompts[:8], drafts=2, page_size=16, chunk=32, max_length=160, cache_tokens=192)
    assert found == alone[:8]
    assert engine.counts["preemptions"] > 0
    assert engine.steps < engine.step_tokens, "no draft was ever accepted"


@pytest.mark.parametrize("case", slow_or_nightly(CASES))
def test_every_way(variables: dict[str, Any], prompts: list[list[int]], alone: list[list[int]], case: str) -> None:
    found, engine = complete(variables, prompts, **CASES[case])
    assert found == alone
    assert (engine.counts["preemptions"] > 0) == (case == "too few pages")


@pytest.mark.parametrize("case", slow_or_nightly(ON_MESHES))
def test_on_meshes(variables: dict[str, Any], prompts: list[list[int]], alone: list[list[int]], case: str) -> None:
    sizes, options = ON_MESHES[case]
    found, _ = complete(variables, prompts, mesh=make_mesh(MeshConfig(**sizes)), **options)
    assert found == alone


@pytest.mark.slow
def test_redundant_experts_change_nothing(variables: dict[str, Any], prompts: list[list[int]], alone: list[list[int]]) -> None:
    """Four more copies of experts in demand, others for each layer, the drafting depth's too."""
    counts = np.random.default_rng(2).lognormal(0, 2, (3, MODEL.n_routed_experts))
    slots = place_copies(counts, num_shards=4, slots_per_shard=3)
    placement = {"moe_layers": slots[:2], "mtp_0": slots[2]}
    mesh = make_mesh(MeshConfig(expert=4, tensor=2))
    found, _ = complete(variables, prompts[:16], mesh=mesh, drafts=1, placement=placement)
    assert found == alone[:16]


def test_a_prefix_is_computed_once(variables: dict[str, Any]) -> None:
    """A prompt that begins like one before it, even while that one still runs, takes its pages; the tokens stay the same."""
    rng = np.random.default_rng(1)
    shared = rng.integers(0, MODEL.vocab_size, 100).tolist()
    prompts = [[*shared, *rng.integers(0, MODEL.vocab_size, 5).tolist()] for _ in range(4)]
    engine = Engine(MODEL, variables, max_batch=4, max_length=256, page_size=16, drafts=1)
    requests = [engine.submit(prompt, PARAMS) for prompt in prompts]
    reused = [0] * 4
    while not engine.idle:
        engine.step()
        reused = [max(*pair) for pair in zip(reused, (request.sequence.reused for request in requests), strict=True)]
    assert reused == [0, 96, 96, 96]
    without = Engine(MODEL, variables, max_batch=4, max_length=256, page_size=16, drafts=1, prefix_cache=False)
    assert list(without.generate(prompts, PARAMS)) == [request.completion for request in requests]


@pytest.mark.parametrize(
    "drafts",
    [
        pytest.param(0, marks=pytest.mark.nightly),
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(2, marks=pytest.mark.nightly),
    ],
)
def test_sampled_tokens_have_the_models_distribution(variables: dict[str, Any], drafts: int) -> None:
    """The first two tokens of 4,000 completions, by chi-squared over the pairs, against the whole model's probabilities."""
    prompt, count, V = [3, 7, 1], 4000, MODEL.vocab_size
    params = SamplingParams(max_tokens=3, temperature=0.6, top_k=4, seed=1)
    engine = Engine(MODEL, variables, max_batch=128, max_length=64, drafts=drafts)
    seen = np.zeros((V, V))
    for completion in engine.generate([prompt] * count, params):
        seen[tuple(completion.tokens[:2])] += 1
    apply = jax.jit(DeepSeekV3(MODEL).apply)

    def probabilities(texts: list[list[int]]) -> np.ndarray:
        logits = np.asarray(apply(variables, np.array(texts, np.int32)).logits[:, -1], np.float64) / 0.6
        kept = np.where(logits >= np.sort(logits, axis=-1)[:, -4, None], logits, -np.inf)
        exponentials = np.exp(kept - kept.max(-1, keepdims=True))
        return exponentials / exponentials.sum(-1, keepdims=True)

    expected = count * probabilities([prompt])[0][:, None] * probabilities([[*prompt, i] for i in range(V)])
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
    engine = Engine(MODEL, variables, max_batch=8, max_length=256, drafts=1)
    params = [
        SamplingParams(10, temperature=0.8, seed=i, top_p=0.9 if i % 2 else 1.0, repetition_penalty=1 + i / 10)
        for i in range(6)
    ]
    together = list(engine.generate(prompts[:6], params))
    fresh = Engine(MODEL, variables, max_batch=8, max_length=256, drafts=1)
    for prompt, param, completion in zip(prompts[:6], params, together, strict=True):
        assert next(fresh.generate([prompt], [param])) == completion
    assert isinstance(together[0], Completion)
