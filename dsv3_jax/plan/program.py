"""The training step of a run, compiled for machines that are not there, and what the compiler says of it.

It is the very function that train.py calls (`compile_train_step`), with arrays that have a shape and no content.
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
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.config.model import RematPolicy
from dsv3_jax.model.flops import flops_per_token
from dsv3_jax.model.losses import Batch
from dsv3_jax.model.transformer import STACKS
from dsv3_jax.parallel.devices import Chip
from dsv3_jax.parallel.mesh import TOKEN_AXES
from dsv3_jax.parallel.sharding import EXPERT_FSDP_AXES, FSDP_AXES
from dsv3_jax.plan.hlo import Collective
from dsv3_jax.plan.hlo import collectives as collectives_in
from dsv3_jax.train.state import init_state, state_shardings
from dsv3_jax.train.step import compile_train_step

# ----------------------------------------------------------------------------------------------------------------------
# Arrays that have a shape and a place, and no content: what they take on one device.


def placed(shape: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
    """The shape of an array that lives where `sharding` says."""
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def device_bytes(tree: Any) -> int:
    """Bytes of arrays on one device."""
    return sum(device_values(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_values(array: Any) -> int:
    """Values of an array on one device."""
    return math.prod(array.sharding.shard_shape(array.shape))


def gathered(array: Any) -> jax.ShapeDtypeStruct:
    """A weight as it is multiplied with: whole along the axes that split it for want of room (`all_gather_weight`)."""
    sharding = array.sharding
    spec = (None if part in (FSDP_AXES, EXPERT_FSDP_AXES) else part for part in sharding.spec)
    return placed(array, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


# ----------------------------------------------------------------------------------------------------------------------
# A program compiled for devices that are not there, and what the compiler says of it.


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


@dataclasses.dataclass(frozen=True)
class Program(Compiled):
    """A compiled training step, in bytes per device."""

    parameter_bytes: int
    """Of the arguments, the variables."""
    optimizer_bytes: int
    """And the optimizer's moments."""


def compile_program(config: Config, mesh: Mesh, chip: Chip | None, slices: int = 1) -> Program:
    """Compiles a run's training step for the devices of `mesh`; a program that does not fit is an answer, too.

    Args:
      config: the run.
      mesh: of devices that need not exist.
      chip: gives the memory of a device; None for CPU devices.
      slices: TPU slices that the mesh spans.
    """
    state = state_on(config, mesh)
    train = config.train
    shape = train.micro_batches, train.micro_batch, train.sequence_length
    tokens, weights = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32))
    batch = Batch(tokens, tokens, weights, None if config.data.cross_document_attention else tokens)
    variables, moments = device_bytes((state.params, state.router)), device_bytes(state.optimizer)
    step = compile_train_step(config, mesh)
    with jax.set_mesh(mesh):
        compiled = compile_for(
            lambda: step.lower(state, batch, config.schedules.at(train.steps - 1)),
            mesh,
            chip,
            variables + moments,
            slices=slices,
            ragged_rows=expected_rows_sent(config, mesh),
            # The exchange's first round stands before its loop over rounds, and under even routing it is the only one.
            open_trips=0,
            # Micro-batches are counted by a loop around everything else.
            outer_trips=train.micro_batches if train.micro_batches > 1 else None,
        )
    return Program(**vars(compiled), parameter_bytes=variables, optimizer_bytes=moments)


def state_on(config: Config, mesh: Mesh | AbstractMesh) -> Any:
    """The state of a run, as shapes that know where they live."""
    return jax.tree.map(placed, jax.eval_shape(lambda: init_state(config)), state_shardings(config, mesh))


def expected_rows_sent(config: Config, mesh: Mesh) -> float:
    """Rows that a device sends to others in one exchange of a micro-batch, under even routing."""
    places = math.prod(mesh.shape[axis] for axis in TOKEN_AXES)
    return rows_sent(config.train.micro_batch * config.train.sequence_length / places, config.model, mesh)


def bound(config: Config, mesh: Mesh, program: Program, chip: Chip) -> Roofline:
    """The least time of a step. HBM traffic is a lower bound, too: see `least_hbm_bytes`."""
    tokens = config.train.batch_size * config.train.sequence_length / mesh.size
    return roofline(
        flops_per_token=flops_per_token(config.model, config.train.sequence_length).causal,
        tokens_per_device=tokens,
        remat=config.model.remat,
        hbm_bytes=least_hbm_bytes(config, mesh),
        collectives=program.collectives or [],
        chip=chip,
    )


def least_hbm_bytes(config: Config, mesh: Mesh | AbstractMesh) -> float:
    """Bytes that a device reads and writes at the least in a step.

    The state is read and written once. For every micro-batch each weight, in the computation dtype and whole as it is used,
    is read in the forward pass and in the backward pass, and its gradient is written and read. Beside that

      experts            are read once more, since their backward pass starts from their inputs, and are gathered twice
      blocks, remat full are read once more, but for what only makes a block's output, and are gathered twice
      all other weights  are gathered once: the head's gradient comes with its logits, what is not recomputed may be kept

    To gather is to write; what no axis splits is not gathered. Of the embedding rows are looked up, next to nothing, and
    activations are left out.
    """
    state = state_on(config, mesh)
    values = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        names = [jax.tree_util.keystr((key,), simple=True) for key in path]
        if "embed" not in names:
            whole = device_values(gathered(leaf))
            gathers = _gathers(config, names) if whole > device_values(leaf) else 0
            values += whole * (_reads(config, names) + 2 + gathers)
    width = jnp.dtype(config.model.dtype).itemsize
    return 2.0 * device_bytes(state) + width * values * config.train.micro_batches


def _reads(config: Config, names: list[str]) -> int:
    experts = "experts" in names
    recomputed = config.model.remat == "full" and _in_block(names) and "down_proj" not in names
    return 3 if experts or recomputed else 2


def _gathers(config: Config, names: list[str]) -> int:
    return 2 if "experts" in names or (config.model.remat != "none" and _in_block(names)) else 1


def _in_block(names: list[str]) -> bool:
    return "block" in names or not {*names}.isdisjoint(STACKS)


# ----------------------------------------------------------------------------------------------------------------------
# What a training step takes at least: its arithmetic, memory traffic and link traffic, each at the chip's peak.


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
