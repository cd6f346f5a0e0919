"""Where every array lives: the published model against the file that is checked in, and the bytes."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib

import jax
import pytest
from jax.sharding import AbstractMesh

from dsv3_jax.config.cli import load_config
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.plan.tables import Row, sharding_table, spec_text
from dsv3_jax.train.state import init_state

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = pathlib.Path(__file__).parent / "v3_671b_sharding.txt"
PUBLISHED = load_config(str(ROOT / "configs/v3_671b.py"))
POD = AbstractMesh((1, 8, 64, 1, 1), AXES)


@functools.cache
def published_table() -> list[Row]:
    return sharding_table(PUBLISHED, POD)


def test_the_published_model_lives_where_the_file_says() -> None:
    """A change of a rule shows here, array by array: the file has a line of path, shape and spec for each."""
    found = [f"{row.path} {list(row.shape)} {spec_text(row.spec)}" for row in published_table()]
    assert found == GOLDEN.read_text().splitlines()


def test_bytes_of_a_device() -> None:
    """Parameters in float32, both moments in bfloat16, all split 512 ways but for what is small."""
    rows = published_table()
    shapes = jax.eval_shape(lambda: init_state(PUBLISHED))
    assert sum(math.prod(row.shape) for row in rows) == sum(leaf.size for leaf in jax.tree.leaves(shapes))
    total = sum(row.bytes_per_device for row in rows)
    assert 8 * 682.6e9 < total * 512 < 8 * 682.7e9 + 512 * 2**24
    by_path = {row.path: row for row in rows}
    down = by_path["params/moe_layers/mlp/experts/down_proj"]
    assert down.logical_axes == ("layers", "experts", "expert_mlp", "expert_embed")
    assert down.bytes_per_device == 58 * 4 * 2048 * 896 * 4
    (moment,) = (row for row in rows if row.path.endswith("mu/moe_layers/mlp/experts/down_proj"))
    assert (moment.spec, moment.logical_axes, moment.dtype) == (down.spec, down.logical_axes, "bfloat16")
    assert by_path["step"].logical_axes is None


def test_what_does_not_divide_is_refused_by_name() -> None:
    model = dataclasses.replace(PUBLISHED.model, num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match=r"kv_b_proj/kernel .* is no multiple of fsdp \(16\) \* expert \(64\)"):
        sharding_table(dataclasses.replace(PUBLISHED, model=model), AbstractMesh((1, 16, 64, 1, 1), AXES))


def test_moments_follow_their_parameters_on_any_mesh() -> None:
    small = load_config(str(ROOT / "configs/tiny.py"))
    rows = sharding_table(dataclasses.replace(small), AbstractMesh((2, 2, 2, 1, 2), AXES))
    parameters = {row.path.removeprefix("params/"): row for row in rows if row.path.startswith("params/")}
    for moments in ("mu", "nu"):
        found = {row.path.partition(f"/{moments}/")[2]: row.spec for row in rows if f"/{moments}/" in row.path}
        assert found == {path: row.spec for path, row in parameters.items()}
