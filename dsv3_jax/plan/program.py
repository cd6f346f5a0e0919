"""The training step of a run, compiled for machines that are not there, and what the compiler says of it.

It is the very function that train.py calls (`compile_train_step`), with arrays that have a shape and no content.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from dsv3_jax.config import Config
from dsv3_jax.data.batches import Batch
from dsv3_jax.model.flops import flops_per_token
from dsv3_jax.model.transformer import STACKS
from dsv3_jax.parallel.devices import Chip
from dsv3_jax.parallel.mesh import TOKEN_AXES
from dsv3_jax.plan.arrays import device_bytes, device_values, gathered, placed
from dsv3_jax.plan.compiled import Compiled, compile_for, rows_sent
from dsv3_jax.plan.roofline import Roofline, roofline
from dsv3_jax.train.state import init_state, state_shardings
from dsv3_jax.train.step import compile_train_step


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
