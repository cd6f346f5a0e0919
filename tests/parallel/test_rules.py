"""Logical axes to mesh axes: the rules, and everything that is refused."""

from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.parallel.rules import RULES, ShardingRules, named_shardings

MESH = AbstractMesh((2, 2, 4, 1, 2), AXES)


def test_specs() -> None:
    assert RULES.spec(("layers", "embed", "mlp")) == PartitionSpec(None, ("fsdp", "expert", "context"), "tensor")
    assert RULES.spec(("experts", "expert_embed", "expert_mlp")) == PartitionSpec("expert", ("fsdp", "context"), "tensor")
    assert RULES.spec(("norm",)) == PartitionSpec(None)
    assert RULES.spec(()) == PartitionSpec()


@pytest.mark.parametrize(
    ("rules", "names", "complaint"),
    [
        (RULES, ("embed", "hidden"), "params/w ('embed', 'hidden') has the logical axis 'hidden', which has no rule"),
        (
            dataclasses.replace(RULES, mlp=("model",)),
            ("embed", "mlp"),
            "the rule mlp -> ('model',) has no such mesh axis 'model'",
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
