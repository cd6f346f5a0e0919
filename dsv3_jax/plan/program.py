"""The training step of a run, compiled for machines that are not there, and what the compiler says of it.

It is the very function that train.py calls (`compile_train_step`), with arrays that have a shape and no content.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsv3_jax.config import Config
from dsv3_jax.data.batches import Batch
from dsv3_jax.model.flops import flops_per_token
from dsv3_jax.parallel.chips import Chip
from dsv3_jax.parallel.mesh import TOKEN_AXES
from dsv3_jax.plan.arrays import device_bytes, placed
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
    shapes = jax.eval_shape(lambda: init_state(config))
    state = jax.tree.map(placed, shapes, state_shardings(config, mesh))
    train = config.train
    shape = train.micro_batches, train.micro_batch, train.sequence_length
    tokens, weights = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32))
    batch = Batch(tokens, tokens, weights, None if config.data.cross_document_attention else tokens)
    variables, moments = device_bytes((state.params, state.router)), device_bytes(state.optimizer)
    step = compile_train_step(config, mesh)
    with jax.set_mesh(mesh):
        compiled = compile_for(
            lambda: step.lower(shapes, batch, config.schedules.at(train.steps - 1)),
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
        hbm_bytes=least_hbm_bytes(config, mesh, program),
        collectives=program.collectives or [],
        chip=chip,
    )


def least_hbm_bytes(config: Config, mesh: Mesh, program: Program) -> float:
    """Bytes that a device reads and writes at the least in a step.

    The state is read and written once; for every micro-batch, each gathered weight is written once and read once in the
    forward pass, in the recomputation and in the backward pass, and its gradient written and read once. Activations are left
    out.
    """
    passes = 2 if config.model.remat == "none" else 3
    width = jnp.dtype(config.model.dtype).itemsize
    parameters = program.parameter_bytes / jnp.dtype(config.model.param_dtype).itemsize
    dense_split = mesh.shape["fsdp"] * mesh.shape["expert"] * mesh.shape["context"]
    expert_split = mesh.shape["fsdp"] * mesh.shape["context"]
    one_expert = 3 * config.model.hidden_size * config.model.moe_intermediate_size
    layers = config.model.num_moe_layers + config.model.num_nextn_predict_layers
    experts = layers * config.model.n_routed_experts * one_expert / (mesh.shape["expert"] * expert_split * mesh.shape["tensor"])
    gathered = experts * expert_split + (parameters - experts) * dense_split
    state = 2.0 * (program.parameter_bytes + program.optimizer_bytes)
    return state + 2.0 * (passes + 1) * width * gathered * config.train.micro_batches
