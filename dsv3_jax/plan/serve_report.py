"""`python -m dsv3_jax.plan --mode serve`: what prefill and decode take on a machine, with the weights in 16 and in 8 bits."""

from __future__ import annotations

import dataclasses
import json as json_format
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.infer.cache import num_shards
from dsv3_jax.infer.runner import Chunks, decode, models, on_mesh, prefill
from dsv3_jax.kernels.experts import choose_backend
from dsv3_jax.parallel.devices import Chip
from dsv3_jax.parallel.mesh import current_platform, describe
from dsv3_jax.plan.program import GIB, PROVES, Compiled, compile_for, device_bytes, rows_sent
from dsv3_jax.plan.serving import Arguments, Serving, Weights, abstract_arguments, by_rows, check_serves, smallest_mesh
from dsv3_jax.plan.serving_bound import Limits, Step, Work, limits, unused_bytes, work
from dsv3_jax.plan.tables import amount, print_memory
from dsv3_jax.plan.topology import mesh_of_all

FORMATS: tuple[Weights, ...] = ("bfloat16", "fp8")


class Part(NamedTuple):
    """Prefill or decode."""

    compiled: Compiled
    work: Work
    limits: Limits | None
    tokens: int
    """Tokens of the whole machine in one step; of decoding, those there are without drafts."""
    total_bytes: int
    """Of a device: what the compiler says of the program, and the weights that it does not take."""
    fits: bool | None


class Plan(NamedTuple):
    """Both programs on one mesh."""

    mesh: Mesh
    weight_bytes: int
    cache_bytes: int
    parts: dict[str, Part]

    @property
    def fits(self) -> bool | None:
        """Whether both programs do."""
        known = [part.fits for part in self.parts.values()]
        return None if None in known else all(known)


def report_serving(
    model: ModelConfig,
    serving: Serving,
    devices: list[Any],
    mesh: MeshConfig | None,
    chip: Chip | None,
    *,
    title: str,
    json: bool,
) -> None:
    """Compiles prefill and decode for every format that is asked for, and prints what they take.

    Args:
      model: the architecture; it is served in bfloat16.
      serving: what is served.
      devices: of the machine; they need not exist.
      mesh: None takes for each format the mesh on which a device holds fewest bytes.
      chip: None for CPU devices.
      title: what to call the model.
      json: print one JSON object, and nothing else.

    Raises:
      ValueError: if the mesh does not take all devices or divide what it splits, or the model cannot be served so.
    """
    model = model.with_dtype("bfloat16")
    formats = FORMATS if serving.weights is None else (serving.weights,)
    plans = {}
    for weights in formats:
        asked = dataclasses.replace(serving, weights=weights)
        sizes = mesh or smallest_mesh(model, asked, len(devices))
        plans[weights] = plan_serving(model, asked, mesh_of_all(sizes, devices, "tensor"), chip)
        if not json:
            _print(Console(), f"{title}, weights in {weights}", asked, plans[weights], chip)
    if json:
        about = {name: size for name, size in dataclasses.asdict(serving).items() if name != "weights"}
        hbm = None if chip is None else int(chip.hbm_gib * GIB)
        shown = {weights: _json(plan) for weights, plan in plans.items()}
        print(json_format.dumps({"mode": "serve", "devices": len(devices), **about, "hbm_bytes": hbm, "weights": shown}))
    else:
        print(PROVES)


def plan_serving(model: ModelConfig, serving: Serving, mesh: Mesh, chip: Chip | None) -> Plan:
    """Compiles both programs for a mesh. Raises as `report_serving`."""
    check_serves(model, serving, dict(mesh.shape))
    arguments, shards = abstract_arguments(model, serving, mesh), num_shards(mesh)
    with on_mesh(mesh):
        backend = choose_backend(model.expert_backend, model.dtype, current_platform())
    decode = compile_decode(model, serving, mesh, chip, arguments)
    prefill = compile_prefill(model, serving, mesh, chip, arguments)

    def part(compiled: Compiled, step: Step, tokens: int) -> Part:
        done = work(model, serving, step, arguments, backend)
        total = compiled.total_bytes + done.unused_bytes
        fits = None if chip is None else compiled.fits is not False and total <= chip.hbm_gib * GIB
        bound = None if chip is None or compiled.collectives is None else limits(done, compiled, chip)
        return Part(compiled, done, bound, tokens, total, fits)

    parts = {
        "decode": part(decode, Step.of_decode(serving, shards), serving.batch),
        "prefill": part(prefill, Step.of_prefill(serving), shards * serving.chunk),
    }
    return Plan(mesh, device_bytes(arguments.variables), device_bytes(arguments.cache), parts)


def _json(plan: Plan) -> dict[str, Any]:
    return {
        "mesh": dict(plan.mesh.shape),
        "weight_bytes": plan.weight_bytes,
        "cache_bytes": plan.cache_bytes,
        "fits": plan.fits,
        **{name: _part_json(part) for name, part in plan.parts.items()},
    }


def _part_json(part: Part) -> dict[str, Any]:
    compiled = part.compiled
    bound = part.limits
    return {
        "temporary_bytes": compiled.temporary_bytes,
        "total_bytes": part.total_bytes,
        "fits": part.fits,
        "kernels": compiled.kernels,
        "collectives": None if compiled.collectives is None else [dataclasses.asdict(one) for one in compiled.collectives],
        "flops": part.work.flops,
        "weight_bytes_read": part.work.weight_bytes,
        "cache_bytes_read": part.work.cache_bytes,
        "weight_bytes_copied": part.work.copied_bytes,
        "tokens": part.tokens,
        "roofline_seconds": None if bound is None else bound._asdict(),
        "roofline_seconds_per_token": None if bound is None else bound.step_seconds / part.tokens,
        "compile_seconds": compiled.compile_seconds,
    }


def _print(console: Console, title: str, serving: Serving, plan: Plan, chip: Chip | None) -> None:
    console.print(f"\n[bold]{title}[/bold], on {describe(plan.mesh)}")
    parts = plan.parts.values()
    rows: dict[str, Sequence[int | None]] = {
        "weights": [plan.weight_bytes] * len(parts),
        f"cache of {serving.batch} x {serving.context} tokens": [plan.cache_bytes] * len(parts),
        "temporaries": [part.compiled.temporary_bytes for part in parts],
        "in all, with the weights it does not take": [part.total_bytes for part in parts],
    }
    print_memory(console, ("GiB a device", *plan.parts), rows, chip, plan.fits)
    for name, part in plan.parts.items():
        _print_part(console, name, part, chip, serving.drafts > 0)
    if chip is None:
        console.print("No least time: it would need a chip's peaks, so name one by --topology.")


def _print_part(console: Console, name: str, part: Part, chip: Chip | None, drafting: bool) -> None:
    compiled = part.compiled
    sent = ", ".join(
        f"{one.kind} along {one.axis} {amount(one.bytes / 1e6)} MB in {one.count}" for one in compiled.collectives or []
    )
    console.print(f"{name}, compiled in {compiled.compile_seconds:.0f} s. In a step a device sends: {sent or 'unknown'}.")
    if compiled.kernels:
        console.print(f"Pallas kernels: {', '.join(compiled.kernels)}.")
    if part.limits is not None and chip is not None:
        bound, done = part.limits, part.work
        ms = {name: f"{amount(1e3 * seconds)} ms" for name, seconds in bound._asdict().items()}
        per_token, second = amount(1e6 * bound.step_seconds / part.tokens), part.tokens / bound.step_seconds
        copied = f", and {amount(done.copied_bytes / 1e9)} GB to make some whole or wide" if done.copied_bytes else ""
        if_none = ", if no draft stands" if drafting and name == "decode" else ""
        console.print(
            f"Least time of a step, without latencies: arithmetic {ms['compute_seconds']} ({amount(done.flops / 1e12)} TFLOP); "
            f"HBM {ms['weight_seconds']} for weights ({amount(done.weight_bytes / 1e9)} GB to read{copied}) and "
            f"{ms['cache_seconds']} for the cache ({amount(done.cache_bytes / 1e9)} GB); links {ms['link_seconds']}. If all "
            f"overlap, {ms['step_seconds']}: {per_token} us for each of {part.tokens} tokens{if_none}, {second:,.0f} tokens/s "
            "on all devices."
        )


# ----------------------------------------------------------------------------------------------------------------------
# The two programs of generation, prefill and decode, compiled for machines that are not there.


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
