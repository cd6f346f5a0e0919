"""A program compiled for devices that are not there, and what the compiler says of it."""

from __future__ import annotations

import collections
import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from dsv3_jax.config import ModelConfig
from dsv3_jax.parallel.devices import Chip
from dsv3_jax.plan.collectives import Collective
from dsv3_jax.plan.collectives import collectives as collectives_in

GIB = 2**30
PROVES = "A compile proves that this program exists and what it takes; it does not prove that it computes the right thing."


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program, in bytes per device."""

    argument_bytes: int
    """Everything that is handed to it."""
    temporary_bytes: int | None
    """Everything that lives only within it; None where the compiler gave up and did not say."""
    total_bytes: int
    """Argument + temporary + output - alias, or what the compiler says it would take where it does not fit."""
    fits: bool | None
    """Whether that is within the device's memory; None on CPU devices, which have no such limit."""
    collectives: list[Collective] | None
    """What a device sends; None where the program did not fit, and there is none to read it off."""
    kernels: dict[str, int]
    """Pallas kernels in the program, by name, and how often each stands in it."""
    compile_seconds: float
    text: str
    """The optimised program, as the compiler prints it."""


def compile_for(lower: Callable[[], Any], mesh: Mesh, chip: Chip | None, argument_bytes: int, **traffic: Any) -> Compiled:
    """Compiles a program for the devices of `mesh`; one that does not fit is an answer, too.

    Args:
      lower: `jax.jit(...).lower` with its arguments.
      mesh: of devices that need not exist.
      chip: gives the memory of a device; None for CPU devices.
      argument_bytes: of its arguments on one device, which a refusal does not always say.
      **traffic: for `collectives`.
    """
    started = time.perf_counter()
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        refusal = read_refusal(str(error), argument_bytes)
        if refusal is None:
            raise
        return Compiled(argument_bytes, *refusal, False, None, {}, time.perf_counter() - started, "")
    seconds = time.perf_counter() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        total,
        None if chip is None else total <= chip.hbm_gib * GIB,
        collectives_in(text, dict(mesh.shape), **traffic),
        kernels_in(text),
        seconds,
        text,
    )


def rows_sent(tokens: float, config: ModelConfig, mesh: Mesh) -> float:
    """Rows that a device with so many tokens sends to others in one exchange, under even routing.

    All of its tokens' choices but those of its own experts: T K (X - 1) / X for an expert axis of X.
    """
    return tokens * config.num_experts_per_tok * (1 - 1 / mesh.shape["expert"])


def kernels_in(text: str) -> dict[str, int]:
    """Pallas kernels of a compiled program by the names they were given, without what differentiation adds to those."""
    on_tpu = r'^\s+(?:ROOT )?%([\w\-]+)[\w.\-]* = .*custom_call_target="tpu_custom_call"'
    on_gpu = r'custom_call_target="mosaic_gpu\w*".*op_name="[^"]*/(\w+)/\w+"'
    found = [name for call in (on_tpu, on_gpu) for name in re.findall(call, text, re.MULTILINE)]
    return dict(sorted(collections.Counter(re.sub(r"^(transpose_|jvp_)+", "", name).strip("_") for name in found).items()))


def read_refusal(message: str, argument_bytes: int) -> tuple[int | None, int] | None:
    """What the TPU compiler's out-of-memory error says; None for any other error.

    Returns:
      The temporary bytes, if it names them, and the bytes in all. The compiler gives up early where the temporaries alone
      are too many, and later where all together are.
    """

    def size(found: re.Match[str]) -> int:
        return round(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))

    if found := re.search(r"memory required for HLO temporaries \(([\d.]+)([KMGT]?)\)", message):
        return size(found), argument_bytes + size(found)
    if found := re.search(r"Ran out of memory in memory space hbm\. Used ([\d.]+)([KMGT]?) of", message):
        return None, size(found)
    return None
