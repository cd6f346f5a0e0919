"""The device mesh of a run. One device so far; the axes are those of `MeshConfig`, so that configs already carry them."""

from __future__ import annotations

import dataclasses

import jax

from dsv3_jax.config import MeshConfig


def single_device(config: MeshConfig) -> jax.Device:
    """The device a run uses.

    Raises:
      NotImplementedError: if the mesh asks for more than one place.
    """
    wanted = {name: size for name, size in dataclasses.asdict(config).items() if size not in (1, -1)}
    if wanted:
        raise NotImplementedError(
            f"mesh {wanted}: meshes of several devices are not implemented yet; set these to 1 to run on one device"
        )
    return jax.devices()[0]
