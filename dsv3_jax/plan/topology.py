"""Devices that are not there: an accelerator topology for the compiler, or virtual CPU devices.

The TPU compiler is part of libtpu, a pip package that runs on any x86 machine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import re
import sys
from typing import Any

import jax

from dsv3_jax.plan.roofline import CHIPS, Chip

# libtpu looks for a TPU host around it, and there is none.
_NO_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as v5p:8x8x8.

    Raises:
      ValueError: if the name is of another form, or of a chip without figures here.
    """
    chip, colon, shape = topology.partition(":")
    if chip not in CHIPS or not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape, re.ASCII):
        raise ValueError(f"topology {topology!r} is not chip:AxBxC with a chip of {', '.join(CHIPS)}, such as v5p:4x4x8")
    return CHIPS[chip]


def tpu_devices(topology: str, slices: int = 1) -> list[Any]:
    """The devices of `slices` slices of a topology. JAX itself is made to run on the CPU.

    Raises:
      ValueError: if there is no such topology, or no TPU compiler.
    """
    from jax.experimental import topologies

    library = find_tpu_compiler()
    if library is None:
        raise ValueError(
            f"compiling for {topology} takes the TPU compiler; `make tpu-compiler` or `pip install 'dsv3-jax[tpu]'` adds it, "
            "--devices N compiles for N CPU devices without it"
        )
    os.environ.update(_NO_HOST, TPU_LIBRARY_PATH=library)
    jax.config.update("jax_platforms", "cpu")
    more = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices)
    except Exception as error:  # What libtpu raises has no narrower type.
        raise ValueError(f"topology {topology} is refused by the TPU compiler: {_first_line(error)}") from error


def find_tpu_compiler() -> str | None:
    """The path of libtpu.so: TPU_LIBRARY_PATH, where `make tpu-compiler` puts it, or the libtpu package; None without one."""
    beside = pathlib.Path(sys.prefix, "tpu", "libtpu", "libtpu.so")
    named = os.environ.get("TPU_LIBRARY_PATH") or (str(beside) if beside.exists() else None)
    if named is None and (spec := importlib.util.find_spec("libtpu")) is not None and spec.origin is not None:
        named = str(pathlib.Path(spec.origin).with_name("libtpu.so"))
    return named


def use_cpu_devices(number: int) -> list[Any]:
    """So many CPU devices, virtual ones; call it before anything else touches a device.

    Raises:
      ValueError: if JAX runs on fewer already.
    """
    jax.config.update("jax_platforms", "cpu")
    # Refused once JAX runs: then on as many as it has.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", number)
    devices = jax.devices()
    if len(devices) < number:
        raise ValueError(f"{number} CPU devices are asked for where JAX runs on {len(devices)} already")
    return devices[:number]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
