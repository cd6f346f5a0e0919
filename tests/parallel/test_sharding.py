"""Split weights at work: products and gradients on meshes against one device, and what travels."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from dsv3_jax.config import MeshConfig
from dsv3_jax.kernels.quantized import QuantizedArray
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import RULES, SERVING, TOKEN_SPEC, _rounded, place_tokens, project, use_rules
from dsv3_jax.plan.hlo import collectives
from tests.parallel.test_all_to_all import MESHES
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


def product(x: np.ndarray, kernel: np.ndarray, num_in: int) -> np.ndarray:
    """The same in float64 on no mesh."""
    return np.tensordot(np.float64(x), np.float64(kernel), num_in)


def program(sizes: dict[str, int], kinds: Iterable[str]) -> tuple[Any, Any]:
    """({kind: (x, kernel, dy)}) -> {kind: (y, dx, dkernel)}; one program, which costs less to compile than one for each."""
    mesh = make_mesh(MeshConfig(**sizes))
    tokens = NamedSharding(mesh, TOKEN_SPEC)

    def product_and_gradients(arrays: dict[str, tuple]) -> dict[str, tuple]:
        out = {}
        for kind, (x, kernel, dy) in arrays.items():
            names, _, num_in = KERNELS[kind]
            y, transpose = jax.vjp(functools.partial(project, names=names, num_in=num_in), x, kernel)
            out[kind] = y, *transpose(dy.astype(y.dtype))
        return out

    shardings = {kind: (tokens, NamedSharding(mesh, RULES.spec(KERNELS[kind][0])), tokens) for kind in kinds}
    return jax.jit(product_and_gradients, in_shardings=(shardings,)), mesh


@pytest.mark.parametrize("sizes", MESHES)
def test_products_and_gradients(sizes: str) -> None:
    arrays = {kind: draw(shape, num_in) for kind, (_, shape, num_in) in KERNELS.items()}
    run, mesh = program(MESHES[sizes], KERNELS)
    with jax.set_mesh(mesh):
        found = run(arrays)
    for kind, (x, kernel, dy) in arrays.items():
        num_in = KERNELS[kind][2]
        outputs = tuple(range(2, dy.ndim))
        dx = np.tensordot(np.float64(dy), np.float64(kernel), (outputs, tuple(range(num_in, kernel.ndim))))
        dkernel = np.tensordot(np.float64(x), np.float64(dy), ((0, 1), (0, 1)))
        wanted = product(x, kernel, num_in), dx, dkernel
        chex.assert_trees_all_close(jax.tree.map(np.float64, found[kind]), wanted, **TOLERANCE["float32"])


@pytest.mark.parametrize("kind", KERNELS)
def test_products_under_the_rules_of_generation(kind: str) -> None:
    """Weights are whole along `expert`, so that only `fsdp` gathers them; the products are the same."""
    names, shape, num_in = KERNELS[kind]
    x, kernel, _ = draw(shape, num_in)
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    shardings = NamedSharding(mesh, TOKEN_SPEC), NamedSharding(mesh, SERVING.spec(names))
    run = jax.jit(functools.partial(project, names=names, num_in=num_in), in_shardings=shardings)
    with jax.set_mesh(mesh), use_rules(SERVING):
        compiled = run.lower(x, kernel).compile()
        found = compiled(x, kernel)
    chex.assert_trees_all_close(np.float64(found), product(x, kernel, num_in), **TOLERANCE["float32"])
    gathers = [one for one in collectives(compiled.as_text(), dict(mesh.shape)) if one.kind == "all-gather"]
    assert {one.axis for one in gathers} == {"fsdp"}


def in_8_bits(kind: str) -> tuple[QuantizedArray, np.ndarray]:
    """A kernel in blocks of 5 x 7, which end where hardly any part of it does, and cross heads; and what it stands for."""
    _, shape, num_in = KERNELS[kind]
    values = draw(shape, num_in)[1].astype(jnp.float8_e4m3fn)
    matrix = math.prod(shape[:num_in]), math.prod(shape[num_in:])
    grid = [-(-size // edge) for size, edge in zip(matrix, (5, 7), strict=True)]
    scale_inv = np.random.default_rng(1).uniform(0.5, 1.5, grid).astype(np.float32)
    rows, columns = np.indices(matrix)
    meant = np.float64(values).reshape(matrix) * scale_inv[rows // 5, columns // 7]
    return QuantizedArray(jnp.asarray(values.view(np.uint8)), jnp.asarray(scale_inv), (5, 7), num_in), meant.reshape(shape)


@pytest.mark.parametrize("sizes", MESHES)
def test_products_with_weights_in_8_bits(sizes: str) -> None:
    inputs = {kind: draw(shape, num_in)[0] for kind, (_, shape, num_in) in KERNELS.items()}
    weights, meant = ({kind: in_8_bits(kind)[i] for kind in KERNELS} for i in (0, 1))

    @jax.jit
    def run(inputs: dict[str, Any], weights: dict[str, Any]) -> dict[str, jax.Array]:
        return {kind: project(inputs[kind], weights[kind], KERNELS[kind][0], num_in=KERNELS[kind][2]) for kind in KERNELS}

    with jax.set_mesh(make_mesh(MeshConfig(**MESHES[sizes]))):
        found = run(inputs, weights)
    wanted = {kind: product(x, meant[kind], KERNELS[kind][2]) for kind, x in inputs.items()}
    chex.assert_trees_all_close(jax.tree.map(np.float64, found), wanted, **TOLERANCE["float32"])


def test_gradients_cross_data_in_parts_and_in_float32() -> None:
    """Along `data`, which may be the slow network between slices, goes the sum of a device's own part of a weight."""
    kind = "split along its inputs"
    _, shape, num_in = KERNELS[kind]
    x, kernel, dy = draw(shape, num_in)
    run, mesh = program({"data": 2, "fsdp": 4}, [kind])
    with jax.set_mesh(mesh):
        text = run.lower({kind: (x.astype(jnp.bfloat16), kernel, dy)}).compile().as_text()
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
    assert placed.sharding.is_equivalent_to(NamedSharding(mesh, TOKEN_SPEC), 3)
