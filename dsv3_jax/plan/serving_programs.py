"""The two programs of generation, prefill and decode, compiled for machines that are not there.

They are the very functions that the engine runs, with arrays that have a shape and a place, and no content.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsv3_jax.config import ModelConfig
from dsv3_jax.infer.cache import num_shards
from dsv3_jax.infer.runner import Chunks, decode, models, on_mesh, prefill
from dsv3_jax.parallel.devices import Chip
from dsv3_jax.plan.arrays import device_bytes
from dsv3_jax.plan.compiled import Compiled, compile_for, rows_sent
from dsv3_jax.plan.serving import Arguments, Serving, by_rows
from dsv3_jax.plan.serving_bound import Step, unused_bytes


def compile_prefill(config: ModelConfig, serving: Serving, mesh: Mesh, chip: Chip | None, arguments: Arguments) -> Compiled:
    """Compiles the last chunk of a context: the first one too, where a chunk holds a whole context."""
    shards = num_shards(mesh)
    rows = jax.ShapeDtypeStruct((shards,), jnp.int32)
    chunks = Chunks(jax.ShapeDtypeStruct((shards, serving.chunk), jnp.int32), rows, rows, rows, rows)
    table = jax.ShapeDtypeStruct((shards, serving.pages_of_one), jnp.int32)
    more, model = by_rows((chunks, table), mesh), models(config, mesh)[0]

    def lower() -> Any:
        return prefill.lower(model, *arguments, *more, first=serving.start == 0)

    return _compiled(lower, config, serving, Step.of_prefill(serving), mesh, chip, arguments)


def compile_decode(config: ModelConfig, serving: Serving, mesh: Mesh, chip: Chip | None, arguments: Arguments) -> Compiled:
    """Compiles one step of all sequences."""
    table = jax.ShapeDtypeStruct((serving.batch, serving.pages_of_one), jnp.int32)
    more = by_rows((table, jax.ShapeDtypeStruct((serving.batch,), bool)), mesh)
    model, step = models(config, mesh)[1], Step.of_decode(serving, num_shards(mesh))
    return _compiled(lambda: decode.lower(model, *arguments, *more), config, serving, step, mesh, chip, arguments)


def _compiled(
    lower: Any, config: ModelConfig, serving: Serving, step: Step, mesh: Mesh, chip: Chip | None, arguments: Arguments
) -> Compiled:
    taken = device_bytes(arguments) - unused_bytes(config, serving, step, arguments)
    with on_mesh(mesh):
        # Of the exchange's rounds the first stands before the loop over more, and under even routing it is the only one.
        return compile_for(lower, mesh, chip, taken, open_trips=0, ragged_rows=rows_sent(step.rows, config, mesh))
