"""How far a token can travel: node-limited routing, laid out on the devices of a mesh (section 2.1.2 of the report)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from dsv3_jax.config import ModelConfig
from dsv3_jax.parallel.mesh import AXES


class Reach(NamedTuple):
    """The most places that the experts of one token can live in."""

    devices: int
    hosts: int


def reach(config: ModelConfig, mesh: Mesh) -> Reach:
    """Bounds the devices and hosts of one token's experts: its K experts come from `topk_group` groups of consecutive ones."""
    groups, experts, size = config.n_group, config.n_routed_experts, mesh.shape["expert"]
    lines = np.moveaxis(mesh.devices, AXES.index("expert"), -1).reshape(-1, size)
    device_of = np.arange(experts) * size // experts
    members = np.split(device_of, groups)

    def farthest(places: list[set[Any]]) -> int:
        """Places of the groups that are spread over most, of which there cannot be more than experts, nor than there are."""
        spread = sum(sorted(len(group) for group in places)[-config.topk_group :])
        return min(config.num_experts_per_tok, spread, len(set().union(*places)))

    devices = farthest([set(group) for group in members])
    hosts = [farthest([{_host(line[device]) for device in group} for group in members]) for line in lines]
    return Reach(devices, max(hosts))


def _host(device: Any) -> tuple[int, int]:
    return getattr(device, "slice_index", 0), device.process_index
