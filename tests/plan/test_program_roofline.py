"""A roofline worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_jax.parallel.devices import Chip
from dsv3_jax.plan.hlo import Collective
from dsv3_jax.plan.program import Roofline, roofline

CHIP = Chip(bf16_flops=1000.0, hbm_bytes=100.0, hbm_gib=1.0, ici_bytes=10.0, dcn_bytes=2.0)
SENT = [
    Collective("all-gather", "fsdp", 30, 1, False),
    Collective("all-reduce", "data", 8, 1, False),
    Collective("ragged-all-to-all", "expert", 15, 2, True),
    Collective("all-reduce", "data+fsdp", 2, 1, False),
    Collective("all-gather", "?", 5, 1, False),
]


def worked(**changes: object) -> Roofline:
    arguments = {"flops_per_token": 60.0, "tokens_per_device": 50.0, "remat": "none", "hbm_bytes": 250.0, "collectives": SENT}
    return roofline(**{**arguments, "chip": CHIP, **changes})  # type: ignore[arg-type]


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


@pytest.mark.parametrize(("remat", "seconds"), [("none", 3.0), ("save_latents", 4.0), ("full", 4.0)])
def test_recomputing_adds_a_forward(remat: str, seconds: float) -> None:
    assert worked(remat=remat).compute_seconds == pytest.approx(seconds)


@pytest.mark.parametrize(("changes", "limit"), [({"flops_per_token": 600.0}, 30.0), ({"hbm_bytes": 2500.0}, 25.0)])
def test_the_slowest_is_the_step(changes: dict[str, float], limit: float) -> None:
    assert worked(**changes).step_seconds == limit
