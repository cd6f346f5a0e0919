"""Generation on a mesh: where the weights live, what that spares the links, and that nothing else comes of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from dsv3_jax.config import MeshConfig
from dsv3_jax.infer import Engine, SamplingParams
from dsv3_jax.infer import runner as runner_module
from dsv3_jax.infer.runner import models, on_mesh
from dsv3_jax.infer.steps import decode
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.rules import RULES, SERVING
from dsv3_jax.plan.collectives import collectives
from dsv3_jax.plan.serving import PAGE_SIZE, Arguments, Serving, abstract_arguments, by_rows
from tests.model.tiny import random_variables
from tests.train.test_on_mesh import MODEL

SHAPE = Serving(batch=8, context=24, chunk=16, drafts=1)
PROMPTS = [[5], [3, 8, 21, 2], [int(i) for i in np.random.default_rng(0).integers(0, MODEL.vocab_size, 17)]]


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    return random_variables(MODEL)


@pytest.fixture
def mesh() -> Mesh:
    return make_mesh(MeshConfig(expert=4, tensor=2))


def complete(variables: dict[str, Any], mesh: Mesh | None) -> list[list[int]]:
    engine = Engine(MODEL, variables, max_batch=8, max_length=SHAPE.context, chunk=16, page_size=PAGE_SIZE, mesh=mesh, drafts=1)
    return [completion.tokens for completion in engine.generate(PROMPTS, SamplingParams(max_tokens=6))]


def test_completions_are_the_same_under_either_rules(
    variables: dict[str, Any], mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those of one device; the programs, which jax keeps, are traced anew for the other rules."""
    alone = complete(variables, None)
    assert complete(variables, mesh) == alone
    monkeypatch.setattr(runner_module, "SERVING", RULES)
    assert complete(variables, mesh) == alone


@pytest.mark.parametrize("sizes", [{"expert": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_the_planned_arguments_are_the_engines(variables: dict[str, Any], sizes: dict[str, int]) -> None:
    """What `plan --mode serve` compiles for: the same tree, the same shapes, in the same places."""
    mesh = make_mesh(MeshConfig(**sizes))
    engine = Engine(MODEL, variables, max_batch=8, max_length=SHAPE.context, chunk=16, page_size=PAGE_SIZE, mesh=mesh, drafts=1)
    runner = engine._runner
    arrays = Arguments(runner._variables, runner._cache, runner._slots)
    planned = abstract_arguments(MODEL, SHAPE, mesh)
    assert jax.tree.structure(arrays) == jax.tree.structure(planned)
    for (path, array), shape in zip(jax.tree.leaves_with_path(arrays), jax.tree.leaves(planned), strict=True):
        name = jax.tree_util.keystr(path)
        assert (array.shape, array.dtype) == (shape.shape, shape.dtype), name
        assert array.sharding.is_equivalent_to(shape.sharding, array.ndim), (name, array.sharding, shape.sharding)


def test_no_weight_travels_along_the_expert_axis(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the rules of training every step gathers every dense weight; under those of generation only tokens travel."""
    few = dataclasses.replace(SHAPE, drafts=0)

    def gathered() -> int:
        more = by_rows((jax.ShapeDtypeStruct((8, 1), np.int32), jax.ShapeDtypeStruct((8,), bool)), mesh)
        with on_mesh(mesh):
            lowered = decode.lower(models(MODEL, mesh)[1], *abstract_arguments(MODEL, few, mesh), *more)
        found = collectives(lowered.compile().as_text(), dict(mesh.shape), open_trips=0)
        return sum(one.bytes for one in found if one.kind == "all-gather" and "expert" in one.axis.split("+"))

    tokens = gathered()
    # Eight states of each MoE layer and their routes, to the three others.
    layers, rows = MODEL.num_moe_layers, 2 * 3
    assert tokens <= layers * rows * (4 * MODEL.hidden_size + 16 * MODEL.num_experts_per_tok)
    assert SERVING != RULES
    monkeypatch.setattr(runner_module, "SERVING", RULES)
    monkeypatch.setattr("dsv3_jax.plan.serving.SERVING", RULES)
    assert gathered() > 10 * tokens
