"""The exchanges by themselves: every row arrives once, at its expert, and comes back to its token."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsv3_jax.config import MeshConfig
from dsv3_jax.parallel import all_to_all as module
from dsv3_jax.parallel.all_to_all import EXCHANGES, choose_exchange, receive_rows
from dsv3_jax.parallel.mesh import make_mesh
from tests.parallel.ragged_emulation import emulated_ragged_all_to_all

X, E, T, K = 4, 8, 6, 3  # devices along `expert`, experts, tokens a device, choices a token
NAMES = "ragged", "dense", "all_gather"


@pytest.fixture(autouse=True)
def ragged_all_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ragged_all_to_all", emulated_ragged_all_to_all)


def routings() -> dict[str, np.ndarray]:
    """Experts of every device's tokens, [X T, K]: K different ones for each."""
    rng = np.random.default_rng(0)
    random = np.stack([rng.permutation(E)[:K] for _ in range(X * T)])
    return {
        "random": random,
        "everyone to the first device": np.tile(np.arange(K), (X * T, 1)) % 2 + 0 * random,
        "one expert": np.full((X * T, K), 5),
        "last device": np.full((X * T, K), E - 1),
    }


@functools.cache
def program(name: str, factor: float, rounds: int):
    """Rows received in each round, and the returned sums if the answer to every row is its expert's number."""
    mesh = make_mesh(MeshConfig(data=2, expert=X))

    def on_device(token_T1: jax.Array, chosen_TK: jax.Array, weight_TK: jax.Array) -> tuple[jax.Array, ...]:
        plan = EXCHANGES[name].plan(chosen_TK, E, factor)
        first = jax.lax.axis_index("expert") * (E // X)

        def one_round(totals: tuple[jax.Array, ...], r: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
            sums, values = totals
            rows = plan.send_tokens(r, token_T1)
            group = plan.group_sizes(r)
            mine = jnp.arange(rows.shape[0])
            expert = jnp.sum(mine[:, None] >= jnp.cumsum(group), axis=1)
            used = mine < group.sum()
            answer = jnp.where(used, first + expert, 0).astype(jnp.float32)
            sums += plan.return_sums(r, (answer + 1)[:, None] * used[:, None] * rows, weight_TK)
            values += plan.return_choices(r, answer)
            received = jnp.where(used, rows[:, 0], -1)
            return (sums, values), (received, jnp.where(used, plan.send_choices(r, weight_TK), -1), group)

        start = jnp.zeros(token_T1.shape), jnp.zeros(weight_TK.shape)
        (sums, values), by_round = jax.lax.scan(one_round, start, jnp.arange(rounds, dtype=jnp.int32))
        return *by_round, sums, values, plan.rounds()[None]

    spec = PartitionSpec("expert")
    stacked = PartitionSpec(None, "expert")
    outs = (stacked, stacked, stacked, spec, spec, spec)
    mapped = jax.shard_map(on_device, mesh=mesh, in_specs=(spec, spec, spec), out_specs=outs, check_vma=False)
    return jax.jit(mapped)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_every_row_arrives_once_and_comes_back(name: str, factor: float) -> None:
    for case, chosen in routings().items():
        tokens = np.arange(1.0, X * T + 1, dtype=np.float32)[:, None]
        weight = np.random.default_rng(1).uniform(0.5, 1, (X * T, K)).astype(np.float32)
        rounds = 6
        received, weights, sizes, sums, values, needed = map(np.asarray, program(name, factor, rounds)(tokens, chosen, weight))
        needed = int(needed.max())
        assert 1 <= needed <= rounds, case
        assert not sizes[needed:].any(), case
        # All of a round's rows together, by expert: the tokens that chose it, each once.
        width = received.shape[1] // X
        for expert in range(E):
            device, local = divmod(expert, E // X)
            got: list[tuple[float, float]] = []
            for r in range(needed):
                group = sizes[r, device * (E // X) : (device + 1) * (E // X)]
                assert group.sum() <= width, case
                start = device * width + group[:local].sum()
                got += zip(received[r, start : start + group[local]], weights[r, start : start + group[local]], strict=True)
            token, choice = np.nonzero(chosen == expert)
            want = list(zip(tokens[token, 0], weight[token, choice], strict=True))
            assert sorted(got) == sorted(want), (case, expert)
        np.testing.assert_allclose(sums[:, 0], tokens[:, 0] * (weight * (chosen + 1)).sum(1), rtol=1e-6, err_msg=case)
        np.testing.assert_array_equal(values, chosen, err_msg=case)


@pytest.mark.parametrize("name", NAMES)
def test_rounds_are_as_few_as_the_buffer_allows(name: str) -> None:
    """All rows to one device: X times what it has room for at factor 1; the pairs of `dense` have a quarter of it each."""
    chosen = np.full((X * T, K), 5)
    *_, needed = program(name, 1.0, 6)(np.ones((X * T, 1), np.float32), chosen, np.ones((X * T, K), np.float32))
    rows = receive_rows(T * K, 1.0)
    want = -(-T * K // -(-rows // X)) if name == "dense" else -(-X * T * K // rows)
    assert int(np.max(needed)) == want


def test_choice_of_an_exchange() -> None:
    assert choose_exchange("auto", "tpu", 8) == choose_exchange("auto", "gpu", 8) == "ragged"
    assert choose_exchange("auto", "cpu", 8) == "dense"
    assert choose_exchange("all_gather", "tpu", 8) == "all_gather"
    assert choose_exchange("all_gather", "tpu", 1) == choose_exchange("ragged", "cpu", 1) == "local"


def test_an_exchange_that_a_platform_has_not_is_refused_by_name() -> None:
    assert choose_exchange("ragged", "gpu", 8) == choose_exchange("ragged", "tpu", 8) == "ragged"
    refusal = "expert_exchange 'ragged' runs on gpu or tpu only, and this program is for cpu; use 'auto' or 'dense' or 'all_g"
    with pytest.raises(ValueError, match=refusal):
        choose_exchange("ragged", "cpu", 8)


def test_receive_rows_are_a_multiple_of_a_tile() -> None:
    assert receive_rows(100, 1.5) == 152
    assert receive_rows(64, 1.0) == 64
