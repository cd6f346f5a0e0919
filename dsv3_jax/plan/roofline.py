"""What a training step takes at least: its arithmetic, memory traffic and link traffic, each at the chip's peak.

A bound, not a forecast: nothing reaches its peak, and what does not overlap adds up.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from dsv3_jax.config.model import RematPolicy
from dsv3_jax.parallel.devices import Chip
from dsv3_jax.plan.collectives import Collective

# Arithmetic of a step over that of its model. Recomputing a block adds a forward to a forward and a backward of twice
# that; "save_latents" spares some projections of MLA only, and is charged as the full policy is.
RECOMPUTED: dict[RematPolicy, float] = {"none": 1.0, "save_latents": 4 / 3, "full": 4 / 3}


class Roofline(NamedTuple):
    """Least seconds of a training step, by what limits it."""

    compute_seconds: float
    hbm_seconds: float
    link_seconds: float
    step_seconds: float
    """The largest of the three."""


def roofline(
    *,
    flops_per_token: float,
    tokens_per_device: float,
    remat: RematPolicy,
    hbm_bytes: float,
    collectives: Iterable[Collective],
    chip: Chip,
) -> Roofline:
    """Seconds of a step in which everything runs at its peak and overlaps entirely.

      compute  flops_per_token * tokens_per_device * (4/3 if recomputing, else 1) / bf16_flops
      hbm      hbm_bytes / chip's HBM bytes/s
      link     the larger of ICI bytes / chip's ICI bytes/s and DCN bytes / chip's DCN bytes/s
      step     the largest of the three

    The links are counted as if all of a device's ran busy at once; a collective along one axis of a torus uses some of
    them only, so real ones take longer. What goes between slices is charged to DCN, anything else to ICI.

    Args:
      flops_per_token: model FLOPs, forward and backward (either figure of `dsv3_jax.model.flops`).
      tokens_per_device: tokens of a step over devices.
      remat: what the backward recomputes.
      hbm_bytes: bytes that a device reads and writes in a step.
      collectives: what a device sends in a step.
      chip: the device, from CHIPS or your own figures.
    """
    sent = {True: 0, False: 0}
    for one in collectives:
        sent[one.across_slices] += one.bytes
    compute = flops_per_token * tokens_per_device * RECOMPUTED[remat] / chip.bf16_flops
    hbm = hbm_bytes / chip.hbm_bytes
    link = max(sent[False] / chip.ici_bytes, sent[True] / chip.dcn_bytes)
    return Roofline(compute, hbm, link, max(compute, hbm, link))
