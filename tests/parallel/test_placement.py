"""Split weights at work: products and gradients on meshes against one device, and what travels."""

from __future__ import annotations

import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from dsv3_jax.config import MeshConfig
from dsv3_jax.kernels.block_scaled import BlockScaled
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.placement import _rounded, place_tokens, project
from dsv3_jax.parallel.rules import RULES, SERVING, TOKENS, use_rules
from dsv3_jax.plan.collectives import collectives
from tests.parallel.test_dispatch import MESHES
from tests.tolerances import TOLERANCE

B, T = 8, 4
KERNELS = {
    "split along its inputs": (("embed", "mlp"), (16, 24), 1),
    "split along its outputs": (("mlp", "embed"), (24, 16), 1),
    "contracted over heads": (("heads", "head_dim", "embed"), (4, 6, 16), 2),
    "from a latent to heads": (("latent", "heads", "head_dim"), (16, 4, 6), 1),
    "whole along tensor": (("embed", "latent_out"), (16, 10), 1),
}


def draw(shape: tuple[int, ...], num_in: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x, kernel, dy = (B, T, *shape[:num_in]), shape, (B, T, *shape[num_in:])
    return tuple(rng.normal(size=size).astype(np.float32) for size in (x, kernel, dy))  # type: ignore[return-value]


def product_and_gradients(names: tuple[str, ...], num_in: int, x: jax.Array, kernel: jax.Array, dy: jax.Array) -> Any:
    y, transpose = jax.vjp(functools.partial(project, names=names, num_in=num_in), x, kernel)
    return y, *transpose(dy.astype(y.dtype))


def program(sizes: dict[str, int], kind: str) -> tuple[Any, Any]:
    names, _, num_in = KERNELS[kind]
    mesh = make_mesh(MeshConfig(**sizes))
    tokens = NamedSharding(mesh, TOKENS)
    shardings = tokens, NamedSharding(mesh, RULES.spec(names)), tokens
    return jax.jit(functools.partial(product_and_gradients, names, num_in), in_shardings=shardings), mesh


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("sizes", MESHES)
def test_products_and_gradients(sizes: str, kind: str) -> None:
    names, shape, num_in = KERNELS[kind]
    arrays = draw(shape, num_in)
    wanted = product_and_gradients(names, num_in, *arrays)
    run, mesh = program(MESHES[sizes], kind)
    with jax.set_mesh(mesh):
        found = run(*arrays)
    chex.assert_trees_all_close(found, wanted, **TOLERANCE["float32"])


@pytest.mark.parametrize("kind", KERNELS)
def test_products_under_the_rules_of_generation(kind: str) -> None:
    """Weights are whole along `expert`, so that only `fsdp` gathers them; the products are the same."""
    names, shape, num_in = KERNELS[kind]
    x, kernel, _ = draw(shape, num_in)
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    shardings = NamedSharding(mesh, TOKENS), NamedSharding(mesh, SERVING.spec(names))
    run = jax.jit(functools.partial(project, names=names, num_in=num_in), in_shardings=shardings)
    with jax.set_mesh(mesh), use_rules(SERVING):
        found, text = run(x, kernel), run.lower(x, kernel).compile().as_text()
    chex.assert_trees_all_close(np.asarray(found), np.asarray(project(x, kernel, names, num_in=num_in)), **TOLERANCE["float32"])
    assert {one.axis for one in collectives(text, dict(mesh.shape)) if one.kind == "all-gather"} == {"fsdp"}


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("sizes", MESHES)
def test_products_with_weights_in_8_bits(sizes: str, kind: str) -> None:
    """Their blocks, 5 x 7, end where hardly any part of a weight does, and cross heads."""
    names, shape, num_in = KERNELS[kind]
    x, kernel, _ = draw(shape, num_in)
    grid = -(-math.prod(shape[:num_in]) // 5), -(-math.prod(shape[num_in:]) // 7)
    scale_inv = jnp.asarray(np.random.default_rng(1).uniform(0.5, 1.5, grid), jnp.float32)
    weight = BlockScaled(jnp.asarray(kernel.astype(jnp.float8_e4m3fn).view(np.uint8)), scale_inv, (5, 7), num_in)
    wanted = project(x, weight.astype(jnp.float32), names, num_in=num_in)
    with jax.set_mesh(make_mesh(MeshConfig(**MESHES[sizes]))):
        found = jax.jit(functools.partial(project, names=names, num_in=num_in))(x, weight)
    chex.assert_trees_all_close(np.asarray(found), np.asarray(wanted), **TOLERANCE["float32"])


def test_gradients_cross_data_in_parts_and_in_float32() -> None:
    """Along `data`, which may be the slow network between slices, goes the sum of a device's own part of a weight."""
    _, shape, num_in = KERNELS["split along its inputs"]
    x, kernel, dy = draw(shape, num_in)
    run, mesh = program({"data": 2, "fsdp": 4}, "split along its inputs")
    with jax.set_mesh(mesh):
        text = run.lower(x.astype(jnp.bfloat16), kernel, dy).compile().as_text()
    (sent,) = [one for one in collectives(text, dict(mesh.shape)) if one.axis == "data"]
    assert (sent.kind, sent.bytes) == ("all-reduce", kernel.nbytes // 4)


def test_rounding_is_a_cast() -> None:
    """Ties, the smallest and the largest numbers, infinities and NaN."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=1000), [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, np.inf, np.nan, 1e-38]])
    values = values.astype(np.float32)
    chex.assert_trees_all_equal(_rounded(values, "bfloat16"), jnp.asarray(values, jnp.bfloat16))
    assert _rounded(values, "float32").dtype == jnp.float32
    gradient = jax.grad(lambda x: jnp.sum(_rounded(x, "bfloat16").astype(jnp.float32) * 3))(jnp.ones(4))
    chex.assert_trees_all_equal(gradient, jnp.full(4, 3.0))


def test_tokens_are_placed() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, context=4))
    x = np.ones((B, T, 3), np.float32)
    assert place_tokens(x) is x
    with jax.set_mesh(mesh):
        placed = jax.jit(place_tokens)(x)
    assert placed.sharding.is_equivalent_to(NamedSharding(mesh, TOKENS), 3)
