"""A run's training step compiled for devices that need not exist: its memory, its collectives, and its least time.

It is the step that train.py runs (`compile_train_step`), compiled for abstract arrays.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.model.flops import flops_per_token
from dsv3_jax.model.losses import Batch
from dsv3_jax.model.transformer import STACKS
from dsv3_jax.parallel.devices import Chip
from dsv3_jax.parallel.mesh import TOKEN_AXES
from dsv3_jax.plan.hlo import Collective
from dsv3_jax.plan.hlo import collectives as collectives_in
from dsv3_jax.plan.topology import device_bytes, device_values, gathered, named_leaves, placed
from dsv3_jax.train.state import abstract_state, state_shardings
from dsv3_jax.train.step import compile_train_step

# ----------------------------------------------------------------------------------------------------------------------
# Compiled programs, and the compiler's figures for them.


GIB = 2**30
PROVES = "A compile proves that this program exists and what it takes; it does not prove that it computes the right thing."


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Figures of a compiled program, per device."""

    argument_bytes: int
    temporary_bytes: int | None
    """Bytes of arrays that live only within the program; None if the compiler refused it without saying."""
    total_bytes: int
    """Argument + temporary + output - alias; for a program refused as too large, from the compiler's error."""
    fits: bool | None
    """True if `total_bytes` are within the memory of a device; None on CPU devices, which have no such limit."""
    collectives: list[Collective] | None
    """None if the compiler refused the program as too large: then there is no text to read them from."""
    kernels: dict[str, int]
    """Pallas kernels by name, with the number of times that each appears in the text."""
    compile_seconds: float


def compile_for(lower: Callable[[], Any], mesh: Mesh, chip: Chip | None, argument_bytes: int, **traffic: Any) -> Compiled:
    """Compile a program for the devices of `mesh`, and return its figures, also if the compiler refuses it as too large.

    Args:
      lower: `jax.jit(...).lower` with its arguments.
      mesh: mesh of devices that need not exist.
      chip: source of the memory size of a device; None for CPU devices.
      argument_bytes: bytes of the arguments on one device, which an out-of-memory error does not always state.
      **traffic: options of `collectives`.
    """
    started = time.perf_counter()
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        refusal = read_refusal(str(error), argument_bytes)
        if refusal is None:
            raise
        return Compiled(argument_bytes, *refusal, False, None, {}, time.perf_counter() - started)
    seconds = time.perf_counter() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    fits = None if chip is None else total <= chip.hbm_gib * GIB
    found = collectives_in(text, dict(mesh.shape), **traffic)
    return Compiled(memory.argument_size_in_bytes, memory.temp_size_in_bytes, total, fits, found, kernels_in(text), seconds)


def rows_sent(tokens: float, config: ModelConfig, mesh: Mesh) -> float:
    """Return the rows that a device with `tokens` tokens sends to others in one expert exchange, under even routing.

    All of its tokens' choices except those of its own experts: T K (X - 1) / X for an expert axis of X.
    """
    return tokens * config.num_experts_per_tok * (1 - 1 / mesh.shape["expert"])


def kernels_in(text: str) -> dict[str, int]:
    """Return kernel -> count of the Pallas calls in compiled HLO text, names without the prefixes of differentiation."""
    on_tpu = r'^\s+(?:ROOT )?%([\w\-]+)[\w.\-]* = .*custom_call_target="tpu_custom_call"'
    on_gpu = r'custom_call_target="mosaic_gpu\w*".*op_name="[^"]*/(\w+)/\w+"'
    found = [name for call in (on_tpu, on_gpu) for name in re.findall(call, text, re.MULTILINE)]
    return dict(sorted(collections.Counter(re.sub(r"^(transpose_|jvp_)+", "", name).strip("_") for name in found).items()))


def read_refusal(message: str, argument_bytes: int) -> tuple[int | None, int] | None:
    """Return (temporary, total) bytes from the TPU compiler's out-of-memory error; None for any other error.

    Its early error states the temporaries, to which `argument_bytes` are added; its late one the total (temporary is None).
    """
    early = re.search(r"memory required for HLO temporaries \(([\d.]+)([KMGT]?)\)", message)
    late = re.search(r"Ran out of memory in memory space hbm\. Used ([\d.]+)([KMGT]?) of", message)
    found = early or late
    if not found:
        return None
    size = round(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))
    return (size, argument_bytes + size) if early else (None, size)


def state_on(config: Config, mesh: Mesh | AbstractMesh) -> Any:
    """Return the `TrainState` of a run, as abstract arrays with their shardings on `mesh`."""
    return jax.tree.map(placed, abstract_state(config), state_shardings(config, mesh))


def compile_program(config: Config, mesh: Mesh, chip: Chip | None, slices: int = 1) -> Compiled:
    """Compile a run's training step for a mesh over `slices` TPU slices, and return its figures as `compile_for` does."""
    state, train = state_on(config, mesh), config.train
    shape = train.micro_batches, train.micro_batch, train.sequence_length
    tokens, weights = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32))
    batch = Batch(tokens, tokens, weights, None if config.data.cross_document_attention else tokens)
    device_tokens = train.micro_batch * train.sequence_length / math.prod(mesh.shape[axis] for axis in TOKEN_AXES)
    step = compile_train_step(config, mesh)
    with jax.set_mesh(mesh):
        return compile_for(
            lambda: step.lower(state, batch, config.schedules.at(train.steps - 1)),
            mesh,
            chip,
            device_bytes((state.params, state.router, state.optimizer)),
            slices=slices,
            ragged_rows=rows_sent(device_tokens, config.model, mesh),
            # The first round of the exchange is outside its loop over rounds, and under even routing it is the only one.
            open_trips=0,
            # The outermost loop is that over micro-batches.
            outer_trips=train.micro_batches if train.micro_batches > 1 else None,
        )


# ----------------------------------------------------------------------------------------------------------------------
# Lower bound of the time of a training step: arithmetic, memory traffic and link traffic, each at the chip's peak.


class Roofline(NamedTuple):
    """Least seconds of a training step, by resource."""

    compute_seconds: float
    hbm_seconds: float
    link_seconds: float
    step_seconds: float
    """The largest of the three."""


def roofline(flops: float, hbm_bytes: float, collectives: Iterable[Collective], chip: Chip) -> Roofline:
    """Return the seconds that a device's step takes if arithmetic, HBM and links each run at their peak and overlap.

    Link time is the larger of that of the interconnect and that of the network between slices. All links of a device count as
    busy at once; a collective along one axis of a torus uses only some of them, so real ones take longer.
    """
    sent = {True: 0, False: 0}
    for one in collectives:
        sent[one.across_slices] += one.bytes
    compute, hbm = flops / chip.bf16_flops, hbm_bytes / chip.hbm_bytes
    link = max(sent[False] / chip.ici_bytes, sent[True] / chip.dcn_bytes)
    return Roofline(compute, hbm, link, max(compute, hbm, link))


def bound(config: Config, mesh: Mesh | AbstractMesh, program: Compiled, chip: Chip) -> Roofline:
    """Return the least seconds of a run's training step, from its FLOP, `least_hbm_bytes` and the program's collectives.

    A backward pass counts as two forward passes. Any remat but "none" adds one forward pass (4/3 of the FLOP), although
    "save_latents" saves some projections of MLA. Without collectives (a program too large) the links count as 0 seconds.
    """
    train, remat = config.train, config.model.remat
    tokens = train.batch_size * train.sequence_length / mesh.size
    flops = flops_per_token(config.model, train.sequence_length).causal * tokens * (1.0 if remat == "none" else 4 / 3)
    return roofline(flops, least_hbm_bytes(config, mesh), program.collectives or [], chip)


def least_hbm_bytes(config: Config, mesh: Mesh | AbstractMesh) -> float:
    """Return the fewest bytes that a device can read and write in its HBM in a training step.

    The state is read and written once. In every micro-batch each weight, gathered and in the computation dtype, is read in
    the forward and in the backward pass, and its gradient is written and read. By weight and `remat` there are added

      routed experts, any remat              one more read, and two gathers
      others in blocks, remat "full"         one more read (none of a `down_proj`), and two gathers
      others in blocks, "save_latents"       two gathers
      all the others                         one gather (in blocks with remat "none", and outside blocks)

    A gather writes the whole weight, if that is split along the fsdp axes. Activations and embedding lookups are left out.
    """
    state, remat = state_on(config, mesh), config.model.remat
    values = 0
    for names, leaf in named_leaves(state.params):
        if "embed" in names:
            continue
        whole = device_values(gathered(leaf))
        experts, in_block = "experts" in names, not {"block", *STACKS}.isdisjoint(names)
        reads = 3 if experts or (remat == "full" and in_block and "down_proj" not in names) else 2
        gathers = 2 if experts or (remat != "none" and in_block) else 1
        values += whole * (reads + 2 + (gathers if whole > device_values(leaf) else 0))
    width = jnp.dtype(config.model.dtype).itemsize
    return 2.0 * device_bytes(state) + width * values * config.train.micro_batches
