"""A roofline worked out by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
from jax.sharding import AbstractMesh

from dsv3_jax.model.flops import flops_per_token
from dsv3_jax.parallel.devices import Chip
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.plan import program
from dsv3_jax.plan.hlo import Collective
from dsv3_jax.plan.program import Compiled, Roofline, bound, roofline
from tests.plan.test_program import SMALL

CHIP = Chip(bf16_flops=1000.0, hbm_bytes=100.0, hbm_gib=1.0, ici_bytes=10.0, dcn_bytes=2.0)
SENT = [
    Collective("all-gather", "fsdp", 30, 1, False),
    Collective("all-reduce", "data", 8, 1, False),
    Collective("ragged-all-to-all", "expert", 15, 2, True),
    Collective("all-reduce", "data+fsdp", 2, 1, False),
    Collective("all-gather", "?", 5, 1, False),
]


def worked(flops: float = 3000.0, hbm_bytes: float = 250.0, collectives: Iterable[Collective] = SENT) -> Roofline:
    return roofline(flops, hbm_bytes, collectives, CHIP)


def test_roofline_by_hand() -> None:
    """3000 FLOPs at 1000, 250 bytes at 100, and 60 bytes at 10: the links are the limit."""
    assert worked() == Roofline(compute_seconds=3.0, hbm_seconds=2.5, link_seconds=6.0, step_seconds=6.0)


def test_what_crosses_slices_goes_over_the_network() -> None:
    """Along `data` too only that: 50 bytes on ICI, and 10 at 2; with less on it the network is not the limit."""
    across = [dataclasses.replace(one, across_slices=one.axis.startswith("data")) for one in SENT]
    assert worked(collectives=across).link_seconds == 5.0
    assert worked(collectives=across[1:4]).link_seconds == 5.0
    assert worked(collectives=across[:1] + across[3:]).link_seconds == 3.5
    within = [*across[:3], SENT[3], *across[4:]]
    assert worked(collectives=within).link_seconds == 5.2
    assert worked(collectives=[]).link_seconds == 0.0


def test_recomputing_adds_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "least_hbm_bytes", lambda *_: 0.0)
    mesh, compiled = AbstractMesh((1, 2, 2, 1, 1), AXES), Compiled(0, 0, 0, True, [], {}, 1.0)
    flops = flops_per_token(SMALL.model, SMALL.train.sequence_length).causal * 4 * 256 / 4  # Four sequences on as many devices.
    for remat, factor in ("none", 1.0), ("save_latents", 4 / 3), ("full", 4 / 3):
        config = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, remat=remat))
        found = bound(config, mesh, compiled, CHIP)
        assert found.step_seconds == found.compute_seconds == pytest.approx(factor * flops / CHIP.bf16_flops)


@pytest.mark.parametrize(("changes", "limit"), [({"flops": 30000.0}, 30.0), ({"hbm_bytes": 2500.0}, 25.0)])
def test_the_slowest_is_the_step(changes: dict[str, float], limit: float) -> None:
    assert worked(**changes).step_seconds == limit
