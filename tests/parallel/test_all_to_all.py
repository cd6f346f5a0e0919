"""The expert all-to-all against the same layer on one device: values, gradients, and not one token lost."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from jax.sharding import Mesh, NamedSharding

from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.model.moe import routed_experts
from dsv3_jax.parallel.all_to_all import WEIGHT_AXES, routed_experts_on_mesh
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import RULES, TOKEN_SPEC
from tests.model.tiny import CONFIG
from tests.parallel.ragged_emulation import emulate_ragged
from tests.tolerances import TOLERANCE

E, K, D, F = 8, 3, 24, 16
MODEL = dataclasses.replace(CONFIG, n_routed_experts=E, num_experts_per_tok=K, hidden_size=D, moe_intermediate_size=F)
B, T = 8, 8
MESHES = {
    "fsdp": {"fsdp": 8},
    "expert": {"expert": 8},
    "fsdp, expert": {"fsdp": 2, "expert": 4},
    "data, expert, tensor": {"data": 2, "expert": 2, "tensor": 2},
    "context, expert, tensor": {"context": 2, "expert": 2, "tensor": 2},
}
Arrays = tuple[Any, ...]


@pytest.fixture(autouse=True)
def ragged_all_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate_ragged(monkeypatch)


@functools.cache
def inputs() -> Arrays:
    """x, the weights of the choices, the experts' weights, and the gradient that comes back."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    experts = normal(E, D, F) * D**-0.5, normal(E, D, F) * D**-0.5, normal(E, F, D) * F**-0.5
    return normal(B, T, D), rng.uniform(0.1, 1, (B, T, K)).astype(np.float32), experts, normal(B, T, D)


def random_routing(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([rng.permutation(E)[:K] for _ in range(B * T)], np.int32).reshape(B, T, K)


@functools.cache
def on_one_device() -> Any:
    def run(x: jax.Array, weight: jax.Array, experts: Arrays, dy: jax.Array, chosen: jax.Array) -> Arrays:
        def apply(x: jax.Array, weight: jax.Array, experts: Any) -> jax.Array:
            return routed_experts(x.reshape(-1, D), chosen, weight, experts, MODEL, "reference").reshape(x.shape)

        y, transpose = jax.vjp(apply, x, weight, experts)
        return y, *transpose(dy)

    return jax.jit(run)


@functools.cache
def on_mesh(sizes: str, exchange: str, factor: float, dtype: str = "float32") -> tuple[Any, Mesh]:
    model: ModelConfig = dataclasses.replace(MODEL, expert_exchange=exchange, receive_factor=factor, dtype=dtype)
    mesh = make_mesh(MeshConfig(**MESHES[sizes]))

    def run(x: jax.Array, weight: jax.Array, experts: Any, dy: jax.Array, chosen: jax.Array) -> Arrays:
        apply = functools.partial(routed_experts_on_mesh, config=model, backend="tiles")
        y, transpose, rounds = jax.vjp(lambda x, w, e: apply(x, chosen, w, e), x, weight, experts, has_aux=True)
        return y, *transpose(dy.astype(y.dtype)), rounds

    tokens = NamedSharding(mesh, TOKEN_SPEC)
    weights = tuple(NamedSharding(mesh, RULES.spec(axes)) for axes in WEIGHT_AXES)
    return jax.jit(run, in_shardings=(tokens, tokens, weights, tokens, tokens)), mesh


def check(sizes: str, exchange: str, factor: float, chosen: np.ndarray) -> int:
    """Compares with one device; returns the rounds."""
    program, mesh = on_mesh(sizes, exchange, factor)
    with jax.set_mesh(mesh):
        *found, rounds = program(*inputs(), chosen)
    wanted = on_one_device()(*inputs(), chosen)
    chex.assert_trees_all_close(found, list(wanted), **TOLERANCE["float32"])
    return int(rounds)


# Of these the tests below have "fsdp, expert" with every exchange; on "fsdp" nothing travels in any exchange.
COVER = {("fsdp", "dense"), ("expert", "ragged"), ("data, expert, tensor", "all_gather"), ("context, expert, tensor", "dense")}


@pytest.mark.parametrize(
    ("sizes", "exchange"),
    [
        pytest.param(*case, marks=() if case in COVER else pytest.mark.nightly)
        for case in itertools.product(MESHES, ("ragged", "dense", "all_gather"))
    ],
)
def test_values_and_gradients_on_every_mesh(sizes: str, exchange: str) -> None:
    rounds = check(sizes, exchange, 1.5, random_routing())
    assert rounds == 1 or MESHES[sizes].get("expert", 1) > 1


NARROW = 0.4
"""A receive_factor with room for less than half of the rows on average: two tiles of them."""


@pytest.mark.parametrize("exchange", ["ragged", "dense", "all_gather"])
def test_all_tokens_to_one_expert_take_more_rounds_and_lose_nothing(exchange: str) -> None:
    """Every choice of every token: the four devices of a group all send their 24 rows to one, 16 at a time."""
    rounds = check("fsdp, expert", exchange, NARROW, np.full((B, T, K), 5, np.int32))
    assert rounds == 4 * 24 / 16


def test_a_ring_with_room_for_every_choice_has_no_loop_over_rounds() -> None:
    """As in decoding, and then all of them may be the same expert's."""
    chosen = np.full((B, T, K), 5, np.int32)
    assert check("fsdp, expert", "all_gather", 4.0, chosen) == 1

    def loops(factor: float) -> int:
        program, mesh = on_mesh("fsdp, expert", "all_gather", factor)
        with jax.set_mesh(mesh):
            return program.lower(*inputs(), chosen).as_text().count("stablehlo.while")

    # Forward and backward, each with the backend's own loops in it.
    assert loops(4.0) < loops(2.0) - 2


@pytest.mark.parametrize("exchange", ["ragged", "dense", "all_gather"])
@hypothesis.given(seed=strategies.integers(0, 2**32 - 1), skew=strategies.floats(0.02, 20))
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
def test_no_routing_loses_a_token(exchange: str, seed: int, skew: float) -> None:
    """Experts drawn with popularities from even to nearly all on one."""
    rng = np.random.default_rng(seed)
    popularity = rng.gamma(skew, size=E) + 1e-9
    # The K largest of log p + Gumbel noise are K draws without replacement.
    noisy = np.log(popularity / popularity.sum()) + rng.gumbel(size=(B, T, E))
    check("fsdp, expert", exchange, NARROW, np.argsort(-noisy, axis=-1)[..., :K].astype(np.int32))


def test_a_row_that_is_dropped_would_show() -> None:
    """The comparison can fail: with the rounds after the first left out, it does."""
    chosen = np.full((B, T, K), 5, np.int32)
    program, mesh = on_mesh("fsdp, expert", "dense", 1.0)
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        patch.setattr(jax.lax, "pmax", lambda x, axes: jnp.minimum(jax.lax.psum(x, axes), 1))
        y = jax.jit(lambda *args: program.__wrapped__(*args)[0])(*inputs(), chosen)
    wanted, *_ = on_one_device()(*inputs(), chosen)
    assert np.abs(y - wanted).max() > 0.1


def test_bfloat16() -> None:
    """Rows travel in bfloat16, sums are made in float32."""
    program, mesh = on_mesh("fsdp, expert", "dense", 1.5, "bfloat16")
    x, weight, experts, dy = inputs()
    chosen = random_routing()
    half = jnp.asarray(x, jnp.bfloat16)
    with jax.set_mesh(mesh):
        y, dx, dweight, dexperts, _ = program(half, weight, experts, dy, chosen)
    chex.assert_type([y, dx, dweight, *dexperts], [jnp.bfloat16, jnp.bfloat16, *[jnp.float32] * 4])
    wanted = on_one_device()(*inputs(), chosen)
    for found, exact in zip(jax.tree.leaves((y, dx, dweight, dexperts)), jax.tree.leaves(wanted), strict=True):
        apart = np.linalg.norm(np.asarray(found, np.float32) - exact)
        assert apart < TOLERANCE["bfloat16"]["rtol"] * np.linalg.norm(exact)
