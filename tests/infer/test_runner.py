"""Generation on a mesh: where the weights live, what that spares the links, and that nothing else comes of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from dsv3_jax.config import MeshConfig
from dsv3_jax.infer import Engine, SamplingParams
from dsv3_jax.infer import runner as runner_module
from dsv3_jax.infer.runner import decode, models, on_mesh
from dsv3_jax.model import DeepSeekV3, ModelOutput
from dsv3_jax.model.sharding import place_variables
from dsv3_jax.model.transformer import STACKS
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import RULES, SERVING
from dsv3_jax.plan.hlo import collectives
from dsv3_jax.plan.serving import PAGE_SIZE, Arguments, Serving, abstract_arguments, by_rows
from tests.model.tiny import random_variables
from tests.train.test_on_mesh import MODEL

SMALL = dataclasses.replace(MODEL, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0, eos_token_id=None)
# A dense and an MoE layer, and an MTP depth.
MIXED = dataclasses.replace(MODEL, num_hidden_layers=2)
SHAPE = Serving(batch=8, context=24, chunk=16)
SIZES: dict[str, Any] = {"max_batch": 8, "max_length": 24, "chunk": 16, "page_size": PAGE_SIZE}
PROMPTS = [[5], [3, 8, 21, 2], [int(i) for i in np.random.default_rng(0).integers(0, MODEL.vocab_size, 14)]]


@pytest.fixture
def mesh() -> Mesh:
    return make_mesh(MeshConfig(expert=4, tensor=2))


@functools.cache
def plain() -> Callable[..., ModelOutput]:
    return jax.jit(DeepSeekV3(SMALL).apply)


def assert_most_likely(engine: Engine, variables: dict[str, Any]) -> None:
    """Each token of the engine's completions is the most likely one after all before it, by the model on one device."""
    found = [completion.tokens for completion in engine.generate(PROMPTS, SamplingParams(max_tokens=8))]
    texts = np.zeros((len(PROMPTS), 22), np.int32)
    for row, prompt, tokens in zip(texts, PROMPTS, found, strict=True):
        row[: len(prompt) + 8] = prompt + tokens
    best = np.asarray(plain()(variables, texts).logits).argmax(-1)
    for row, prompt, tokens in zip(best, PROMPTS, found, strict=True):
        assert row[len(prompt) - 1 : len(prompt) + 7].tolist() == tokens


@pytest.mark.parametrize(("on_mesh", "dtype"), [(False, "bfloat16"), (True, "float32")])
def test_donated_weights_are_held_once(mesh: Mesh, on_mesh: bool, dtype: str) -> None:
    """The stacks are gone once their layers are there, and what was converted is gone too; the layers are the same."""
    config = dataclasses.replace(SMALL, dtype=dtype)

    def arrays() -> dict[str, Any]:
        drawn = jax.tree.map(jnp.asarray, random_variables(SMALL))
        return place_variables(drawn, SMALL, mesh) if on_mesh else drawn

    def engine(variables: dict[str, Any], donate: bool) -> Engine:
        return Engine(config, variables, **SIZES, mesh=mesh if on_mesh else None, donate=donate)

    given = arrays()
    kept = engine(given, False)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    donated = engine(given, True)
    stacks = [given[collection][name] for collection in given for name in STACKS if name in given[collection]]
    assert stacks
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(stacks))
    if dtype == "bfloat16":
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given["params"]))
    chex.assert_trees_all_equal(donated._runner._variables, kept._runner._variables)
    if on_mesh:
        assert_most_likely(donated, random_variables(SMALL))


@pytest.mark.slow
def test_completions_are_the_same_under_the_rules_of_training(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs, which jax keeps, are traced anew for other rules."""
    # Of this test's own, so that no other one has compiled them.
    config = dataclasses.replace(SMALL, loss_chunk=5)
    before, variables = decode._cache_size(), random_variables(SMALL)
    for rules in (SERVING, RULES):
        monkeypatch.setattr(runner_module, "SERVING", rules)
        assert_most_likely(Engine(config, variables, **SIZES, mesh=mesh), variables)
    assert decode._cache_size() == before + 2


@pytest.mark.parametrize("sizes", [{"expert": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_the_planned_arguments_are_the_engines(sizes: dict[str, int]) -> None:
    """What `plan --mode serve` compiles for: the same tree, the same shapes, in the same places."""
    mesh = make_mesh(MeshConfig(**sizes))
    shape = dataclasses.replace(SHAPE, drafts=1)
    size = {"max_batch": 8, "max_length": shape.context, "page_size": PAGE_SIZE, "drafts": 1}
    runner = Engine(MIXED, random_variables(MIXED), mesh=mesh, **size)._runner  # type: ignore[arg-type]
    arrays = Arguments(runner._variables, runner._cache, runner._slots)
    planned = abstract_arguments(MIXED, shape, mesh)
    assert jax.tree.structure(arrays) == jax.tree.structure(planned)
    for (path, array), wanted in zip(jax.tree.leaves_with_path(arrays), jax.tree.leaves(planned), strict=True):
        name = jax.tree_util.keystr(path)
        assert (array.shape, array.dtype) == (wanted.shape, wanted.dtype), name
        assert array.sharding.is_equivalent_to(wanted.sharding, array.ndim), (name, array.sharding, wanted.sharding)


def test_no_weight_travels_along_the_expert_axis(mesh: Mesh) -> None:
    """Under the rules of training every step would gather every dense weight there; now it is tokens alone that travel."""
    more = by_rows((jax.ShapeDtypeStruct((8, 1), np.int32), jax.ShapeDtypeStruct((8,), bool)), mesh)
    with on_mesh(mesh):
        lowered = decode.lower(models(SMALL, mesh)[1], *abstract_arguments(SMALL, SHAPE, mesh), *more)
    found = collectives(lowered.compile().as_text(), dict(mesh.shape), open_trips=0)
    gathered = sum(one.bytes for one in found if one.kind == "all-gather" and "expert" in one.axis.split("+"))
    # To the ring's three other devices: the float32 states of two tokens, once, and a few numbers for each of their choices.
    tokens = 3 * 2 * 4 * SMALL.hidden_size
    assert tokens <= gathered < tokens + 3 * 2 * 64 * SMALL.num_experts_per_tok
    smallest_weight = 4 * SMALL.hidden_size * SMALL.q_lora_rank  # type: ignore[operator]
    assert gathered < tokens + 3 / 4 * smallest_weight
