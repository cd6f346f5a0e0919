"""Logical axes to mesh axes: the rules, and everything that is refused."""

from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.parallel.sharding import RULES, SERVING, ShardingRules, current_rules, named_shardings, use_rules

MESH = AbstractMesh((2, 2, 4, 1, 2), AXES)


def test_specs() -> None:
    assert RULES.spec(("layers", "embed", "mlp")) == PartitionSpec(None, ("fsdp", "expert", "context"), "tensor")
    assert RULES.spec(("experts", "expert_embed", "expert_mlp")) == PartitionSpec("expert", ("fsdp", "context"), "tensor")
    assert RULES.spec(("norm",)) == PartitionSpec(None)
    assert RULES.spec(()) == PartitionSpec()


def test_the_rules_of_generation_split_dense_weights_less_and_experts_alike() -> None:
    assert SERVING.spec(("embed", "mlp")) == PartitionSpec(("fsdp", "context"), "tensor")
    assert SERVING.spec(("latent", "heads", "head_dim")) == PartitionSpec(("fsdp", "context"), "tensor", None)
    for axes in (("experts", "expert_embed", "expert_mlp"), ("experts", "expert_mlp", "expert_embed")):
        assert SERVING.spec(axes) == RULES.spec(axes)


def test_a_program_is_traced_anew_under_other_rules() -> None:
    """And again under the first ones it is what it was; within them, within a loop, too."""
    traced = []

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        def body(i: jax.Array, x: jax.Array) -> jax.Array:
            traced.append(current_rules())
            return x + (current_rules() == SERVING)

        return jax.lax.fori_loop(0, 3, body, x)

    assert current_rules() == RULES
    for _ in range(2):
        assert run(np.float32(0)) == 0
        with use_rules(SERVING):
            assert run(np.float32(0)) == 3
    assert current_rules() == RULES
    assert set(traced) == {RULES, SERVING}


@pytest.mark.parametrize(
    ("rules", "names", "complaint"),
    [
        (RULES, ("embed", "hidden"), "params/w ('embed', 'hidden') has the logical axis 'hidden', which has no rule"),
        (
            dataclasses.replace(RULES, mlp=("model",)),
            ("embed", "mlp"),
            "the rule mlp -> ('model',) names 'model', which is no mesh axis",
        ),
        (RULES, ("embed", "latent"), "would be split along mesh axis 'fsdp' twice; change the rule of 'latent'"),
        (RULES, ("experts", "embed"), "would be split along mesh axis 'expert' twice; change the rule of 'embed'"),
        (ShardingRules(vocab=("tensor", "tensor")), ("vocab",), "would be split along mesh axis 'tensor' twice"),
    ],
)
def test_bad_rules_are_refused_by_name(rules: ShardingRules, names: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        rules.spec(names, "params/w")


def test_shardings_of_a_tree() -> None:
    shapes = {"a": {"kernel": jax.ShapeDtypeStruct((16, 6), np.float32)}, "b": jax.ShapeDtypeStruct((3,), np.float32)}
    axes = {"a": {"kernel": ("embed", "mlp")}, "b": ("norm",)}
    found = named_shardings(axes, shapes, MESH)
    assert found["a"]["kernel"] == NamedSharding(MESH, PartitionSpec(("fsdp", "expert", "context"), "tensor"))
    assert found["a"]["kernel"].shard_shape((16, 6)) == (2, 3)
    assert found["b"].shard_shape((3,)) == (3,)


def test_another_mesh_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("the mesh has axes ('x',); make it with dsv3_jax.parallel.mesh.make_mesh")):
        named_shardings({}, {}, AbstractMesh((8,), ("x",)))


def test_a_dimension_that_does_not_divide_is_refused_by_name() -> None:
    shapes = {"a": {"kernel": jax.ShapeDtypeStruct((12, 6), np.float32)}}
    complaint = "a/kernel [12, 6]: dimension 0 (12) is no multiple of fsdp (2) * expert (4) * context (1) = 8"
    with pytest.raises(ValueError, match=re.escape(complaint)):
        named_shardings({"a": {"kernel": ("embed", "mlp")}}, shapes, MESH)
